"""Make the CTR comparison tables (CSV) from a folder of the public datasets.

    python -m benchmarks.tables --data DIR_WITH_movielens-1m_AND_globo-clicks --out tables
    python -m benchmarks.tables --data DIR_WITH_amazon-beauty --out tables --tables amazon_beauty

ml1m_ctr   MovieLens-1M as binary CTR: rating 4-5 -> 1, rating 1-2 -> 0, rating 3 dropped (the AutoInt convention).
           fold 1-4 of the published 5-fold split = train; fold 5 = valid (even user_id) and test (odd user_id).
globo_seq  Globo.com news clicks of 2017-10-09 and -10, history = the user's last 20 clicked articles before the click;
           users split 8:1:1 by user_id % 10 (no user feature, so the test asks for item-to-item taste, not memory);
           one negative per click: another article clicked in the preceding 60 minutes (so negatives follow current
           popularity), never the positive itself. Seeded, deterministic.
globo_time the same rows in order of time: the first 80 % train, the next 10 % valid, the last 10 % test; with the
           seconds between each event of the history and the click (click_history.age).
amazon_*   beauty, toys (S3-Rec's release) and grocery (ReChorus'), leave-last-out: a user's last item is test, the one
           before valid, every earlier one with a history train. Per positive 1 (train) or 4 negatives, other users'
           training items drawn by how often they occur, none that the user has. History = the last 20 items, with
           the category of each: grocery's own, elsewhere the rarest attribute. Grocery has ages too.
movielens_latest  the 100,004 ratings of MovieLens' latest-small in order of time, as one file: rating 4-5 -> 1, lower
           -> 0; year and genres of the film, a number for each row. Histories and counters are derived at import.
census     Census-Income (KDD), two tasks: income above 50,000, and never married. The published train and test parts;
           20,000 random rows of train are valid.
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


def globo(source: Path) -> pl.DataFrame:
    """Rows of both splits, in order of time."""
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
    history = _joined(article, low[rows], rows)
    ages = _ages(when, low[rows], rows, 1000)
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
        .with_columns(pl.Series("click_history", history), pl.Series("click_age", ages))
    )
    return pl.concat(
        [
            base.with_columns(pl.lit(1, pl.Int8).alias("label"), pl.Series("item_id", article[rows])),
            base.with_columns(pl.lit(0, pl.Int8).alias("label"), pl.Series("item_id", negative)),
        ]
    ).sort("click_timestamp", maintain_order=True)


GLOBO = ["label", "item_id", "click_history", "hour", "environment", "device", "os", "country", "region", "referrer"]


def globo_seq(source: Path, out: Path) -> None:
    table, fold = globo(source), pl.col("user_id") % 10
    parts = {
        "train": table.filter(fold > 1).sample(fraction=1.0, shuffle=True, seed=2024),
        "valid": table.filter(fold == 0),
        "test": table.filter(fold == 1),
    }
    _write({name: part.select(*GLOBO, "user_id") for name, part in parts.items()}, out)


def globo_time(source: Path, out: Path) -> None:
    table = globo(source)
    ages = {"click_history": "click_history.item", "click_age": "click_history.age"}
    columns = [*(ages.get(name, name) for name in GLOBO), "click_history.age", "user_id"]
    # A click and its negative are neighbours of one time: cut between times.
    first, second = (table["click_timestamp"][int(share * table.height)] for share in (0.8, 0.9))
    time = pl.col("click_timestamp")
    parts = {
        "train": table.filter(time < first).sample(fraction=1.0, shuffle=True, seed=2024),
        "valid": table.filter((time >= first) & (time < second)),
        "test": table.filter(time >= second),
    }
    _write({name: part.rename(ages).select(*columns) for name, part in parts.items()}, out)


def amazon(source: Path, out: Path) -> None:
    if (source / "interactions.parquet").exists():
        events = pl.read_parquet(source / "interactions.parquet").sort("user_id", "time", maintain_order=True)
        items = pl.read_parquet(source / "items.parquet").select("item_id", category="i_category")
    else:
        events = pl.read_parquet(source / "sequences.parquet").explode("item_ids").rename({"item_ids": "item_id"})
        attributes = pl.read_parquet(source / "item_attributes.parquet").explode("attributes")
        counted = attributes.with_columns(count=pl.len().over("attributes"))
        rarest = counted.sort("item_id", "count", "attributes").group_by("item_id", maintain_order=True).first()
        items = rarest.select("item_id", category="attributes")
    of_item = np.zeros(int(max(items["item_id"].max(), events["item_id"].max())) + 1, dtype=np.int64)
    of_item[items["item_id"].to_numpy()] = items["category"].to_numpy()
    user, item = events["user_id"].to_numpy(), events["item_id"].to_numpy()
    count = np.arange(len(user))
    first = np.r_[True, user[1:] != user[:-1]]
    start = np.maximum.accumulate(np.where(first, count, 0))
    left = np.bincount(np.cumsum(first) - 1)[np.cumsum(first) - 1] - 1 - (count - start)  # items of the user after it
    low = np.maximum(start, count - HISTORY)
    rng = np.random.default_rng(2024)
    seen = set(zip(user.tolist(), item.tolist(), strict=True))
    popular = item[left > 1]
    parts = {}
    for name, rule, negatives in (("train", left > 1, 1), ("valid", left == 1, 4), ("test", left == 0, 4)):
        rows = np.flatnonzero(rule & ~first)
        frame = {
            "label": np.ones(len(rows), np.int8), "item_id": item[rows], "row": rows,
            "history.item": _joined(item, low[rows], rows),
            "history.category": _joined(of_item[item], low[rows], rows),
        }  # fmt: skip
        if "time" in events.columns:
            frame["history.age"] = _ages(events["time"].to_numpy(), low[rows], rows)
        positive = pl.DataFrame(frame)
        drawn = []
        for _ in range(negatives):
            other = popular[rng.integers(0, len(popular), len(rows))]
            while (clash := np.array([pair in seen for pair in zip(user[rows], other, strict=True)])).any():
                other[clash] = popular[rng.integers(0, len(popular), clash.sum())]
            drawn.append(positive.with_columns(pl.lit(0, pl.Int8).alias("label"), pl.Series("item_id", other)))
        table = pl.concat([positive, *drawn])
        table = table.with_columns(
            pl.Series("user_id", user[table["row"].to_numpy()]),
            pl.Series("category", of_item[table["item_id"].to_numpy()]),
        )
        parts[name] = table.sample(fraction=1.0, shuffle=True, seed=2024) if name == "train" else table.sort("row")
    ages = ["history.age"] if "time" in events.columns else []
    columns = ["label", "item_id", "category", "history.item", "history.category", *ages, "user_id"]
    _write({name: part.select(columns) for name, part in parts.items()}, out)


def movielens_latest(source: Path, out: Path) -> None:
    movies = pl.read_parquet(source / "movies.parquet").select(
        "movieId",
        pl.col("title").str.extract(r"\((\d{4})\)\s*$").fill_null("").alias("year"),
        pl.col("genres").str.replace_all("|", "^", literal=True),
    )
    ratings = pl.read_parquet(source / "ratings.parquet").sort("timestamp", "userId", "movieId", maintain_order=True)
    table = ratings.with_row_index("request_id").join(movies, on="movieId", how="left", maintain_order="left")
    table = table.with_columns((pl.col("rating") >= 4).cast(pl.Int8).alias("label"))
    table = table.rename({"userId": "user_id", "movieId": "item_id"}).drop("rating")
    out.mkdir(parents=True, exist_ok=True)
    table.write_csv(out / "ratings.csv")
    print(out.name, table.height, "rows, positive", round(table["label"].mean(), 4))


def census(source: Path, out: Path) -> None:
    train, test = (pl.read_parquet(source / f"{part}.parquet") for part in ("train", "test"))
    train = train.sample(fraction=1.0, shuffle=True, seed=0)
    parts = {"train": train[20_000:], "valid": train[:20_000], "test": test}
    out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        labelled = part.with_columns(
            income=pl.col("income_50k").str.starts_with("50000").cast(pl.Int8),
            never_married=(pl.col("marital_stat") == "Never married").cast(pl.Int8),
        )
        labelled.drop("income_50k", "marital_stat", "instance_weight").write_csv(out / f"{name}.csv")
        print("census", name, part.height, "rows, positive", *labelled.select("income", "never_married").mean().row(0))


def _joined(values: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> list[str]:
    text = values.astype(str)
    return ["^".join(text[a:b]) for a, b in zip(begins, ends, strict=True)]


def _ages(when: np.ndarray, begins: np.ndarray, ends: np.ndarray, unit: int = 1) -> list[str]:
    """Whole seconds between each event of a history and the row that follows it; `unit` ticks of `when` a second."""
    return ["^".join(map(str, (when[b] - when[a:b]) // unit)) for a, b in zip(begins, ends, strict=True)]


def _write(parts: dict[str, pl.DataFrame], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        part.write_csv(out / f"{name}.csv")
        history = next(column for column in part.columns if "history" in column)
        history = (part[history].str.count_matches(r"\^") + 1).mean()
        facts = f"{part.height} rows, positive {part['label'].mean():.4f}, mean history {history:.2f}"
        print(out.name, name, facts, part["item_id"].n_unique(), "items")


# table -> how it is made, from which folder
TABLES = {
    "ml1m_ctr": (ml1m, "movielens-1m"),
    "movielens_latest": (movielens_latest, "movielens-latest-small"),
    "census": (census, "census-income-kdd"),
    "globo_seq": (globo_seq, "globo-clicks"),
    "globo_time": (globo_time, "globo-clicks"),
} | {f"amazon_{name}": (amazon, f"amazon-{name}") for name in ("beauty", "toys", "grocery")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["ml1m_ctr", "globo_seq"])
    args = parser.parse_args()
    for name in args.tables:
        make, folder = TABLES[name]
        make(args.data / folder, args.out / name)
