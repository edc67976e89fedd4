"""Amazon reviews: the same log in every layout gives the rows that a plain loop over it gives."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from fullrank.data.dataset import Dataset
from fullrank.data.formats import amazon_files, by_user, open_format
from fullrank.data.formats.next_item import next_items
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec

DAY = 86_400


def log(users: int = 60, items: int = 40, seed: int = 0) -> list[tuple[str, str, int]]:
    """Reviews in no order; several of a user may fall on one day."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        taken = rng.choice(items, rng.integers(1, 12), replace=False)
        days = rng.integers(16_000, 16_008, len(taken))
        rows += [(f"U{user}", f"B{item:03}", int(day) * DAY) for item, day in zip(taken, days, strict=True)]
    return [rows[place] for place in rng.permutation(len(rows))]


def categories(rows: list[tuple[str, str, int]]) -> dict[str, str]:
    return {item: f"category {int(item[1:]) % 5}" for _, item, _ in rows}


def reviews_2014(path: Path, rows: list[tuple[str, str, int]]) -> Path:
    path.mkdir()
    lines = [
        json.dumps({"reviewerID": u, "asin": i, "reviewText": 'a "quoted, text', "unixReviewTime": t})
        for u, i, t in rows
    ]
    with gzip.open(path / "reviews_Toys_5.json.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    about = [
        {"asin": item, "title": "it's", "categories": [["Toys"], ["Toys", "Games", name]], "price": 1.5}
        for item, name in [*categories(rows).items(), ("unseen", "nothing")]
    ]
    with gzip.open(path / "meta_Toys.json.gz", "wt") as file:
        file.write("".join(f"{line}\n" for line in about))  # Python literals, as published
    return path


def reviews_2018(path: Path, rows: list[tuple[str, str, int]]) -> Path:
    path.mkdir()
    lines = [json.dumps({"overall": 5.0, "reviewerID": u, "asin": i, "unixReviewTime": t}) for u, i, t in rows]
    (path / "Toys_5.json").write_text("\n".join(lines) + "\n")
    about = [json.dumps({"category": ["Toys", name], "asin": item}) for item, name in categories(rows).items()]
    (path / "meta_Toys.json").write_text("\n".join(about))
    return path


def reviews_2023(path: Path, rows: list[tuple[str, str, int]]) -> Path:
    path.mkdir()
    lines = [
        json.dumps({"rating": 5.0, "asin": "variant", "parent_asin": i, "user_id": u, "timestamp": t * 1000 + 7})
        for u, i, t in rows
    ]
    (path / "Toys.jsonl").write_text("\n".join(lines))
    about = [json.dumps({"categories": ["Toys", name], "parent_asin": item}) for item, name in categories(rows).items()]
    (path / "meta_Toys.jsonl").write_text("\n".join(about))
    return path


def interactions(path: Path, rows: list[tuple[str, str, int]]) -> Path:
    path.mkdir()
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "time"], orient="row")
    frame.write_parquet(path / "interactions.parquet")
    about = categories(rows)
    pl.DataFrame({"item_id": list(about), "i_category": list(about.values())}).write_parquet(path / "items.parquet")
    return path


def frame_of(path: Path) -> pl.DataFrame:
    """All raw rows of a log, lists decoded."""
    source = open_format("amazon")
    frames = []
    for chunk in source.chunks(path, source.default_schema(path)):
        decoded = {name: values.gather(chunk.frame[name]) for name, values in chunk.dictionaries.items()}
        frames.append(chunk.frame.with_columns(**decoded) if chunk.frame.height else chunk.frame.clear())
    return pl.concat([frame for frame in frames if frame.height])


def by_loop(rows: list[tuple[str, str, int]]) -> list[tuple[Any, ...]]:
    """The positive rows, user by user: user, item, part, earlier items, their categories, time."""
    order: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for place, (user, item, time) in enumerate(rows):
        order[user].append((time, place, item))
    about = categories(rows)
    expected = []
    for user, events in order.items():
        events.sort()
        for place in range(1, len(events)):
            before = [item for _, _, item in events[:place]]
            part = {len(events) - 1: "test", len(events) - 2: "valid"}.get(place, "train")
            time, _, item = events[place]
            expected.append((user, item, part, before, [about[each] for each in before], time))
    return expected


