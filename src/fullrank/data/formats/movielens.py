"""MovieLens ratings as implicit feedback."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import polars as pl

from fullrank.data.histories import point_in_time
from fullrank.data.raw import RawChunk
from fullrank.schema import Categorical, EventId, EventNumber, Feature, Keys, Label, MultiCategorical, Schema, Sequence

LIKED, DISLIKED = 4.0, 2.0
HISTORY = 20
CHUNK_ROWS = 131_072
_NAMES = {"userId": "user_id", "movieId": "item_id"}


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
        timed = "timestamp" in ratings.columns
        if timed:
            fields = (EventId(name="item", table="item_id"), EventNumber(name="age", transform="log1p"))
            features.append(Sequence(name="history", fields=fields, max_length=HISTORY))
        keys = Keys(user_id="user_id", item_id="item_id", timestamp="timestamp" if timed else None)
        return Schema(features=tuple(features), labels=(Label(name="label"),), keys=keys)

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        ratings, users, items = _tables(path)
        wanted = {sequence.name: sequence.max_length for sequence in schema.sequences}
        if wanted and "timestamp" not in ratings.columns:
            raise ValueError(f"{path}: the ratings have no times, so there can be no sequence {', '.join(wanted)}")
        likes = ratings.filter(pl.col("rating") >= LIKED)
        for first in range(0, ratings.height, CHUNK_ROWS):
            rows = ratings[first : first + CHUNK_ROWS].with_columns(__line=pl.int_range(pl.len()) + first + 1)
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
            if users is not None:
                frame = frame.join(users, on="user_id", how="left", maintain_order="left")
            frame = frame.join(items, on="item_id", how="left", maintain_order="left")
            if "fold" in frame.columns:
                held = pl.when(pl.col("user_id") % 2 == 0).then(pl.lit("valid")).otherwise(pl.lit("test"))
                frame = frame.with_columns(split=pl.when(pl.col("fold") <= 4).then(pl.lit("train")).otherwise(held))
            yield RawChunk(frame, first_line=first + 1)

    def parts(self, path: Path) -> dict[str, Path] | None:
        return None


def _tables(path: Path) -> tuple[pl.DataFrame, pl.DataFrame | None, pl.DataFrame]:
    """Ratings, users (1M only) and items, whichever way they are stored."""
    if not path.is_dir():
        raise ValueError(f"{path}: expected the directory of a MovieLens release, with ratings.dat, .csv or .parquet")
    if (path / "ratings.dat").is_file():
        ratings = _dat(path / "ratings.dat", ["user_id", "item_id", "rating", "timestamp"])
        users: pl.DataFrame | None = _dat(path / "users.dat", ["user_id", "gender", "age", "occupation", "zip_code"])
        items = _dat(path / "movies.dat", ["item_id", "title", "genres"])
    else:
        found = _read(path, "ratings")
        if found is None:
            raise ValueError(f"{path}: there is no ratings.dat, ratings.csv or ratings.parquet")
        movies = _read(path, "movies")
        if movies is None:
            movies = _read(path, "items")
        if movies is None:
            raise ValueError(f"{path}: there is no movies.csv, movies.parquet or items.parquet beside the ratings")
        ratings, users, items = found, _read(path, "users"), movies
    ratings = ratings.with_columns(pl.col("user_id", "item_id").cast(pl.Int64), pl.col("rating").cast(pl.Float64))
    if "timestamp" in ratings.columns:
        ratings = ratings.with_columns(pl.col("timestamp").cast(pl.Int64))
    items = items.select(
        pl.col("item_id").cast(pl.Int64),
        pl.col("title").str.extract(r"\((\d{4})\)\s*$").alias("year"),
        pl.col("genres"),
    )
    if users is not None:
        users = users.with_columns(pl.col("user_id").cast(pl.Int64))
    return ratings, users, items


def _read(path: Path, name: str) -> pl.DataFrame | None:
    if (path / f"{name}.parquet").is_file():
        frame = pl.read_parquet(path / f"{name}.parquet")
    elif (path / f"{name}.csv").is_file():
        frame = pl.read_csv(path / f"{name}.csv")
    else:
        return None
    return frame.rename({old: new for old, new in _NAMES.items() if old in frame.columns})


def _dat(file: Path, names: list[str]) -> pl.DataFrame:
    """A `::`-separated file in Latin-1, without header."""
    if not file.is_file():
        raise ValueError(f"{file} is missing from the MovieLens 1M directory")
    lines = pl.Series(file.read_text(encoding="latin-1").splitlines())
    parts = lines.str.split_exact("::", len(names) - 1).struct.rename_fields(names).struct.unnest()
    empty = parts.select(pl.all_horizontal(pl.all().is_not_null()).not_().arg_true()).to_series()
    if empty.len():
        raise ValueError(f"{file} line {empty[0] + 1}: expected {len(names)} fields separated by ::")
    return parts
