"""Objects line by line: nested fields as columns, one id however it is spelled, bad lines counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from fullrank.data.dataset import Dataset
from fullrank.data.formats.json_log import JsonLog
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec
from fullrank.schema import Categorical, Label, Schema

NONE = SplitSpec(kind="none")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_objects_and_lists_of_objects_become_columns(tmp_path: Path) -> None:
    rows = [
        {
            "user": {"id": "u1", "age": 3},
            "history": [{"item": 1, "age": 0.5}, {"item": 2}],
            "tags": ["a"],
            "click": True,
        },
        {"user": {"id": "u2"}, "history": [], "tags": "b", "click": False, "deep": [[1], [2]]},
    ]
    sample = JsonLog().sample(write(tmp_path / "log.jsonl", rows))
    assert sample.to_dict(as_series=False) == {
        "user.id": ["u1", "u2"],
        "user.age": [3, None],
        "history.item": [[1, 2], None],
        "history.age": [[0.5, None], None],
        "tags": [["a"], ["b"]],
        "click": [True, False],
        "deep": [None, None],
    }


def test_one_id_has_one_text_however_it_is_spelled(tmp_path: Path) -> None:
    ids = [3, 3.0, "3", 2**63 + 1, "a", None]
    path = write(tmp_path / "log.jsonl", [{"id": each, "y": 1} for each in ids])
    schema = Schema(features=(Categorical(name="id"),), labels=(Label(name="y"),))
    dataset = import_dataset("jsonl", path, tmp_path / "out", schema=schema, split=NONE)
    codes = dataset.scan("train").collect()["id"].to_list()
    assert codes[0] == codes[1] == codes[2]
    assert len(set(codes)) == 4
    assert set(dataset.encoders.vocabularies["id"].values.to_list()) == {"3", str(2**63 + 1), "a"}


def test_bad_lines_are_counted_and_a_rare_key_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullrank.data.formats.json_log._BLOCK_BYTES", 100)
    rows: list[Any] = [{"user": f"u{n % 3}", "click": n % 2} for n in range(500)]
    rows[3], rows[400], rows[401], rows[402] = "{broken\n", "[1]\n", "\n", '{"user": "\\ud800", "click": 1}\n'
    rows[450] = {"user": "u1", "click": 1, "rare": "x"}
    path = write(tmp_path / "log.jsonl", rows)
    schema = Schema(features=(Categorical(name="user"), Categorical(name="rare")), labels=(Label(name="click"),))
    dataset = import_dataset("jsonl", path, tmp_path / "out", schema=schema, split=NONE, max_bad=0.1)
    assert dataset.rows("train") == 496
    rejected = pl.read_csv(dataset.path / "rejected.tsv", separator="\t")
    assert rejected["line"].to_list() == [4, 401, 403]
    missing = Schema(features=(Categorical(name="none"),), labels=(Label(name="click"),))
    with pytest.raises(ValueError, match='column "none" is missing; the file has user, click'):
        import_dataset("jsonl", path, tmp_path / "no", schema=missing, split=NONE, max_bad=0.1)


def test_what_is_no_json_lines_is_one_line(tmp_path: Path) -> None:
    for text, message in (("a,b\n1,2\n", "expected a JSON object per line; line 1"), ("[{}]\n", "is one JSON array")):
        with pytest.raises(ValueError, match=message) as caught:
            JsonLog().sample(write(tmp_path / "log.jsonl", [text]))
        assert "\n" not in str(caught.value)


def test_a_log_is_known_by_its_ending(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", [{"user_id": n % 3, "click": n % 2} for n in range(9)])
    (tmp_path / "log.ndjson.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("log.jsonl", "log.ndjson.gz"):
        assert Dataset.from_frame(tmp_path / name, split="none").rows("train") == 9