@pytest.mark.parametrize("layout", [reviews_2014, reviews_2018, reviews_2023, interactions])
def test_rows_are_those_of_a_loop_over_users(tmp_path: Path, layout: Any) -> None:
    rows = log()
    frame = frame_of(layout(tmp_path / "log", rows))
    positive = frame.filter(pl.col("label") == 1)
    columns = ["user_id", "item_id", "split", "history.item", "history.category", "timestamp"]
    assert positive.select(columns).rows() == by_loop(rows)
    about = categories(rows)
    assert frame["category_id"].to_list() == [about[item] for item in frame["item_id"].to_list()]


def test_each_positive_has_one_negative_that_its_user_never_takes(tmp_path: Path) -> None:
    rows = log()
    frame = frame_of(interactions(tmp_path / "log", rows))
    taken: dict[str, set[str]] = defaultdict(set)
    for user, item, _ in rows:
        taken[user].add(item)
    positive, negative = frame.filter(pl.col("label") == 1), frame.filter(pl.col("label") == 0)
    alike = ["user_id", "timestamp", "split", "history.item", "history.category"]
    assert negative.select(alike).equals(positive.select(alike))
    assert not any(item in taken[user] for user, item in negative.select("user_id", "item_id").rows())


def test_negatives_are_drawn_evenly(tmp_path: Path) -> None:
    users = pl.Series(np.repeat(np.arange(4000), 3))
    items = np.tile(np.array([0, 1, 2]), 4000)
    (rows,) = next_items(users, items, 23, max_length=5, candidates=10_000)
    counts = Counter(rows.item[rows.label == 0].tolist())
    assert set(counts) == set(range(3, 23))
    expected = 8000 / 20
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 43.8  # 99.9 % quantile with 19 degrees of freedom


def test_a_user_who_took_nearly_everything() -> None:
    users = pl.Series(["all"] * 4 + ["most"] * 3)
    (rows,) = next_items(users, np.array([0, 1, 2, 3, 0, 1, 3]), 4, max_length=5, candidates=100)
    label, item = rows.label, rows.item
    assert label.tolist() == [1, 1, 1, 1, 0, 1, 0]  # there is no negative for the user who took all items
    assert item[label == 0].tolist() == [2, 2]


def test_neither_groups_nor_chunks_change_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = interactions(tmp_path / "log", log())
    expected = frame_of(path)
    monkeypatch.setattr(amazon_files.InteractionTables, "groups", lambda self: 7)
    monkeypatch.setattr(by_user, "PENDING_BYTES", 2000)
    monkeypatch.setattr("fullrank.data.formats.event_log.CANDIDATES", 5)
    found = frame_of(path)
    order = ["user_id", "timestamp", "__line", "label"]
    assert not found.equals(expected)
    assert found.sort(order).equals(expected.sort(order))


def test_sequences_with_attributes_as_text_and_as_parquet(tmp_path: Path) -> None:
    sequences = {1: [5, 6, 7, 8], 2: [8, 5]}
    attributes = {5: [50, 1], 6: [60], 7: [], 8: [1, 80]}
    text, parquet = tmp_path / "text", tmp_path / "parquet"
    text.mkdir()
    (text / "Toys.txt").write_text("".join(f"{u} {' '.join(map(str, i))}\n" for u, i in sequences.items()))
    (text / "Toys_item2attributes.json").write_text(json.dumps(attributes))
    parquet.mkdir()
    pl.DataFrame({"user_id": list(sequences), "item_ids": list(sequences.values())}).write_parquet(
        parquet / "sequences.parquet"
    )
    pl.DataFrame({"item_id": list(attributes), "attributes": list(attributes.values())}).write_parquet(
        parquet / "item_attributes.parquet"
    )
    frame = frame_of(text)
    positive = frame.filter(pl.col("label") == 1)
    assert positive["history.item"].to_list() == [["5"], ["5", "6"], ["5", "6", "7"], ["8"]]
    assert positive["history_attributes.attribute"].to_list() == [
        ["50", "1"],
        ["50", "1", "60"],
        ["50", "1", "60"],
        ["1", "80"],
    ]
    assert positive["attributes"].to_list() == [["60"], [], ["1", "80"], ["50", "1"]]
    assert positive["split"].to_list() == ["train", "valid", "test", "test"]
    other = frame_of(parquet)
    lists = [name for name, dtype in other.schema.items() if isinstance(dtype, pl.List)]
    texts = other.with_columns(pl.col("user_id", "item_id").cast(pl.String), pl.col(lists).cast(pl.List(pl.String)))
    assert texts.equals(frame)


