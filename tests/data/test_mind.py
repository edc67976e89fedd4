"""MIND: a row per news item shown, with the clicks before it."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from fullrank.data.formats import open_format
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec

BEHAVIORS = (
    "1\tU1\t11/11/2019 9:05:58 AM\tN1 N2\tN3-1 N1-0\n"
    "2\tU2\t11/15/2019 12:00:00 PM\t\tN4-0\n"
    "3\tU2\tyesterday\tN1\tN4-0\n"
    "4\tU3\t11/15/2019 1:00:00 PM\tN1\t\n"
)
NEWS = (
    'N1\tnews\tworld\tA "quoted title\t\t\t\t\nN2\tsport\tball\tB\t\t\t\t\n'
    "N3\tnews\tlocal\tC\t\t\t\t\nN3\tother\t\t\t\t\t\t\n"
)


def release(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "behaviors.tsv").write_text(BEHAVIORS)
    (path / "news.tsv").write_text(NEWS)
    return path


def test_impressions_become_rows(tmp_path: Path) -> None:
    path = release(tmp_path / "MINDsmall_train")
    source = open_format("mind")
    (chunk,) = source.chunks(path, source.default_schema(path), ["impression_id"])
    frame = chunk.frame.with_columns(
        chunk.dictionaries[name].gather(chunk.frame[name]).alias(name) for name in ("history.item", "history.category")
    )
    wanted = ("impression_id", "user_id", "item_id", "click", "category", "history.item", "history.category")
    assert frame.select(wanted).rows() == [
        ("1", "U1", "N3", "1", "news", ["N1", "N2"], ["news", "sport"]),
        ("1", "U1", "N1", "0", "news", ["N1", "N2"], ["news", "sport"]),
        ("2", "U2", "N4", "0", None, [], []),
    ]
    assert frame["timestamp"].to_list() == [1573463158, 1573463158, 1573819200]
    assert chunk.rejected.rows() == [
        (3, "time", "not a time such as 11/11/2019 9:05:58 AM", "yesterday"),
        (4, "impressions", "no news", ""),
    ]


def test_the_parts_of_a_release(tmp_path: Path) -> None:
    for part in ("train", "dev"):
        release(tmp_path / "MIND" / f"MINDsmall_{part}")
    dataset = import_dataset("mind", tmp_path / "MIND", tmp_path / "out", max_bad=0.5, keep=("impression_id",))
    assert [dataset.rows(split) for split in dataset.splits] == [3, 3]
    assert dataset.scan("valid").collect()["impression_id"].to_list() == [1, 1, 2]
    assert dataset.schema.tables()["item_id"] == 2 + 4
    alone = import_dataset(
        "mind", tmp_path / "MIND" / "MINDsmall_dev", tmp_path / "alone", split=SplitSpec(kind="none"), max_bad=0.5
    )
    assert alone.scan("train").select(pl.len()).collect().item() == 3
    with pytest.raises(ValueError, match=r"news\.tsv is missing"):
        (tmp_path / "MIND" / "MINDsmall_dev" / "news.tsv").unlink()
        import_dataset("mind", tmp_path / "MIND" / "MINDsmall_dev", tmp_path / "no")
