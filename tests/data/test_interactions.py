"""Lists of interactions, a line for each user."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from fullrank.data.dataset import Dataset
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec


def pairs(dataset: Dataset, split: str = "train") -> list[tuple[object, object]]:
    return dataset.scan(split).select("__user_id", "__item_id").collect().rows()


def test_train_and_test_files_become_the_splits(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    (log / "train.txt.gz").write_bytes(gzip.compress(b"0 5 7 9\n1 7\n2\n\n0 8\n"))
    (log / "test.txt").write_text("1 9 4\r\n2 5\r\n")
    dataset = import_dataset("interactions", log, tmp_path / "out")
    assert dataset.splits == ("train", "test")
    assert pairs(dataset) == [(0, 5), (0, 7), (0, 9), (1, 7), (0, 8)]
    assert pairs(dataset, "test") == [(1, 9), (1, 4), (2, 5)]
    frame = dataset.scan("train").collect()
    assert frame["label"].to_list() == [1.0] * 5
    assert frame["item_id"].n_unique() == 4
    assert dataset.schema.keys.model_dump(exclude_none=True) == {"user_id": "user_id", "item_id": "item_id"}


@pytest.mark.parametrize("separator", ["\t", ",", "  "])
def test_any_blank_or_comma_separates(tmp_path: Path, separator: str) -> None:
    (tmp_path / "log.txt").write_text(f"ann{separator}b1{separator}7.0\n")
    dataset = import_dataset("interactions", tmp_path / "log.txt", tmp_path / "out", split=SplitSpec(kind="none"))
    assert pairs(dataset) == [("ann", "b1"), ("ann", "7")]


def test_a_single_file_is_split_by_pairs(tmp_path: Path) -> None:
    """Each user has rows in every part, and the part of a pair depends on the pair alone."""
    lines = [f"{user} " + " ".join(str(item) for item in range(200)) for user in range(10)]
    parts = []
    for name, order in (("there", lines), ("back", lines[::-1])):
        (tmp_path / name).write_text("\n".join(order))
        dataset = import_dataset("interactions", tmp_path / name, tmp_path / f"{name}.out")
        parts.append({split: sorted(pairs(dataset, split)) for split in dataset.splits})  # type: ignore[type-var]
    assert parts[0] == parts[1]
    assert {user for user, _ in parts[0]["valid"]} == {user for user, _ in parts[0]["test"]} == set(range(10))
    assert 150 < len(parts[0]["valid"]) < 250 and 150 < len(parts[0]["test"]) < 250


def test_what_is_no_list_is_said(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("user\n0 1\n")
    with pytest.raises(ValueError, match='log.txt line 1: expected "user item item ..."'):
        import_dataset("interactions", tmp_path / "log.txt", tmp_path / "out")
    (tmp_path / "bad.txt").write_bytes(b"0 1 2\n1 \xff 3\n")
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        import_dataset("interactions", tmp_path / "bad.txt", tmp_path / "out")
