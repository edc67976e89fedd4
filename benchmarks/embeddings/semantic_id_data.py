"""Logs with cold items for the benchmark of Semantic IDs: a planted stream of ads, and MovieLens.

Not a program: `benchmarks.embeddings.semantic_id` measures on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

DAYS = 5


@dataclass(frozen=True)
class Log:
    """Rows of `user`, `item` (both 0, 1, ..), `click`, `part`, and perhaps `time`, and the content of each item."""

    name: str
    frame: pl.DataFrame
    content_ID: Any
    history: bool = False

    @property
    def items(self) -> int:
        return len(self.content_ID)


class World(NamedTuple):
    """Sizes of the planted stream."""

    items: int = 20_000
    users: int = 2000
    rows_a_day: int = 50_000
    branches: tuple[int, ...] = (12, 12, 12)


def stream(seed: int, data: Path, world: World = World()) -> Log:
    """Ads that are born and retired over six days; whether a user clicks depends on the ad's place in a tree of topics,
    which its content shows, and on the ad itself, which it does not."""
    random = np.random.default_rng(seed)
    items = world.items
    place, content, taste = np.zeros(items, dtype=np.int64), np.zeros((items, 32)), np.zeros((items, 9))
    for depth, branches in enumerate(world.branches):
        place = place * branches + random.integers(branches, size=items)
        nodes = int(np.prod(world.branches[: depth + 1]))
        content += (0.65**depth * random.normal(size=(nodes, 32)))[place]
        taste += (0.65**depth * random.normal(size=(nodes, 9)))[place]
    content += 0.15 * random.normal(size=content.shape)
    taste += 0.3 * random.normal(size=taste.shape)
    born = random.uniform(-4, DAYS + 1, size=items)
    dies = born + random.exponential(3, size=items)
    weight = random.pareto(1.5, size=items) + 0.05
    user_taste = random.normal(size=(world.users, 8)) * 0.35
    frames = []
    for day in range(DAYS + 1):
        alive = np.flatnonzero((born < day + 1) & (dies > day))
        item = random.choice(alive, size=world.rows_a_day, p=weight[alive] / weight[alive].sum())
        user = random.integers(world.users, size=world.rows_a_day)
        logit = -1.5 + 0.8 * taste[item, 8] + (user_taste[user] * taste[item, :8]).sum(1)
        click = random.random(world.rows_a_day) < 1 / (1 + np.exp(-logit))
        part = "test" if day == DAYS else "train"
        rows = {"user": user, "item": item, "click": click.astype(np.int8)}
        frames.append(pl.DataFrame(rows).with_columns(part=pl.lit(part)))
    return Log("stream", pl.concat(frames), content.astype(np.float32))


def numbered(frame: pl.DataFrame, column: str, name: str) -> pl.DataFrame:
    return frame.with_columns(pl.col(column).rank("dense").cast(pl.Int64).sub(1).alias(name))


def movielens_latest(seed: int, data: Path) -> Log:
    """Ratings above 3.5 or not, the last fifth in time to be predicted; most users and a fifth of the rows' items are
    new there, so that the history speaks for the user."""
    ratings = pl.read_parquet(data / "movielens-latest-small" / "ratings.parquet").sort(
        "timestamp", maintain_order=True
    )
    ratings = numbered(numbered(ratings, "userId", "user"), "movieId", "item")
    movies = pl.read_parquet(data / "movielens-latest-small" / "movies.parquet")
    items = ratings.select("movieId", "item").unique().join(movies, on="movieId", how="left").sort("item")
    cut = int(0.8 * ratings.height)
    frame = ratings.select(
        "user",
        "item",
        (pl.col("rating") >= 4).cast(pl.Int8).alias("click"),
        pl.col("timestamp").alias("time"),
        pl.when(pl.int_range(pl.len()) < cut).then(pl.lit("train")).otherwise(pl.lit("test")).alias("part"),
    )
    return Log("movielens-latest", frame, items.select("genres"), history=True)


def movielens_1m(seed: int, data: Path) -> Log:
    """250,000 ratings of 4 and 5 against 1 and 2; a fifth of the rows is to be predicted, and every row of a fifth of
    the items: this file has no times, so the cold items are chosen at random."""
    ratings = pl.read_parquet(data / "movielens-1m" / "ratings.parquet").filter(pl.col("rating") != 3)
    ratings = ratings.sample(250_000, seed=seed)
    ratings = numbered(numbered(ratings, "user_id", "user"), "item_id", "item")
    items = (
        ratings.select("item_id", "item")
        .unique()
        .join(pl.read_parquet(data / "movielens-1m" / "items.parquet"), on="item_id")
    )
    random = np.random.default_rng(seed)
    cold = random.random(int(ratings["item"].max()) + 1) < 0.2
    test = (random.random(ratings.height) < 0.2) | cold[ratings["item"].to_numpy()]
    frame = ratings.select(
        "user",
        "item",
        (pl.col("rating") >= 4).cast(pl.Int8).alias("click"),
        pl.Series("part", np.where(test, "test", "train")),
    )
    return Log("movielens-1m", frame, items.sort("item").select("genres"))


LOGS = {"stream": stream, "latest": movielens_latest, "1m": movielens_1m}
