"""MovieLens ratings as implicit feedback."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import polars as pl

from fullrank.data.formats.delimited import delimited_chunks
from fullrank.data.formats.layout import Layout, text_layout
from fullrank.data.formats.lines import bare_name
from fullrank.data.formats.parquet import open_parquet, parquet_rows
from fullrank.data.histories import point_in_time
from fullrank.data.raw import (
    LINE_COLUMN,
    RawChunk,
    check_columns,
    no_rejected,
    only_rejected,
    raw_columns,
    rejected_table,
)
from fullrank.schema import Categorical, EventId, EventNumber, Feature, Keys, Label, MultiCategorical, Schema, Sequence

LIKED, DISLIKED = 4.0, 2.0
HISTORY = 20
CHUNK_ROWS = 131_072
_NAMES = {"userId": "user_id", "movieId": "item_id"}
_DAT = {
    "ratings": ("user_id", "item_id", "rating", "timestamp"),
    "users": ("user_id", "gender", "age", "occupation", "zip_code"),
    "movies": ("item_id", "title", "genres"),
}
_SHOWN = 200


class MovieLens:
    """A directory with the files of MovieLens 1M (`ratings.dat`, `users.dat`, `movies.dat`), of a later release
    (`ratings.csv`, `movies.csv`), or the same tables as Parquet (`ratings.parquet`, `movies.parquet` or
    `items.parquet`, `users.parquet`).

    A rating of 4 or more is a like (label 1), of 2 or less a dislike (label 0), anything between is left out. With
    times, each row carries the user's last 20 likes before it. A column `fold` of the ratings (1 to 5, from a published
    five-fold split) becomes the column `split`: folds 1 to 4 train, fold 5 validation for even user ids and test for
    odd ones; import with `--split given --split-column split`.
    """

    name = "movielens"

    def default_schema(self, path: Path) -> Schema:
        ratings, users, _ = _tables(path)
        features: list[Feature] = [Categorical(name="user_id", role="user"), Categorical(name="item_id", role="item")]
        if users is not None:
            features += [Categorical(name=name, role="user") for name in ("gender", "age", "occupation", "zip_code")]
        features += [
            Categorical(name="year", role="item"),
            MultiCategorical(name="genres", role="item", separator="|", max_length=6),
        ]
        timed = "timestamp" in ratings.names
        if timed:
            fields = (EventId(name="item", table="item_id"), EventNumber(name="age", transform="log1p"))
            features.append(Sequence(name="history", fields=fields, max_length=HISTORY))
        keys = Keys(user_id="user_id", item_id="item_id", timestamp="timestamp" if timed else None)
        return Schema(features=tuple(features), labels=(Label(name="label"),), keys=keys)

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        tables = _tables(path)
        wanted = {sequence.name: sequence.max_length for sequence in schema.sequences}
        if wanted and "timestamp" not in tables[0].names:
            raise ValueError(f"{path}: the ratings have no times, so there can be no sequence {', '.join(wanted)}")
        columns = [*raw_columns(schema), *extra]
        ratings, rejected = _ratings(tables[0])
        if rejected.height:
            yield only_rejected(columns, rejected)
        about: list[tuple[str, pl.DataFrame]] = []
        for key, table in (("user_id", tables[1]), ("item_id", tables[2])):
            if table is not None:
                frame, rejected = _about(table, key)
                about.append((key, frame))
                if rejected.height:
                    yield only_rejected(columns, rejected)
        likes = ratings.filter(pl.col("rating") >= LIKED)
        for first in range(0, ratings.height, CHUNK_ROWS):
            rows = ratings[first : first + CHUNK_ROWS]
            frame = rows.filter((pl.col("rating") >= LIKED) | (pl.col("rating") <= DISLIKED))
            frame = frame.with_columns(label=(pl.col("rating") >= LIKED).cast(pl.Int8))
            for name, length in wanted.items():
                frame = point_in_time(
                    frame,
                    likes,
                    user="user_id",
                    timestamp="timestamp",
                    fields={"item_id": f"{name}.item"},
                    max_length=length,
                    age=f"{name}.age",
                )
            for key, known in about:
                frame = frame.join(known, on=key, how="left", maintain_order="left")
            if "fold" in frame.columns:
                held = pl.when(pl.col("user_id") % 2 == 0).then(pl.lit("valid")).otherwise(pl.lit("test"))
                fold = pl.col("fold").cast(pl.Float64, strict=False)
                frame = frame.with_columns(split=pl.when(fold <= 4).then(pl.lit("train")).otherwise(held))
            yield RawChunk(frame)

    def parts(self, path: Path) -> dict[str, Path] | None:
        return None


class _Table(NamedTuple):
    """One of the files; without a layout it is Parquet."""

    file: Path
    layout: Layout | None
    names: tuple[str, ...]


def _tables(path: Path) -> tuple[_Table, _Table | None, _Table]:
    """Ratings, users (1M only) and items, whichever way they are stored."""
    if not path.is_dir():
        raise ValueError(f"{path}: expected the directory of a MovieLens release, with ratings.dat, .csv or .parquet")
    ratings, users, items = (_find(path, name) for name in ("ratings", "users", "movies"))
    items = items or _find(path, "items")
    if ratings is None:
        raise ValueError(f"{path}: there is no ratings.dat, ratings.csv or ratings.parquet")
    if items is None:
        raise ValueError(f"{path}: there is no movies.dat, movies.csv, movies.parquet or items.parquet")
    if users is None and ratings.file.suffix == ".dat":
        raise ValueError(f"{path / 'users.dat'} is missing from the MovieLens 1M directory")
    for table, columns in (
        (ratings, ("user_id", "item_id", "rating")),
        (users, ("user_id",)),
        (items, ("item_id", "title", "genres")),
    ):
        if table is not None:
            check_columns(table.file, columns, table.names)
    return ratings, users, items


def _find(path: Path, name: str) -> _Table | None:
    if (path / f"{name}.dat").is_file() and name in _DAT:
        layout = Layout(_DAT[name], "::", quote="", skipped=0, encoding="latin-1")
        return _Table(path / f"{name}.dat", layout, _DAT[name])
    if (path / f"{name}.parquet").is_file():
        columns = open_parquet(path / f"{name}.parquet").schema_arrow.names
        return _Table(path / f"{name}.parquet", None, tuple(_NAMES.get(column, column) for column in columns))
    for file in sorted(path.iterdir()):
        if bare_name(file) == f"{name}.csv":
            layout = text_layout(file)
            layout = replace(layout, names=tuple(_NAMES.get(column, column) for column in layout.names))
            return _Table(file, layout, layout.named)
    return None


def _chunks(table: _Table) -> Iterator[RawChunk]:
    """All columns of a file under their new names, with `__line`."""
    if table.layout is not None:
        names = frozenset(table.names)
        for chunk in delimited_chunks(table.file, table.layout, table.names, plain=names):
            yield RawChunk(chunk.numbered(), chunk.rejected)
    else:
        for chunk in parquet_rows(table.file):
            yield RawChunk(chunk.numbered().rename({old: new for old, new in _NAMES.items() if old in chunk.frame}))


def _ratings(table: _Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Good ratings with numbers, and all bad rows."""
    good, bad = [], [no_rejected()]
    for chunk in _chunks(table):
        frame = chunk.frame
        bad.append(chunk.rejected)
        for name in ("user_id", "item_id", "rating", *(("timestamp",) if "timestamp" in table.names else ())):
            frame, rejected = _numbers(frame, name, whole=name != "rating")
            bad.append(rejected)
        good.append(frame)
    return pl.concat(good), pl.concat(bad)


