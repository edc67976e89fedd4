"""Complementary partitions against hashing and plain tables, at equal compression.

    python -m benchmarks.embeddings.compositional
    python -m benchmarks.embeddings.compositional --data DIR_WITH_movielens-1m

planted  8 fields of 20,000 ids each, their popularity log-uniform and their numbers shuffled; a click's log-odds are a
         sum of an effect of each id and of the products of hidden vectors of each pair. 400,000 rows to learn from,
         60,000 to test on. Data, start and order of batches are a seed's own and shared by all kinds of tables.
movielens  MovieLens-1M: ratings of 4 and 5 against 1 and 2, four folds to learn from and the fifth to test on. The
         user's, the film's and the zip code's table are compressed, numbered by popularity; a seed is a start and an
         order of batches. Each kind has the learning rate that is best for it on an eighth of the rows to learn from,
         by the first seed.

One epoch of DCN-V2, all by Adagrad. No setting was chosen by the test rows. `minus_hash` is the mean over seeds of the
difference of the logloss to that of hashing with as many collisions, below 0 if better; `error` its standard error.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from benchmarks.machine import table, write
from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer
from fullrank.metrics import auc, log_loss
from fullrank.models import Ranker, RankerSpec
from fullrank.schema import Categorical, Label, Schema

FIELDS, IDS, TRAIN, TEST = 8, 20_000, 400_000, 60_000
WIDTH = 16
BATCH, RATE = 512, 0.05  # of the planted task
REAL_BATCH, REAL_RATES = 2048, (0.05, 0.01)
Data = tuple[dict[str, int], Tensor, Tensor, int]
KINDS: dict[str, dict[str, Any]] = {"full": {"kind": "full"}}
for c in (4, 60):
    product = {"kind": "quotient_remainder", "collisions": c}
    KINDS |= {
        f"hash, c = {c}": {"kind": "hash", "collisions": c},
        f"mult, c = {c}": product,
        f"mult, uniform(σ√3, 1), c = {c}": product,
        f"mult, quotient major, c = {c}": {**product, "major": "quotient"},
        f"add, c = {c}": {**product, "operation": "add"},
        f"concat, c = {c}": {**product, "operation": "concat"},
        f"path, h = 16, c = {c}": {**product, "operation": "path", "path_hidden": 16},
    }
KINDS["mult, 3 digits"] = {"kind": "quotient_remainder", "num_partitions": 3}
KINDS["mult, Chinese remainders"] = {"kind": "chinese_remainder", "num_partitions": 2}
REAL = (
    "full",
    "hash, c = 4",
    "mult, c = 4",
    "hash, c = 60",
    "mult, c = 60",
    "mult, quotient major, c = 60",
)


def planted(seed: int) -> Data:
    """Rows of each table, ids_NF, labels_N, and the number of rows to learn from."""
    rng = np.random.default_rng(seed)
    rank = np.exp(rng.random((TRAIN + TEST, FIELDS)) * math.log(IDS)).astype(np.int64)
    ids = np.stack([rng.permutation(IDS)[rank[:, field] - 1] for field in range(FIELDS)], 1)
    effect = rng.normal(0, 0.35, (FIELDS, IDS))
    hidden = rng.normal(0, 0.35, (FIELDS, IDS, 4))
    fields = np.arange(FIELDS)
    vectors = hidden[fields, ids]
    pairs = 0.5 * (vectors.sum(1) ** 2 - (vectors**2).sum(1)).sum(1)
    logits = -0.95 + effect[fields, ids].sum(1) + 0.6 * pairs
    labels = rng.random(len(ids)) < 1 / (1 + np.exp(-logits))
    rows = {f"field{field}": IDS for field in range(FIELDS)}
    return rows, torch.from_numpy(ids), torch.from_numpy(labels.astype(np.float32)), TRAIN


def movielens(data: Path) -> Data:
    """Like `planted`. Ids are numbered by how often the rows to learn from have them; those that these have fewer than
    five times are the unknown one, which so learns what it will be asked for."""
    ratings = pl.read_parquet(data / "movielens-1m" / "ratings.parquet").filter(pl.col("rating") != 3)
    users = pl.read_parquet(data / "movielens-1m" / "users.parquet")
    log = ratings.join(users, on="user_id", how="left", maintain_order="left")
    train = log.filter(pl.col("fold") <= 4).sample(fraction=1.0, shuffle=True, seed=2024)
    log = pl.concat([train, log.filter(pl.col("fold") == 5)])
    columns, rows = [], {}
    for name in ("user_id", "item_id", "zip_code", "gender", "age", "occupation"):
        known = train[name].value_counts(sort=True).filter(pl.col("count") >= 5)[name]
        rows[name] = len(known) + 2
        number = log[name].replace_strict(known, pl.int_range(2, len(known) + 2, eager=True), default=1)
        columns.append(torch.from_numpy(number.cast(pl.Int64).to_numpy().copy()))
    labels_N = torch.from_numpy((log["rating"] > 3).cast(pl.Float32).to_numpy().copy())
    return rows, torch.stack(columns, 1), labels_N, train.height


def batch_of(ids_BF: Tensor, labels_B: Tensor) -> Batch:
    size = len(ids_BF)
    return Batch(
        numeric_BN=torch.zeros(size, 0), ids_BF=ids_BF,
        jagged_keys=(), jagged_values=torch.zeros(0, dtype=torch.int64),
        jagged_lengths_KB=torch.zeros(0, size, dtype=torch.int64),
        event_keys=(), event_values=torch.zeros(0), event_lengths_EB=torch.zeros(0, size, dtype=torch.int64),
        labels_BT=labels_B[:, None],
    )  # fmt: skip


@torch.no_grad()
def start_positive(collection: EmbeddingCollection) -> None:
    """What a call `uniform_(weight, √(1/n))` does where it was to be the range: it is the lower end only."""
    state = collection.state_dict()
    for name, kind in collection.kinds.items():
        for part in kind.parts:
            state[f"tables.{name}.{part.name}.weight"].uniform_(math.sqrt(1 / kind.rows), 1)


def trained(
    schema: Schema,
    kinds: dict[str, Any],
    positive: bool,
    ids_NF: Tensor,
    labels_N: Tensor,
    seed: int,
    rate: float,
    size: int,
) -> Ranker:
    torch.manual_seed(seed)
    largest = max(schema.tables().values())
    config = {"hidden": [64], "embedding_dim": WIDTH, "embedding_init": (3 * largest) ** -0.5, "tables": kinds}
    model = RankerSpec.of({"name": "dcn_v2", **config}).build(schema)
    for module in model.modules():
        if isinstance(module, EmbeddingCollection):
            if positive:
                start_positive(module)
            module.set_optimizer(EmbeddingOptimizer(kind="adagrad", learning_rate=rate))
    # Fused tables have no gradient, so this moves only what else there is.
    descent = torch.optim.Adagrad(model.parameters(), lr=rate)
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    model.start_at_base_rate(batch_of(ids_NF[order[:10_000]], labels_N[order[:10_000]]))
    model.train()
    for rows in order.split(size):
        batch = batch_of(ids_NF[rows], labels_N[rows])
        model.loss(model(batch), batch).backward()
        descent.step()
        descent.zero_grad()
    return model.eval()


def one(name: str, data: Data, seed: int, compress: list[str], rate: float = RATE, size: int = BATCH) -> dict[str, Any]:
    rows, ids_NF, labels_N, train = data
    features = tuple(Categorical(name=field, num_embeddings=size) for field, size in rows.items())
    schema = Schema(features=features, labels=(Label(name="y"),))
    begin = time.perf_counter()
    kinds = dict.fromkeys(compress, KINDS[name])
    model = trained(schema, kinds, "uniform" in name, ids_NF[:train], labels_N[:train], seed, rate, size)
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        tests = zip(ids_NF[train:].split(8192), labels_N[train:].split(8192), strict=True)
        logits = torch.cat([model(batch_of(ids, labels)).logits_BT[:, 0] for ids, labels in tests])
    return {
        "tables": name, "seed": seed, "learning_rate": rate, "numbers": model.num_parameters().embedding,
        "logloss": log_loss(logits, labels_N[train:]), "auc": auc(logits, labels_N[train:]), "seconds": seconds,
    }  # fmt: skip


def best_rate(name: str, data: Data, seed: int, compress: list[str]) -> float:
    """The learning rate by the last eighth of the rows to learn from."""
    rows, ids_NF, labels_N, train = data
    held_out = (rows, ids_NF[:train], labels_N[:train], train * 7 // 8)
    return min(REAL_RATES, key=lambda rate: one(name, held_out, seed, compress, rate, REAL_BATCH)["logloss"])


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    of = {
        name: {r["seed"]: r for r in runs if r["tables"] == name} for name in dict.fromkeys(r["tables"] for r in runs)
    }
    summary = []
    for name, mine in of.items():
        row = {"tables": name, "numbers": next(iter(mine.values()))["numbers"]}
        row["learning_rate"] = next(iter(mine.values()))["learning_rate"]
        row |= {key: statistics.mean(r[key] for r in mine.values()) for key in ("logloss", "auc", "seconds")}
        peer = of.get(f"hash, c = {name.rsplit(' ', 1)[1]}") if "c = " in name else None
        if peer is not None and peer is not mine:
            less = [mine[seed]["logloss"] - peer[seed]["logloss"] for seed in mine]
            row["minus_hash"] = statistics.mean(less)
            row["error"] = statistics.stdev(less) / len(less) ** 0.5 if len(less) > 1 else None
        summary.append(row)
    return summary


def claims(summary: list[dict[str, Any]]) -> dict[str, bool]:
    """What the planted task has to show."""
    less = {row["tables"]: row.get("minus_hash", 0.0) for row in summary}
    return {
        "mult beats hash by 0.004 at c = 60": less["mult, c = 60"] <= -0.004,
        "mult is no worse than hash by 0.0005 at c = 4": less["mult, c = 4"] <= 0.0005,
        "a positive start loses to hash at c = 4": less["mult, uniform(σ√3, 1), c = 4"] > 0.002,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with movielens-1m: that log instead of the planted one")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--tables", nargs="+", choices=list(KINDS), metavar="TABLES")
    args = parser.parse_args()
    torch.set_num_threads(1)
    log = movielens(args.data) if args.data else None
    names = args.tables or list(REAL if log else KINDS)
    runs = []
    tables = ["user_id", "item_id", "zip_code"]
    rates = {name: best_rate(name, log, args.seeds[0], tables) for name in names} if log else {}
    for seed in args.seeds:
        data = log or planted(seed)
        for name in names:
            if log:
                runs.append(one(name, data, seed, tables, rates[name], REAL_BATCH))
            else:
                runs.append(one(name, data, seed, list(data[0])))
            print(runs[-1], flush=True)
    summary = summarise(runs)
    table(summary, ["tables", "numbers", "learning_rate", "logloss", "auc", "minus_hash", "error", "seconds"])
    settings = {"width": WIDTH, "batch": REAL_BATCH if log else BATCH, "threads": 1}
    found: dict[str, Any] = {"settings": settings, "summary": summary, "runs": runs}
    if not args.tables and not log:
        found["claims"] = claims(summary)
        print(*(f"{'yes' if holds else 'NO '}  {claim}" for claim, holds in found["claims"].items()), sep="\n")
    if not args.tables:
        write("compositional_movielens" if log else "compositional_planted", found)


if __name__ == "__main__":
    main()
