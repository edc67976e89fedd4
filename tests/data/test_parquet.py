"""Parquet of any origin: its types as the importer's few, its directories as one log."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fullrank.data.dataset import Dataset
from fullrank.data.formats.parquet import ParquetLog
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec
from fullrank.schema import Categorical, Label, MultiCategorical, Schema

NONE = SplitSpec(kind="none")
COLUMNS: dict[str, tuple[pa.Array, dict[str, list[Any]]]] = {
    "unsigned": (pa.array([2**63, 2**64 - 1, 5], pa.uint64()), {"": [str(2**63), str(2**64 - 1), "5"]}),
    "small unsigned": (pa.array([1, None, 5], pa.uint64()), {"": [1, None, 5]}),
    "duration": (pa.array([1500, None, 10**9], pa.duration("ms")), {"": [1.5, None, 1e6]}),
    "decimal": (pa.array([Decimal("1.50"), None, Decimal("3.00")]), {"": [1.5, None, 3.0]}),
    "whole decimal": (pa.array([Decimal("1"), None, Decimal("30")], pa.decimal128(38, 0)), {"": [1, None, 30]}),
    "wide decimal": (pa.array([Decimal("1"), None, Decimal("30")], pa.decimal256(50, 0)), {"": ["1", None, "30"]}),
    "bytes": (pa.array([b"a", None, b"b"], pa.binary()), {"": ["a", None, "b"]}),
    "raw bytes": (pa.array([b"a", None, b"\xff"], pa.binary()), {"": ["61", None, "ff"]}),
    "half": (pa.array([1.0, None, 2.5], pa.float16()), {"": [1.0, None, 2.5]}),
    "time of day": (pa.array([datetime.time(1, 2, 3), None, None]), {"": ["01:02:03", None, None]}),
    "struct": (pa.array([{"a": 1, "b": "x"}, None, {"a": 2}]), {".a": [1, None, 2], ".b": ["x", None, None]}),
    "map": (
        pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        {".key": [["a"], None, []], ".value": [[1], None, []]},
    ),
    "events": (
        pa.array([[{"item": 1, "age": 0.5}], None, []]),
        {".item": [[1], None, []], ".age": [[0.5], None, []]},
    ),
    "list of unsigned": (
        pa.array([[2**64 - 1, 1], None, []], pa.list_(pa.uint64())),
        {"": [[str(2**64 - 1), "1"], None, []]},
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_any_type_is_read_and_imported(tmp_path: Path, name: str) -> None:
    column, expected = COLUMNS[name]
    table = pa.table({name: column, "click": [0, 1, 0], "user": ["u", "v", "w"]})
    path = tmp_path / "log.parquet"
    pq.write_table(table, path)
    sample = ParquetLog().sample(path)
    for part, values in expected.items():
        assert sample[name + part].to_list() == values
    for source in (path, table):
        dataset = Dataset.from_frame(source, label="click", split="none")
        assert dataset.rows("train") == 3


def test_a_list_of_lists_is_left_out_or_refused_by_name(tmp_path: Path) -> None:
    table = pa.table({"deep": [[[1]], [[2], []], []], "click": [0, 1, 0], "user": ["u", "v", "w"]})
    path = tmp_path / "log.parquet"
    pq.write_table(table, path)
    assert [feature.name for feature in ParquetLog().default_schema(path).features] == ["user"]
    schema = Schema(features=(MultiCategorical(name="deep"),), labels=(Label(name="click"),))
    with pytest.raises(ValueError, match=r'log.parquet: column "deep" holds List\(List\(Int64\)\), expected a value'):
        import_dataset("parquet", path, tmp_path / "out", schema=schema, split=NONE)


def test_unsigned_keys_are_kept_exactly(tmp_path: Path) -> None:
    ids = [2**63, 2**63 + 1, 2**64 - 1, 5]
    pq.write_table(pa.table({"user_id": pa.array(ids, pa.uint64()), "click": [0, 1, 0, 1]}), tmp_path / "log.parquet")
    dataset = import_dataset("parquet", tmp_path / "log.parquet", tmp_path / "out", split=NONE)
    assert dataset.scan("train").collect()["__user_id"].to_list() == [str(each) for each in ids]


def test_a_directory_of_files_by_day_is_one_log_with_the_day_as_a_column(tmp_path: Path) -> None:
    root = tmp_path / "log"
    pq.write_to_dataset(
        pa.table({"user": ["u", "v", "w", "u"], "click": [0, 1, 0, 1], "day": ["1", "1", "2", None]}),
        root,
        partition_cols=["day"],
    )
    (root / "_SUCCESS").touch()
    (root / "day=1" / ".part.crc").touch()
    dataset = Dataset.from_frame(
        root, Schema(features=(Categorical(name="day"),), labels=(Label(name="click"),)), split="none"
    )
    assert sorted(dataset.scan("train").collect()["day"].to_list()) == [0, 2, 2, 3]
    assert dataset.encoders.vocabularies["day"].values.to_list() == ["1", "2"]
    # Parts of the split may be directories too.
    for part in ("train", "test"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        for number in range(2):
            pq.write_table(
                pa.table({"user": ["u"], "click": [number]}), tmp_path / "parts" / part / f"{number}.parquet"
            )
    parts = import_dataset("parquet", tmp_path / "parts", tmp_path / "out")
    assert [parts.rows(split) for split in parts.splits] == [2, 2]


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user": ["u"] * 1000, "click": [0, 1] * 500}), path)
    whole = path.read_bytes()
    for damaged in (whole[:50], whole[:20] + b"\xff" * 40 + whole[60:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"log\.parquet.*not( a)? readable") as caught:
            import_dataset("parquet", path, tmp_path / "out", split=NONE)
        assert "\n" not in str(caught.value)


def test_what_a_schema_says_beside_names_and_types_may_be_any_bytes(tmp_path: Path) -> None:
    field = pa.field("user_id", pa.int64(), metadata={b"note": b"\xff\xfe"})
    schema = pa.schema([field, ("click", pa.int64())], metadata={b"\xff": b"\xfe"})
    pq.write_table(pa.table({"user_id": [1, 2], "click": [0, 1]}, schema=schema), tmp_path / "log.parquet")
    dataset = import_dataset("parquet", tmp_path / "log.parquet", tmp_path / "out", split=SplitSpec(kind="none"))
    assert dataset.rows("train") == 2
