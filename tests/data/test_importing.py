"""Importing: every row of a log ends in the dataset or in the list of rejected rows, or nothing is written."""

from __future__ import annotations

import csv
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fullrank.data import building, spool
from fullrank.data.dataset import Dataset
from fullrank.data.formats import delimited, lines
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec
from fullrank.schema import (
    Categorical,
    EventId,
    EventNumber,
    Keys,
    Label,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
)

SCHEMA = Schema(
    features=(
        Categorical(name="user", role="user"),
        Categorical(name="item", role="item"),
        Numeric(name="price", encoding="scalar"),
        MultiCategorical(name="tags", separator="^"),
    ),
    labels=(Label(name="clicked"),),
    keys=Keys(user_id="user", item_id="item", timestamp="time"),
)
HEADER = "clicked,user,item,price,tags,time\n"
GOOD = "1,u1,i1,2.5,a^b,100\n"


def write(path: Path, lines: list[str] | str) -> Path:
    path.write_text(HEADER + "".join(lines))
    return path


def log(rows: int, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    tags = [[f"t{n}" for n in rng.integers(0, 9, rng.integers(0, 4))] for _ in range(rows)]
    return pl.DataFrame(
        {
            "clicked": rng.integers(0, 2, rows),
            "user": [f"u{n}" for n in rng.integers(0, 40, rows)],
            "item": rng.integers(0, 99, rows),
            "price": rng.random(rows).round(3),
            "tags": ["^".join(each) for each in tags],
            "time": rng.integers(0, 10_000, rows),
        }
    )


def bring(path: Path, out: Path, **options: object) -> Dataset:
    options = {"schema": SCHEMA, "format": "csv", "max_bad": 1.0, "split": SplitSpec(kind="none"), **options}
    return import_dataset(path=path, out=out, **options)  # type: ignore[arg-type]


def rejected(dataset: Dataset) -> list[tuple[object, ...]]:
    with (dataset.path / "rejected.tsv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    assert header == ["line", "column", "reason", "value"]
    return [(int(line), *rest) for line, *rest in rows]


def test_decoding_what_was_encoded_gives_the_log_back(tmp_path: Path) -> None:
    frame = log(3000)
    frame.write_csv(tmp_path / "log.csv")
    dataset = bring(tmp_path / "log.csv", tmp_path / "out", split=SplitSpec(kind="time"))
    vocabularies = dataset.encoders.vocabularies
    parts = [dataset.scan(split).collect() for split in dataset.splits]
    assert [part.height for part in parts] == [dataset.rows(split) for split in dataset.splits]
    # Time splits keep the order of rows within a part.
    times = frame["time"].to_numpy()
    cuts = [part["__timestamp"].min() for part in parts[1:]]
    expected = [times < cuts[0], (times >= cuts[0]) & (times < cuts[1]), times >= cuts[1]]
    for part, rows in zip(parts, expected, strict=True):
        source = frame.filter(pl.Series(rows))
        assert part["__timestamp"].to_list() == source["time"].to_list()
        assert part["__user_id"].to_list() == source["user"].to_list()
        assert part["__item_id"].to_list() == source["item"].to_list()
        assert part["clicked"].to_list() == source["clicked"].to_list()
        np.testing.assert_allclose(part["price"], source["price"], rtol=1e-6)
        for name, column in (("user", part["user"]), ("item", part["item"])):
            texts = [None, None, *vocabularies[name].values.to_list()]
            decoded = [texts[id_] for id_ in column.to_list()]
            assert decoded == source[name].cast(pl.String).to_list()
        tags = [None, None, *vocabularies["tags"].values.to_list()]
        assert ["^".join(tags[id_] for id_ in ids) for ids in part["tags"].to_list()] == source["tags"].to_list()


def test_vocabularies_come_from_training_rows_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", ["1,old,i,1,a,0\n"] * 8 + ["0,new,i,100,b,9\n"] * 2)
    dataset = bring(path, tmp_path / "out", split=SplitSpec(kind="time", valid=0, test=0.2))
    assert dataset.encoders.vocabularies["user"].values.to_list() == ["old"]
    assert dataset.encoders.numbers["price"].fill == 1.0
    test = dataset.scan("test").collect()
    assert test["user"].to_list() == [1, 1]
    assert test["tags"].to_list() == [[1], [1]]


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
@pytest.mark.parametrize("block_bytes", [1000, 1 << 20])
def test_neither_blocks_nor_spooling_change_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int, block_bytes: int
) -> None:
    log(2000).write_csv(tmp_path / "log.csv")
    expected = bring(tmp_path / "log.csv", tmp_path / "expected", split=SplitSpec(kind="random"))
    monkeypatch.setattr(spool.Spool.__init__, "__defaults__", (memory_bytes,))
    monkeypatch.setattr(
        delimited.delimited_chunks, "__kwdefaults__", {"plain": frozenset(), "block_bytes": block_bytes}
    )
    monkeypatch.setattr(building, "SHARD_ROWS", 300)
    found = bring(tmp_path / "log.csv", tmp_path / "found", split=SplitSpec(kind="random"))
    assert len(found.shards("train")) == -(-found.rows("train") // 300)
    assert found.encoders.schema == expected.encoders.schema
    for split in expected.splits:
        assert found.scan(split).collect().equals(expected.scan(split).collect())


def test_csv_gzip_tsv_and_parquet_give_the_same_dataset(tmp_path: Path) -> None:
    frame = log(500)
    frame.write_csv(tmp_path / "log.csv")
    frame.write_csv(tmp_path / "log.tsv", separator="\t")
    frame.write_parquet(tmp_path / "log.parquet")
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress((tmp_path / "log.csv").read_bytes()))
    (tmp_path / "crlf.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "log.csv").read_bytes().replace(b"\n", b"\r\n"))
    expected = bring(tmp_path / "log.csv", tmp_path / "expected").scan("train").collect()
    for name in ("log.tsv", "log.csv.gz", "log.parquet", "crlf.csv"):
        format_ = "parquet" if name.endswith("parquet") else "csv"
        assert bring(tmp_path / name, tmp_path / f"out-{name}", format=format_).scan("train").collect().equals(expected)


def test_quoted_separators_and_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", ['1,"u,1","two\nlines",1,a,5\n', GOOD, "2,u,i,1,a,5\n"])
    dataset = bring(path, tmp_path / "out")
    frame = dataset.scan("train").collect()
    assert frame["__user_id"].to_list() == ["u,1", "u1"]
    assert frame["__item_id"].to_list() == ["two\nlines", "i1"]
    # The bad row is the third record and stands in line 5.
    assert rejected(dataset) == [(5, "clicked", "label is not 0 or 1", "2")]


BAD_ROWS = [
    ("maybe,u,i,1,a,5\n", "clicked", "label is not a number", "maybe"),
    ("0.5,u,i,1,a,5\n", "clicked", "label is not 0 or 1", "0.5"),
    ("nan,u,i,1,a,5\n", "clicked", "no label", "nan"),
    (",u,i,1,a,5\n", "clicked", "no label", ""),
    ("1,u,i,cheap,a,5\n", "price", "not a number", "cheap"),
    ("1,u,i,inf,a,5\n", "price", "not a finite number", "inf"),
    ("1,u,i,-inf,a,5\n", "price", "not a finite number", "-inf"),
    ("1,u,i,1e39,a,5\n", "price", "not a finite number", "1e39"),
    ("1,u,i,-1e38,a,5\n", "price", "number is beyond 2^64", "-1e38"),
    ("1,u,i,1,a,yesterday\n", "time", "not a timestamp", "yesterday"),
    ("1,u,i,1,a,\n", "time", "not a timestamp", ""),
    (
        "1,u,i,1,a,1700000000000\n",
        "time",
        'timestamp is not in seconds since 1970: set time_unit in the schema to "ms"',
        "1700000000000",
    ),
    ("1,u,i,1,a\n", "", "5 fields, expected 6", "1,u,i,1,a"),
    ("1,u,i,1,a,5,6\n", "", "7 fields, expected 6", "1,u,i,1,a,5,6"),
]


@pytest.mark.parametrize(("line", "column", "reason", "value"), BAD_ROWS)
def test_a_bad_row_is_reported_where_it_stands_and_the_others_are_kept(
    tmp_path: Path, line: str, column: str, reason: str, value: str
) -> None:
    dataset = bring(write(tmp_path / "log.csv", [GOOD] * 70 + [line] + [GOOD] * 5), tmp_path / "out")
    assert rejected(dataset) == [(72, column, reason, value)]
    assert dataset.rejected == {reason: 1}
    assert dataset.rows("train") == 75


def test_all_bad_rows_of_a_file_are_listed_once_each_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited.delimited_chunks, "__kwdefaults__", {"plain": frozenset(), "block_bytes": 64})
    lines = [line for bad, *_ in BAD_ROWS for line in (bad, GOOD, "\n")]
    dataset = bring(write(tmp_path / "log.csv", lines), tmp_path / "out")
    assert sorted(rejected(dataset)) == [(2 + 3 * place, *expected) for place, (_, *expected) in enumerate(BAD_ROWS)]
    assert dataset.rows("train") == len(BAD_ROWS)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes((HEADER + GOOD).encode() + b"1,caf\xe9,i,1,a,5\n" + GOOD.encode())
    dataset = bring(path, tmp_path / "out")
    assert rejected(dataset) == [(3, "user", "not UTF-8", "1,caf\\xe9,i,1,a,5")]
    assert dataset.rows("train") == 2


def test_too_many_bad_rows_fail_and_are_kept_beside(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [GOOD] * 998 + ["maybe,u,i,1,a,5\n"] * 2)
    with pytest.raises(
        ValueError, match=r'2 of 1,000 rows are bad \(0.20%.*line 1000: column "clicked" is "maybe"'
    ) as e:
        bring(path, tmp_path / "out", max_bad=0.001)
    assert "\n" not in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "out.rejected.tsv"]
    assert len((tmp_path / "out.rejected.tsv").read_text().splitlines()) == 3
    assert bring(path, tmp_path / "out", max_bad=0.002).rows("train") == 998
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "out"]