def _about(table: _Table, key: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What is known of each user or item, once each, and the bad rows.

    Raises:
        ValueError: if the file is in another encoding.
    """
    good, bad = [], [no_rejected()]
    where = f" ({table.file.name})"
    for chunk in _chunks(table):
        foreign = chunk.rejected.filter(pl.col("reason") == "not UTF-8")
        if foreign.height:
            raise ValueError(f"{table.file} line {foreign['line'][0]}: not UTF-8: {foreign['value'][0][:60]}")
        frame, rejected = _numbers(chunk.frame, key, whole=True)
        good.append(frame.drop(LINE_COLUMN))
        bad += [each.with_columns((pl.col("column") + where).str.strip_chars()) for each in (chunk.rejected, rejected)]
    frame = pl.concat(good).unique(key, keep="first", maintain_order=True)
    if key == "item_id":
        year = pl.col("title").str.extract(r"\((\d{4})\)\s*$").alias("year")
        frame = frame.select(key, year, "genres")
    return frame, pl.concat(bad)


def _numbers(frame: pl.DataFrame, name: str, *, whole: bool) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows in which a column is a number, with that number; and the others."""
    column = frame[name]
    numbers = column.cast(pl.Float64, strict=False)
    numbers = numbers.set(~numbers.is_finite().fill_null(False), None)
    if whole:
        integers = column.cast(pl.Int64, strict=False)
        rounded = numbers.set((numbers != numbers.floor()).fill_null(False), None).cast(pl.Int64, strict=False)
        numbers = integers.zip_with(integers.is_not_null(), rounded)
    wrong = numbers.is_null()
    expected = "not an integer" if whole else "not a number"
    rows = [
        (line, name, "missing" if value in (None, "") else expected, str(value or "")[:_SHOWN])
        for line, value in frame.filter(wrong).select(LINE_COLUMN, name).iter_rows()
    ]
    return frame.with_columns(numbers.alias(name)).filter(~wrong), rejected_table(rows)