def test_bad_lines_are_rejected_with_line_and_column(tmp_path: Path) -> None:
    path = reviews_2014(tmp_path / "log", log(users=400))
    with gzip.open(path / "reviews_Toys_5.json.gz", "rb") as file:
        lines = file.read().split(b"\n")
    lines[4] = b'{"reviewerID": "U1", "unixReviewTime": 5}'
    lines[6] = b'{"reviewerID": "U1", "asin": "B1", "unixReviewTime": "noon"}'
    lines[8] = b"{'reviewerID'"
    lines[9] = b'{"reviewerID": "\xff", "asin": "B1", "unixReviewTime": 5}'
    lines[10] = b"[1]"
    lines[12] = b'{"reviewerID": "", "asin": "B1", "unixReviewTime": 5}'
    (path / "reviews_Toys_5.json.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    with gzip.open(path / "meta_Toys.json.gz", "at") as file:
        file.write("{'asin': 'B001', 'categories': 3}\nnot a literal\n")
    dataset = import_dataset("amazon", path, tmp_path / "out", max_bad=0.01)
    table = pl.read_csv(dataset.path / "rejected.tsv", separator="\t", infer_schema=False)
    assert [(line, column, reason) for line, column, reason, _ in table.rows()] == [
        ("5", "asin", "missing"),
        ("7", "unixReviewTime", "expected an integer"),
        ("9", "", "not a JSON object"),
        ("10", "", "not UTF-8"),
        ("11", "", "not a JSON object"),
        ("13", "reviewerID", "expected text"),
        ("42", "categories (meta_Toys.json.gz)", "expected a list of categories"),
        ("43", "(meta_Toys.json.gz)", "not a JSON object"),
    ]
    assert table["value"].to_list()[1] == "noon"


def test_metadata_is_read_and_never_run(tmp_path: Path) -> None:
    path = reviews_2014(tmp_path / "log", log())
    trap = tmp_path / "trap"
    with gzip.open(path / "meta_Toys.json.gz", "at") as file:
        file.write(f"{{'asin': 'B001', 'categories': [[open({str(trap)!r}, 'w')]]}}\n")
    dataset = import_dataset("amazon", path, tmp_path / "out", max_bad=0.01)
    assert dataset.rejected == {"not a JSON object": 1} and not trap.exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected interactions.parquet, sequences.parquet, train.csv, or one file of reviews .* found none of"),
        ({"a.json": '{"asin": "1"}', "b.json": '{"asin": "1"}'}, "found a.json, b.json"),
        ({"a.json": '{"title": "1"}'}, 'a.json line 1: expected a JSON object with the key "asin"'),
        ({"train.csv": "label,user_id\n1,2\n"}, "expected the columns label, user_id, item_id, cate_id"),
        ({"a.txt": "1 2 3\n", "a_item2attributes.json": "[]"}, "a_item2attributes.json: expected one JSON object"),
    ],
)
def test_a_directory_of_something_else_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    path = tmp_path / "log"
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        import_dataset("amazon", path, tmp_path / "out")


LEADERBOARD = "label,user_id,item_id,cate_id,item_history,cate_history\n"


def leaderboard(path: Path, users: int = 200) -> Path:
    path.mkdir()
    for part, category in (("train", "c7"), ("test", "c8")):
        rows = [f"{label},{u},{10 + label + u},{category},{u}^{u + 1},5^6\n" for u in range(users) for label in (1, 0)]
        (path / f"{part}.csv").write_text(LEADERBOARD + "".join(rows))
    return path