def test_a_second_row_with_the_same_request_id_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited.delimited_chunks, "__kwdefaults__", {"plain": frozenset(), "block_bytes": 32})
    schema = Schema(
        features=(Categorical(name="c"),), labels=(Label(name="y"),), keys=Keys(request_id="id", timestamp="t")
    )
    path = tmp_path / "log.csv"
    path.write_text("id,y,c,t\n" + "".join(f"{n},1,x,{n}\n" for n in [*range(9), 3, 10, 3, "", 11]))
    for split in (SplitSpec(kind="none"), SplitSpec(kind="time", valid=0.2, test=0.2)):
        dataset = bring(path, tmp_path / "out", schema=schema, split=split, overwrite=True)
        reason = "duplicate request id"
        assert sorted(rejected(dataset)) == [
            (11, "id", reason, "3"),
            (13, "id", reason, "3"),
            (14, "id", "no request id", ""),
        ]
        kept = pl.concat([dataset.scan(name).collect() for name in dataset.splits])
        assert kept["__request_id"].to_list() == [*range(9), 10, 11]


@pytest.mark.parametrize("key", ["weight", "bid"])
def test_a_row_without_a_weight_or_a_bid_is_rejected(tmp_path: Path, key: str) -> None:
    schema = Schema(features=(Categorical(name="c"),), labels=(Label(name="y"),), keys=Keys(**{key: "w"}))
    (tmp_path / "log.csv").write_text("c,y,w\na,1,2\nb,0,\nb,0,nan\nb,1,-1\nb,0,0.5\nb,0,inf\nb,1,-inf\nb,1,0\n")
    dataset = bring(tmp_path / "log.csv", tmp_path / "out", schema=schema)
    assert [(line, column, reason) for line, column, reason, _ in rejected(dataset)] == [
        (3, "w", f"no {key}"), (4, "w", f"no {key}"), (5, "w", f"negative {key}"),
        (7, "w", "not a finite number"), (8, "w", "not a finite number"),
    ]  # fmt: skip
    assert dataset.scan("train").collect()[f"__{key}"].to_list() == [2.0, 0.5, 0.0]


