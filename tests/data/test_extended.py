"""A later log with the encoders of an earlier one and its own new ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset
from fullrank.data.importing import import_dataset
from fullrank.data.loader import Loader
from fullrank.data.splits import SplitSpec
from fullrank.schema import OUT_OF_VOCABULARY_ID, Schema

SCHEMA = Schema.model_validate(
    {
        "features": [
            {"kind": "numeric", "name": "price", "transform": "quantile", "bins": 4},
            {"kind": "numeric", "name": "views", "of": ["item"], "statistic": "count"},
            {"kind": "categorical", "name": "user", "role": "user"},
            {"kind": "categorical", "name": "item", "role": "item", "min_count": 2},
            {"kind": "categorical", "name": "site", "encoding": "hash", "num_embeddings": 9},
            {"kind": "categorical", "name": "age", "encoding": "log2_bucket"},
            {"kind": "multi_categorical", "name": "tags", "role": "item"},
            {"kind": "sequence", "name": "history", "of": ["item"], "length": 3},
        ],
        "labels": [{"name": "click"}],
        "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
    }
)
ALL = SplitSpec(kind="none")


def log(items: str, *, tags: str = "a|b", day: int = 0) -> pl.DataFrame:
    """A row for each letter: items, in order."""
    rows = len(items)
    return pl.DataFrame(
        {
            "price": [0.5 * k + 100 * day for k in range(rows)],
            "user": [f"u{k % 3}" for k in range(rows)],
            "item": list(items),
            "site": [f"s{k % 5}" for k in range(rows)],
            "age": [k + 1 + 1000 * day for k in range(rows)],
            "tags": [tags] * rows,
            "time": [1_700_000_000 + 86_400 * day + 60 * k for k in range(rows)],
            "click": [k % 2 for k in range(rows)],
            "margin": [k % 4 for k in range(rows)],
        }
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("first") / "data"
    return Dataset.from_frame(log("ppppqqqrrx"), SCHEMA, split=ALL, path=path)


def values(dataset: Dataset, table: str) -> str:
    return "".join(dataset.encoders.vocabularies[table].values.to_list())


def test_new_ids_come_behind_the_old_ones_and_all_else_stays_as_fitted(first: Dataset) -> None:
    assert values(first, "item") == "pqr"  # x is too rare
    frame = log("rrrrrryyzzzwx", tags="c|b|c", day=1)
    second = Dataset.from_frame(frame, like=first.path, extend=True, split=ALL)
    assert values(second, "item") == "pqrzy"  # by frequency among the new, w and x too rare
    assert values(second, "tags") == "abc"
    assert second.new_ids == {"item": 2, "tags": 1} and first.new_ids == {}
    assert second.encoders.numbers == first.encoders.numbers and second.encoders.buckets == first.encoders.buckets
    assert second.schema.tables() == {**first.schema.tables(), "item": 7, "tags": 5}
    rows = second.scan("train").collect()
    assert rows["item"].to_list() == [4] * 6 + [6, 6, 5, 5, 5, OUT_OF_VOCABULARY_ID, OUT_OF_VOCABULARY_ID]
    assert rows["tags"][0].to_list() == [4, 3, 4]
    assert rows["history.item"][12].to_list() == [4, 6, 5]  # of u0, whose rows are every third one: r, y, z
    plain = Dataset.from_frame(frame, like=first.path, split=ALL)
    same = [name for name in rows.columns if name not in ("item", "tags", "history.item")]
    assert plain.scan("train").select(same).collect().equals(rows.select(same))


def test_only_the_training_part_brings_new_ids(first: Dataset) -> None:
    frame = log("pppppyyyzzz", day=1)
    split = SplitSpec(kind="time", valid=0.2, test=0.1)
    second = Dataset.from_frame(frame, like=first.path, extend=True, split=split)
    assert values(second, "item") == "pqry"
    later = pl.concat([second.scan("valid"), second.scan("test")]).collect()
    assert OUT_OF_VOCABULARY_ID in later["item"].to_list()


def test_days_in_order_extend_each_other(first: Dataset, tmp_path: Path) -> None:
    second = Dataset.from_frame(log("zzyyy", day=1), like=first.path, extend=True, split=ALL, path=tmp_path / "2")
    third = Dataset.from_frame(log("aazzzzq", day=2), like=second.path, extend=True, split=ALL, path=tmp_path / "3")
    again = Dataset.from_frame(log("qrp", day=3), like=third.path, extend=True, split=ALL)
    assert [values(data, "item") for data in (second, third, again)] == ["pqryz", "pqryza", "pqryza"]
    assert third.encoders.extends(first.encoders) and third.encoders.extends(second.encoders)
    assert again.encoders.agrees_with(third.encoders) and not first.encoders.extends(third.encoders)
    assert not third.encoders.agrees_with(first.encoders)


def test_to_who_knows_the_first_log_only_new_ids_are_unknown(first: Dataset, tmp_path: Path) -> None:
    frame = log("ppyyrzzqq" * 20, tags="c|a", day=1)
    extended, plain = (
        Dataset.from_frame(frame, like=first.path, extend=extend, split=ALL, keep=["margin"])
        for extend in (True, False)
    )
    seen = extended.as_known_to(first.encoders)
    assert seen.scan("train").collect().equals(plain.scan("train").collect())
    assert seen.catalogue("item").equals(plain.catalogue("item"))
    for ours, theirs in zip(Loader(seen, "train", 64), Loader(plain, "train", 64), strict=True):
        assert torch.equal(ours.ids_BF, theirs.ids_BF) and torch.equal(ours.jagged_values, theirs.jagged_values)
    assert int(next(iter(Loader(extended, "train", 64))).ids_BF[:, 1].max()) > int(ours.ids_BF[:, 1].max())
    assert extended.as_known_to(extended.encoders) is extended
    other = Dataset.from_frame(log("rrrrqqqppy"), SCHEMA, split=ALL)  # the same values and more, in another order
    with pytest.raises(ValueError, match="other vocabularies than the bundle: import its log with"):
        other.as_known_to(first.encoders)
    with pytest.raises(ValueError, match="other vocabularies than the bundle"):
        first.as_known_to(extended.encoders)


def test_a_log_in_a_file_is_the_same_and_leaves_nothing_when_it_is_cut_off(first: Dataset, tmp_path: Path) -> None:
    frame = log("pyyzz", day=1)
    frame.write_csv(tmp_path / "log.csv")

    def cut_off(good: int, bad: int) -> None:
        raise KeyboardInterrupt

    arguments: dict[str, Any] = {"like": first.path, "extend": True, "split": ALL}
    with pytest.raises(KeyboardInterrupt):
        import_dataset("csv", tmp_path / "log.csv", tmp_path / "out", progress=cut_off, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
    read = import_dataset("csv", tmp_path / "log.csv", tmp_path / "out", keep=["margin"], **arguments)
    table = Dataset.from_frame(frame, keep=["margin"], **arguments)
    assert read.scan("train").collect().equals(table.scan("train").collect())
    assert read.encoders.agrees_with(table.encoders) and list(read.extra) == ["margin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extend": True}, "nothing to extend: name the bundle or the dataset"),
        ({"like": "FIRST", "schema": SCHEMA}, "leave out schema"),
        ({"like": "FIRST", "label": "click"}, "leave out label"),
        ({"like": "FIRST", "time_unit": "ms"}, "leave out time_unit"),
        ({"like": "nowhere", "extend": True}, "nowhere is neither a bundle nor a dataset: it has no encoders"),
    ],
)
def test_what_contradicts_the_earlier_log_is_said(first: Dataset, arguments: dict[str, Any], message: str) -> None:
    if arguments.get("like") == "FIRST":
        arguments = {**arguments, "like": first.path}
    with pytest.raises(ValueError, match=message):
        Dataset.from_frame(log("pq"), **arguments)