def test_the_leaderboards_files_with_validation_users_out_of_train(tmp_path: Path) -> None:
    dataset = import_dataset("amazon", leaderboard(tmp_path / "log"), tmp_path / "out")
    frames = {split: dataset.scan(split).collect() for split in dataset.splits}
    train, valid = set(frames["train"]["__user_id"]), set(frames["valid"]["__user_id"])
    assert not train & valid and train | valid == set(range(200)) == set(frames["test"]["__user_id"])
    assert 8 <= len(valid) <= 35
    vocabulary = [None, None, *dataset.encoders.vocabularies["item_id"].values.to_list()]
    row = frames["train"].row(0, named=True)
    user = row["__user_id"]
    assert vocabulary[row["item_id"]] == str(11 + user)
    assert [vocabulary[item] for item in row["history.item"]] == [str(user), str(user + 1)]
    assert frames["train"]["category_id"].unique().to_list() != frames["test"]["category_id"].unique().to_list()
    assert dataset.validation == "10% of the users of the train file"


def test_protocol_bars_validates_on_the_test_rows(tmp_path: Path) -> None:
    path = leaderboard(tmp_path / "log")
    dataset = import_dataset("amazon", path, tmp_path / "out", split=SplitSpec(protocol="bars"))
    assert dataset.rows("train") == 400
    assert dataset.scan("valid").collect().equals(dataset.scan("test").collect())
    assert dataset.validation == "the test rows (protocol bars)"
    none = import_dataset("amazon", path, tmp_path / "none", split=SplitSpec(valid=0))
    assert none.splits == ("train", "test")


def test_protocol_bars_needs_two_files(tmp_path: Path) -> None:
    path = interactions(tmp_path / "log", log())
    with pytest.raises(ValueError, match='protocol "bars" is for a log that comes as a train and a test file'):
        import_dataset("amazon", path, tmp_path / "out", split=SplitSpec(protocol="bars"))


def test_a_split_by_time_instead_of_the_last_events(tmp_path: Path) -> None:
    dataset = import_dataset(
        "amazon", interactions(tmp_path / "log", log()), tmp_path / "out", split=SplitSpec(kind="time")
    )
    assert dataset.scan("train").collect()["__timestamp"].max() < dataset.scan("test").collect()["__timestamp"].min()  # type: ignore[operator]


PUBLIC = [("beauty", 22_363, 198_502), ("toys", 19_412, 167_597), ("grocery", 14_681, 121_892)]


@pytest.mark.parametrize(("name", "users", "events"), PUBLIC)
def test_public_files(shared_data: Path, tmp_path: Path, name: str, users: int, events: int) -> None:
    dataset: Dataset = import_dataset("amazon", shared_data / f"amazon-{name}", tmp_path / "out")
    rows = {split: dataset.rows(split) for split in dataset.splits}
    assert rows == {"train": 2 * (events - 3 * users), "valid": 2 * users, "test": 2 * users}
    test = dataset.scan("test").collect()
    assert test["label"].mean() == 0.5
    lengths = dataset.scan("train").collect()["history.item"].list.len()
    assert lengths.min() == 1 and int(lengths.max()) <= 100  # type: ignore[arg-type]


def test_attributes_are_cut_before_they_are_put_together(tmp_path: Path) -> None:
    # An item of 50,000 attributes in a history of 100 that 200 rows share: 10^9 elements if they were not cut.
    (tmp_path / "Toys.txt").write_text("1 " + " ".join(str(n % 7) for n in range(200)) + "\n2 3 4 5\n")
    attributes = {"0": [f"a{n}" for n in range(50_000)], **{str(n): [f"b{n}", "c"] for n in range(1, 7)}}
    (tmp_path / "Toys_item2attributes.json").write_text(json.dumps(attributes))
    source = open_format("amazon")
    path = tmp_path / "Toys.txt"
    chunks = list(source.chunks(path, source.default_schema(path)))
    lists = pl.concat(
        chunk.dictionaries["history_attributes.attribute"].gather(chunk.frame["history_attributes.attribute"])
        for chunk in chunks
    )
    assert lists.list.len().max() == 400
    # The latest items come last: item 0 gives its last attributes, the items after it theirs.
    row = lists.filter(lists.list.len() == 400)[0].to_list()
    assert row[-1] in ("c", "a49999")
    assert row[0].startswith("a")