def test_ids_out_of_range_and_events_of_unequal_length(tmp_path: Path) -> None:
    schema = Schema(
        features=(
            Categorical(name="slot", encoding="identity", num_embeddings=3),
            Sequence(
                name="past",
                fields=(EventId(name="slot", encoding="identity", num_embeddings=3), EventNumber(name="age")),
            ),
        ),
        labels=(Label(name="y"),),
    )
    path = tmp_path / "log.csv"
    path.write_text("slot,past.slot,past.age,y\n2,0^2,1^2,1\n3,,,1\n-1,,,0\n0,1^7,1^2,1\n0,1^2,1,1\n0,1,x,1\n,,,1\n")
    dataset = bring(path, tmp_path / "out", schema=schema)
    assert rejected(dataset) == [
        (3, "slot", "id is not an integer from 0 to 2", "3"),
        (4, "slot", "id is not an integer from 0 to 2", "-1"),
        (5, "past.slot", "id is not an integer from 0 to 2", "7"),
        (6, "past.age", "as many events as past.slot expected", "1"),
        (7, "past.age", "not a number", "x"),
    ]
    assert dataset.scan("train").collect()["past.slot"].to_list() == [[0, 2], []]


def test_rows_out_of_time_order_are_counted_and_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [f"1,u,i,1,a,{time}\n" for time in (5, 3, 4, 4, 9, 8)])
    dataset = bring(path, tmp_path / "out", split=SplitSpec(kind="time", valid=0.17, test=0.17))
    assert dataset.out_of_order == 2
    assert [dataset.scan(split).collect()["__timestamp"].to_list() for split in dataset.splits] == [
        [5, 3, 4, 4],
        [8],
        [9],
    ]


