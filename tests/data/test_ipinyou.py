from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from fullrank.data.formats import open_format
from fullrank.data.formats.ipinyou import COLUMNS
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec


def line(**values: str) -> str:
    return "\t".join(values.get(name, "null") for name in COLUMNS) + "\n"


def test_impressions_are_joined_with_their_clicks(tmp_path: Path) -> None:
    rows = [
        line(bid_id="a", time="20131021192300738", user_tags="10,20", paying_price="201", creative="7"),
        line(bid_id="b", time="20131021235959000", paying_price="36", creative="8"),
    ]
    (tmp_path / "imp.1.txt").write_text("".join(rows))
    (tmp_path / "clk.1.txt").write_text(line(bid_id="b", time="20131022000010000"))
    source = open_format("ipinyou")
    frame = pl.concat([chunk.frame for chunk in source.chunks(tmp_path, source.default_schema(tmp_path))])
    assert frame["click"].to_list() == [0, 1]
    assert frame["timestamp"].to_list() == ["1382383380", "1382399999"]
    assert frame["hour"].to_list() == ["19", "23"]
    assert frame["user_tags"].to_list() == ["10,20", None]
    assert frame["agent"].to_list() == [None, None]


def test_the_sample_has_its_published_counts(tmp_path: Path, shared_data: Path) -> None:
    # 9,960 distinct bid ids in 10,000 rows: the repeats are set aside, and are more than a clean log would have
    dataset = import_dataset(
        "ipinyou", shared_data / "ipinyou-sample", tmp_path / "out", split=SplitSpec(kind="none"), max_bad=0.01
    )
    frame = dataset.scan("train").collect()
    assert frame.height == 9_960
    assert int(frame["click"].sum()) == 3
    assert sum(dataset.rejected.values()) == 40


def test_a_directory_without_impressions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no imp\*\.txt"):
        open_format("ipinyou").default_schema(tmp_path)
