"""RecBole's atomic files: types and tables as their headers say."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullrank.data.dataset import Dataset
from fullrank.data.formats import open_format
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec

INTER = "user_id:token\titem_id:token\titem_id_list:token_seq\trating:float\ttimestamp:float\n"


def files(path: Path, inter: str = INTER, name: str = "ml") -> Path:
    path.mkdir(exist_ok=True)
    rows = "".join(f"{n % 7}\t{n % 11}\t{n % 3} {n % 5}\t{n % 2}\t{1.6e9 + n:.1f}\n" for n in range(60))
    (path / f"{name}.inter").write_text(inter + rows)
    return path


def test_types_keys_and_tables(tmp_path: Path) -> None:
    path = files(tmp_path / "ml")
    (path / "ml.item").write_text(
        "item_id:token\tgenre:token_seq\tyear:float\tvec:float_seq\n0\ta b\t1999\t0.1 0.2\n0\tc\t1\t\nbad\n"
    )
    (path / "ml.user").write_text("user_id:token\tage:token\n1\told\n")
    schema = open_format("recbole").default_schema(path)
    assert {feature.name: (feature.kind, feature.role) for feature in schema.features} == {
        "user_id": ("categorical", "user"),
        "item_id": ("categorical", "item"),
        "item_id_list": ("sequence", "user"),
        "age": ("categorical", "user"),
        "genre": ("multi_categorical", "item"),
        "year": ("numeric", "item"),
    }
    assert (schema.keys.user_id, schema.keys.item_id, schema.keys.timestamp) == ("user_id", "item_id", "timestamp")
    assert [(label.name, label.kind) for label in schema.labels] == [("rating", "binary")]
    dataset = import_dataset("recbole", path, tmp_path / "out", split=SplitSpec(kind="none"), max_bad=0.1)
    train = dataset.scan("train").collect()
    assert train.height == 60
    assert dataset.rejected == {"1 fields, expected 4": 1}
    assert (train["age"] >= 2).sum() == sum(n % 7 == 1 for n in range(60))
    assert {len(genres) for genres in train["genre"].to_list()} == {0, 2}  # an item listed twice keeps its first line
    tables = dataset.schema.tables()
    assert "item_id_list" not in tables
    assert tables["item_id"] == 2 + 11


def test_a_benchmark_split_and_what_is_none(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        files(tmp_path / "ml", name=f"ml.{part}")
    dataset = import_dataset("recbole", tmp_path / "ml", tmp_path / "out")
    assert [dataset.rows(split) for split in dataset.splits] == [60, 60, 60]
    assert Dataset.from_frame(tmp_path / "ml" / "ml.train.inter", split="none").rows("train") == 60
    files(tmp_path / "no", "user\titem\tlist\trating\ttime\n")
    with pytest.raises(ValueError, match='ml.inter line 1: "user" is no name with a type'):
        open_format("recbole").default_schema(tmp_path / "no")
