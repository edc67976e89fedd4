"""Learning-to-rank text: grades, queries and numbers as they stand, comments aside."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from fullrank.data.formats import open_format
from fullrank.data.formats.letor import Letor
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec

NONE = SplitSpec(kind="none")


@pytest.mark.parametrize("name", ["letor", "libfm"])
def test_grades_queries_and_numbers(tmp_path: Path, name: str) -> None:
    path = tmp_path / "log.txt"
    path.write_text("2 qid:1 1:0.5 3:-1 # first 7:7\n0 qid:1  3:2e1\t4:1 \n\n1 qid:22 4:2#caf\u00e9\n")
    source = open_format(name)
    schema = source.default_schema(path)
    assert [feature.name for feature in schema.features] == ["qid", "feature_1", "feature_3", "feature_4"]
    assert schema.labels[0].kind == "regression"
    (chunk,) = source.chunks(path, schema)
    assert chunk.frame.select("grade", "qid", "feature_1", "feature_3", "feature_4", "__line").rows() == [
        ("2", "1", 0.5, -1.0, 0.0, 1),
        ("0", "1", 0.0, 20.0, 1.0, 2),
        ("1", "22", 0.0, 0.0, 2.0, 4),
    ]
    dataset = import_dataset(name, path, tmp_path / "out", split=NONE)
    assert dataset.scan("train").collect()["__user_id"].to_list() == [1, 1, 22]


def test_bad_lines_are_set_aside_wherever_the_blocks_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.txt"
    lines = [f"{n % 2} qid:{n // 9} 1:{n} 2:{n / 2}" for n in range(2000)]
    lines[7], lines[8], lines[9] = "1 qid:0 1:x", "maybe qid:0 1:1", "1 qid:0 word"
    path.write_bytes("\n".join(lines).encode() + b"\n1 qid:0 1:\xff\n")
    monkeypatch.setattr("fullrank.data.formats.letor._BLOCK_BYTES", 5000)
    monkeypatch.setattr("fullrank.data.formats.letor._CHUNK_NUMBERS", 30)
    schema = Letor().default_schema(path)
    assert schema.labels[0].kind == "regression"  # for the bad grade; the others are 0 and 1
    dataset = import_dataset("letor", path, tmp_path / "out", split=NONE, max_bad=0.01)
    rejected = pl.read_csv(dataset.path / "rejected.tsv", separator="\t").sort("line")
    assert rejected["line"].to_list() == [8, 9, 10, 2001]
    assert dataset.rows("train") == 1997