def test_timestamps_as_text(tmp_path: Path) -> None:
    texts = ["86400", "1970-01-02", "1970-01-02 00:00:01", "1970-01-02T00:00:02Z", "1970-01-02 00:03", "86400.9"]
    dataset = bring(write(tmp_path / "log.csv", [f"1,u,i,1,a,{text}\n" for text in texts]), tmp_path / "out")
    expected = [86400, 86400, 86401, 86402, 86580, 86400]
    assert dataset.scan("train").collect()["__timestamp"].to_list() == expected


def test_users_of_a_split_by_user_are_in_one_part(tmp_path: Path) -> None:
    log(2000).write_csv(tmp_path / "log.csv")
    spec = SplitSpec(kind="user", valid=0.2, test=0.2)
    dataset = bring(tmp_path / "log.csv", tmp_path / "out", split=spec)
    users = [set(dataset.scan(split).collect()["__user_id"]) for split in dataset.splits]
    assert len(users) == 3
    assert sum(len(each) for each in users) == len(set.union(*users)) == 40


def test_a_given_split_and_its_bad_names(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("part,y,c\ntrain,1,a\ntest,0,b\nlater,1,a\nvalid,1,c\n")
    schema = Schema(features=(Categorical(name="c"),), labels=(Label(name="y"),))
    dataset = bring(path, tmp_path / "out", schema=schema, split=SplitSpec(kind="given", column="part"))
    assert {split: dataset.rows(split) for split in dataset.splits} == {"train": 1, "valid": 1, "test": 1}
    assert rejected(dataset) == [(4, "part", "split is not train, valid or test", "later")]
    with pytest.raises(ValueError, match='column "group" is missing; the file has part, y, c'):
        bring(path, tmp_path / "no", schema=schema, split=SplitSpec(kind="given", column="group"))


def test_a_directory_of_split_files(tmp_path: Path) -> None:
    source = tmp_path / "log"
    source.mkdir()
    for part, rows in (("train", 50), ("valid", 10), ("test", 20)):
        log(rows).write_csv(source / f"{part}.csv")
    dataset = bring(source, tmp_path / "out", split=None)
    assert [dataset.rows(split) for split in ("train", "valid", "test")] == [50, 10, 20]
    with pytest.raises(ValueError, match="comes already split into train, valid, test: leave out the split"):
        bring(source, tmp_path / "no", split=SplitSpec(kind="time"))
    (source / "train.csv").unlink()
    with pytest.raises(ValueError, match=r"is a directory without train\.csv"):
        bring(source, tmp_path / "no", split=None)


def test_a_sequence_of_one_field_may_be_stored_under_the_name_of_the_sequence(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("y,item,history\n1,a,a^b\n0,b,\n")
    history = Sequence(name="history", fields=(EventId(name="item", table="item"),))
    schema = Schema(features=(Categorical(name="item"), history), labels=(Label(name="y"),))
    frame = bring(path, tmp_path / "out", schema=schema).scan("train").collect()
    assert frame["history.item"].to_list() == [[2, 3], []]


def cases(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Sources that cannot be imported at all, and the message for each."""
    found = {}

    def case(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        found[name] = (tmp_path / name, message)

    good = (HEADER + GOOD * 500).encode()
    case("empty.csv", b"", "empty.csv is empty")
    case("header.csv", HEADER.encode(), "header.csv has no rows")
    case("cut.csv.gz", gzip.compress(good)[:-30], "gzip stream is damaged or cut short")
    case("not.csv.gz", good, "gzip stream is damaged or cut short")
    case("latin.csv", "caf\xe9,user\n".encode("latin-1"), "line 1: not UTF-8 text")
    case("lacks.csv", b"clicked,user\n1,u\n", 'column "item" is missing; the file has clicked, user')
    case("twice.csv", b"clicked,user,user\n1,u,u\n", 'line 1: the column "user" appears twice')
    case("bad.csv", (HEADER + "x,u,i,1,a,5\n" * 3).encode(), "has no good rows")
    found["missing"] = (tmp_path / "missing.csv", "missing.csv does not exist")
    return found


@pytest.mark.parametrize(
    "name",
    [
        "empty.csv",
        "header.csv",
        "cut.csv.gz",
        "not.csv.gz",
        "latin.csv",
        "lacks.csv",
        "twice.csv",
        "bad.csv",
        "missing",
    ],
)
def test_a_source_that_cannot_be_read_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    path, message = cases(tmp_path)[name]
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        bring(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


def test_splits_that_the_schema_cannot_serve(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("y,c\n1,a\n")
    schema = Schema(features=(Categorical(name="c"),), labels=(Label(name="y"),))
    for kind, key in (("time", "timestamp"), ("user", "user_id")):
        with pytest.raises(ValueError, match=f'split "{kind}" needs a {key}'):
            bring(path, tmp_path / "out", schema=schema, split=SplitSpec(kind=kind))  # type: ignore[arg-type]


def test_a_killed_import_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    log(200_000).write_csv(tmp_path / "log.csv")
    (tmp_path / "schema.json").write_text(SCHEMA.to_json())
    out = tmp_path / "out"
    program = (
        "from pathlib import Path\n"
        "from fullrank.data.importing import import_dataset\n"
        "from fullrank.schema import Schema\n"
        f"import_dataset('csv', Path({str(tmp_path / 'log.csv')!r}), Path({str(out)!r}),"
        f"schema=Schema.read(Path({str(tmp_path / 'schema.json')!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    hidden = tmp_path / f".out.partial-{process.pid}"
    deadline = time.monotonic() + 30
    # Killed while it writes shards: the moment of most harm.
    while not (hidden / "train").exists():
        assert process.poll() is None, "the import ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert hidden.exists()
    assert sum(bring(tmp_path / "log.csv", out).rows(split) for split in ("train",)) == 200_000
    assert not hidden.exists()


def test_a_quote_that_is_not_closed_spoils_its_own_line_alone(tmp_path: Path) -> None:
    filler = [f"0,u{n},i,1,a,5\n" for n in range(30_000)]
    lines = ['1,5" screen,i,1,a,5\n', '1,"open,i,1,a,5\n', *filler, '1,"closed",i,1,a,5\n', '1,"open,i,1,a,5\n', GOOD]
    dataset = bring(write(tmp_path / "log.csv", lines), tmp_path / "out")
    reason = "quote is not closed, or field is too long"
    assert rejected(dataset) == [(3, "", reason, '1,"open,i,1,a,5'), (30_005, "", reason, '1,"open,i,1,a,5')]
    users = dataset.scan("train").collect()["__user_id"]
    assert users.to_list() == ['5" screen', *(f"u{n}" for n in range(30_000)), "closed", "u1"]


def test_stray_quotes_do_not_hold_up_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEADER + '1,5" screen,i,1,a,5\n' + GOOD * 40_000)
    blocks = list(lines.read_blocks(path, 1 << 16))
    assert b"".join(blocks) == path.read_bytes()
    # The odd quote makes the first cuts wait for its partner; the wait ends.
    assert max(len(block) for block in blocks) < 1 << 19


def kept_log() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "clicked": [1, 0, 0, 1],
            "user": ["u", "v", "u", "w"],
            "propensity": [0.25, None, 0.5, 1.0],
            "position": [1, 2, 3, 4],
            "vector": [[0.5, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]],
            "codes": [[1, 2, 3], [4, 5, 6], [7, 8, 9], [2**40, 0, 0]],
        }
    )


KEPT_SCHEMA = Schema(features=(Categorical(name="user"),), labels=(Label(name="clicked"),))
KEPT = ("propensity", "position", "vector", "codes")


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_kept_columns_are_in_the_dataset_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    monkeypatch.setattr(spool.Spool.__init__, "__defaults__", (memory_bytes,))
    kept_log().write_parquet(tmp_path / "log.parquet")
    none = SplitSpec(kind="none")
    dataset = import_dataset(
        "parquet", tmp_path / "log.parquet", tmp_path / "out", schema=KEPT_SCHEMA, split=none, keep=KEPT
    )
    assert dataset.extra == {
        "propensity": pl.Float32(), "position": pl.Int64(),
        "vector": pl.Array(pl.Float32, 2), "codes": pl.Array(pl.Int64, 3),
    }  # fmt: skip
    found = dataset.scan("train").select(KEPT).collect()
    assert np.isnan(found["propensity"][1])
    assert found.with_columns(pl.col("propensity").fill_nan(None)).to_dict(as_series=False) == kept_log().select(
        KEPT
    ).to_dict(as_series=False)


def test_kept_numbers_of_a_text_file_are_judged_over_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited.delimited_chunks, "__kwdefaults__", {"plain": frozenset(), "block_bytes": 16})
    path = tmp_path / "log.csv"
    path.write_text("clicked,user,a,b\n1,u,1,7\n0,v,2,8\n1,v,2.5,9\n0,w,no,9\n1,w,4,10\n")
    keep = ("a", "b")
    dataset = import_dataset(
        "csv", path, tmp_path / "out", schema=KEPT_SCHEMA, split=SplitSpec(kind="none"), keep=keep, max_bad=0.5
    )
    found = dataset.scan("train").collect()
    assert found["a"].to_list() == [1.0, 2.0, 2.5, 4.0]
    assert found["b"].to_list() == [7, 8, 9, 10]
    assert (found["a"].dtype, found["b"].dtype) == (pl.Float32, pl.Int64)
    assert rejected(dataset) == [(5, "a", "not a number", "no")]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("clicked", 'the column "clicked" to keep is a feature or a label'),
        ("nothing", 'column "nothing" is missing; the file has clicked'),
        ("__user_id", 'the column "__user_id" to keep has a name that begins with __'),
        ("short", 'line 2: column "short" is "1": a list of 2 numbers expected'),
    ],
)
def test_columns_that_cannot_be_kept_are_named(tmp_path: Path, keep: str, message: str) -> None:
    short = pl.Series("short", [[1, 2], [3], [4, 5], [6, 7]])
    kept_log().with_columns(short).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=message):
        import_dataset("parquet", tmp_path / "log.parquet", tmp_path / "out", schema=KEPT_SCHEMA, keep=(keep,))
