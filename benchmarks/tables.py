"""Make the two CTR comparison tables (CSV) from the shared data folder.

    python benchmarks/tables.py --data DIR_WITH_movielens-1m_AND_globo-clicks --out tables

ml1m_ctr   MovieLens-1M as binary CTR: rating 4-5 -> 1, rating 1-2 -> 0, rating 3 dropped (the AutoInt convention).
           fold 1-4 of the published 5-fold split = train; fold 5 = valid (even user_id) and test (odd user_id).
globo_seq  Globo.com news clicks of 2017-10-09 and -10, history = the user's last 20 clicked articles before the click;
           users split 8:1:1 by user_id % 10 (no user feature, so the test asks for item-to-item taste, not memory);
           one negative per click: another article clicked in the preceding 60 minutes (so negatives follow current
           popularity), never the positive itself. Seeded, deterministic.
Needs polars and numpy only.
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl

HISTORY = 20


def ml1m(source: Path, out: Path) -> None:
    ratings = pl.read_parquet(source / "ratings.parquet").with_row_index("row")
    users = pl.read_parquet(source / "users.parquet")
    items = pl.read_parquet(source / "items.parquet").select(
        "item_id",
        pl.col("title").str.extract(r"\((\d{4})\)\s*$").fill_null("").alias("year"),
        pl.col("genres").str.replace_all("|", "^", literal=True),
    )
    table = (
        ratings.filter(pl.col("rating") != 3)
        .with_columns((pl.col("rating") > 3).cast(pl.Int8).alias("label"))
        .join(users, on="user_id", how="left")
        .join(items, on="item_id", how="left")
        .sort("row")
    )
    columns = ["label", "user_id", "item_id", "gender", "age", "occupation", "zip_code", "year", "genres"]
    parts = {
        "train": pl.col("fold") <= 4,
        "valid": (pl.col("fold") == 5) & (pl.col("user_id") % 2 == 0),
        "test": (pl.col("fold") == 5) & (pl.col("user_id") % 2 == 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rule in parts.items():
        part = table.filter(rule)
        if name == "train":  # ratings.dat is grouped by user: shuffle once so that sequential readers are fair too
            part = part.sample(fraction=1.0, shuffle=True, seed=2024)
        part.select(columns).write_csv(out / f"{name}.csv")
        print("ml1m_ctr", name, part.height, "positive rate", round(part["label"].mean(), 4))


def globo(source: Path, out: Path) -> None:
    clicks = (
        pl.read_parquet(source / "clicks.parquet")
        .with_columns(pl.from_epoch("click_timestamp", time_unit="ms").alias("time"))
        .filter(pl.col("time") < pl.datetime(2017, 10, 11))
        .sort("user_id", "click_timestamp", maintain_order=True)
    )
    user = clicks["user_id"].to_numpy()
    article = clicks["click_article_id"].to_numpy()
    first = np.r_[True, user[1:] != user[:-1]]
    start = np.maximum.accumulate(np.where(first, np.arange(len(user)), 0))
    low = np.maximum(start, np.arange(len(user)) - HISTORY)
    when = clicks["click_timestamp"].to_numpy()
    order = np.argsort(when, kind="stable")
    times, articles = when[order], article[order]
    day = clicks["time"].dt.date().to_numpy().astype("datetime64[D]")
    keep = (~first) & (day >= np.datetime64("2017-10-09"))
    rows = np.flatnonzero(keep)
    rng = np.random.default_rng(2024)
    hi = np.searchsorted(times, when[rows], side="left")
    lo = np.searchsorted(times, when[rows] - 3_600_000, side="left")
    ok = hi - lo > 100
    rows, lo, hi = rows[ok], lo[ok], hi[ok]
    negative = articles[lo + (rng.random(len(rows)) * (hi - lo)).astype(np.int64)]
    for _ in range(20):
        clash = negative == article[rows]
        if not clash.any():
            break
        negative[clash] = articles[lo[clash] + (rng.random(clash.sum()) * (hi - lo)[clash]).astype(np.int64)]
    good = negative != article[rows]
    rows, negative = rows[good], negative[good]
    text = article.astype(str)
    history = ["^".join(text[a:b]) for a, b in zip(low[rows], rows, strict=False)]
    base = (
        clicks[rows]
        .select(
            "user_id",
            pl.col("time").dt.hour().alias("hour"),
            pl.col("click_environment").alias("environment"),
            pl.col("click_deviceGroup").alias("device"),
            pl.col("click_os").alias("os"),
            pl.col("click_country").alias("country"),
            pl.col("click_region").alias("region"),
            pl.col("click_referrer_type").alias("referrer"),
            "click_timestamp",
        )
        .with_columns(pl.Series("click_history", history))
    )
    table = pl.concat(
        [
            base.with_columns(pl.lit(1, pl.Int8).alias("label"), pl.Series("item_id", article[rows])),
            base.with_columns(pl.lit(0, pl.Int8).alias("label"), pl.Series("item_id", negative)),
        ]
    ).sort("click_timestamp", maintain_order=True)
    columns = [
        "label",
        "item_id",
        "click_history",
        "hour",
        "environment",
        "device",
        "os",
        "country",
        "region",
        "referrer",
    ]
    out.mkdir(parents=True, exist_ok=True)
    fold = pl.col("user_id") % 10
    parts = {
        "train": table.filter(fold > 1).sample(fraction=1.0, shuffle=True, seed=2024),
        "valid": table.filter(fold == 0),
        "test": table.filter(fold == 1),
    }
    for name, part in parts.items():
        part.select(columns).write_csv(out / f"{name}.csv")
        print(
            "globo_seq",
            name,
            part.height,
            "positive rate",
            round(part["label"].mean(), 4),
            "mean history",
            round((part["click_history"].str.count_matches(r"\^") + 1).mean(), 2),
            "items",
            part["item_id"].n_unique(),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ml1m(args.data / "movielens-1m", args.out / "ml1m_ctr")
    globo(args.data / "globo-clicks", args.out / "globo_seq")
