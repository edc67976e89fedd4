"""KuaiVideo in the leaderboard's CSV layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fullrank.data.formats import open_format
from fullrank.data.formats.kuaivideo import COLUMNS
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec
from fullrank.schema import Label


def table(rows: int, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)

    def videos() -> list[str]:
        return ["^".join(map(str, rng.integers(0, 30, rng.integers(0, 130)))) for _ in range(rows)]

    return pl.DataFrame(
        {
            "timestamp": rng.integers(0, 10**12, rows),
            "user_id": rng.integers(0, 40, rows),
            "item_id": rng.integers(0, 60, rows),
            **{name: rng.integers(0, 2, rows) for name in ("is_click", "is_like", "is_follow")},
            "pos_items": videos(),
            "neg_items": videos(),
        }
    ).select(COLUMNS)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "KuaiVideo_x1"
    path.mkdir()
    table(900, 0).write_csv(path / "train.csv")
    table(300, 1).write_csv(path / "test.csv")
    return path


def test_histories_share_the_videos_table_and_keep_the_newest(tmp_path: Path, log: Path) -> None:
    dataset = import_dataset("kuaivideo", log, tmp_path / "out", split=SplitSpec(protocol="bars"))
    assert set(dataset.schema.tables()) == {"user_id", "item_id"}
    source, train = pl.read_csv(log / "train.csv"), dataset.scan("train").collect()
    names = [None, None, *dataset.encoders.vocabularies["item_id"].values.to_list()]
    for stored, column in (("pos_items", "clicked.item"), ("neg_items", "passed.item")):
        texts = source[stored].fill_null("").to_list()
        expected = [text.split("^")[-100:] if text else [] for text in texts]
        assert [[names[id_] for id_ in ids] for ids in train[column].to_list()] == expected
    # A video's count is over candidates and histories; here each in a history is frequent, and 30 to 59 are not.
    counts = source["item_id"].value_counts().filter(pl.col("item_id") >= 30)
    rare = counts.filter(pl.col("count") < 10)["item_id"].to_list()
    assert rare and dataset.schema.tables()["item_id"] == 2 + 60 - len(rare)
    assert train["is_click"].to_list() == source["is_click"].to_list()


def test_validation_users_are_set_aside(tmp_path: Path, log: Path) -> None:
    dataset = import_dataset("kuaivideo", log, tmp_path / "out", split=SplitSpec(valid=0.2, seed=3))
    users = {split: set(dataset.scan(split).collect()["__user_id"]) for split in dataset.splits}
    assert users["valid"] and not users["train"] & users["valid"]
    assert dataset.rows("train") + dataset.rows("valid") == 900 and dataset.rows("test") == 300
    other = import_dataset("kuaivideo", log, tmp_path / "other", split=SplitSpec(valid=0.2, seed=4))
    assert set(other.scan("valid").collect()["__user_id"]) != users["valid"]


def test_other_labels_are_there_for_a_schema_that_names_them(tmp_path: Path, log: Path) -> None:
    schema = open_format("kuaivideo").default_schema(log)
    schema = schema.model_copy(update={"labels": (*schema.labels, Label(name="is_like"))})
    dataset = import_dataset("kuaivideo", log, tmp_path / "out", schema=schema, split=SplitSpec(valid=0))
    source = pl.read_csv(log / "train.csv")
    assert dataset.scan("train").collect()["is_like"].to_list() == source["is_like"].to_list()


def test_bad_rows_and_another_file(tmp_path: Path, log: Path) -> None:
    lines = (log / "train.csv").read_text().splitlines()
    lines[5] = "1,2,3,maybe,0,0,1^2,3"
    lines[9] = "1,2,3"
    (log / "train.csv").write_text("\n".join(lines))
    dataset = import_dataset("kuaivideo", log, tmp_path / "out", max_bad=0.01)
    found = pl.read_csv(dataset.path / "rejected.tsv", separator="\t", infer_schema=False)
    assert set(found.rows()) == {
        ("6", "is_click", "label is not a number", "maybe"),
        ("10", "", "3 fields, expected 8", "1,2,3"),
    }
    (log / "train.csv").write_text("label,user_id\n1,2\n")
    with pytest.raises(ValueError, match='column "timestamp" of KuaiVideo'):
        import_dataset("kuaivideo", log, tmp_path / "no")
