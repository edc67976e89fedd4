"""Ids that come and go, in a stream of ads that are born and die: kinds of tables at equal memory.

Admitted rows, hashing, quotient and remainder, and TorchRec's managed collision, against a row for every ad.

    python -m benchmarks.embeddings.admitted_stream

The log is simulated: 30 days, 30,000 ads in campaigns that are born throughout and live for 6 days on average, without
the ids of brand and campaign, so that what is an ad's own is to be learnt by its id. Each batch is predicted before it
is learnt from (DCN-V2, row-wise AdaGrad on tables); the loss is that of the last 25 days. Memory of an arm is all that
training keeps of the table of ads: rows, optimiser state, ids, counts and maps; the oracle's is not bounded, and
hashing and quotient-remainder get as many rows as fit into the same bytes. Quotient and remainder are of ids that are
numbered beforehand, which a stream does not offer.

The bounded arms have the bytes of an admitted table of `capacity` ids: some 3,600 ads are shown on a day.

A new ad has been seen fewer than 20 times when it is shown; of the others the head is what the most popular tenth of
the ads gets. `minus_hash` is the mean difference of the NE to that of hashing, `error` its standard error.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from benchmarks.machine import table, write
from fullrank.batch import Batch
from fullrank.data.encoders import Encoders
from fullrank.data.loader import batch_from_frame
from fullrank.data.simulate import SimulationConfig, World, simulate, simulation_schema
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.embeddings.partitions import quotient_remainder_sizes
from fullrank.metrics import log_loss
from fullrank.models import RankerSpec
from fullrank.schema import FIRST_VOCABULARY_ID, Categorical, Label, Schema, Sequence
from fullrank.training import TrainerConfig
from fullrank.training.engine import LocalEngine
from fullrank.training.evicted import id_counts

DAYS, ADS, LIFE, BURN_IN, NEW = 30, 30_000, 6.0, 5, 20
BATCH, WIDTH, RATE = 512, 16, 0.05
ADS_TABLE = "item_id"
HASHING = "hashing"
# Bytes of a row and its optimiser state.
ROW = 4 * WIDTH + 4


def log_of(impressions: int, seed: int) -> tuple[Schema, Batch, Tensor, np.ndarray[Any, Any]]:
    """The stream with raw ids of ads: schema, all rows as one batch, days_N, and popularity of the ads."""
    config = SimulationConfig(impressions=impressions, items=ADS, users=3_000, days=DAYS, seed=seed, rate=-1.5)
    world = World.make(config)
    random = np.random.default_rng((seed, 9))
    campaigns = max(20, ADS // 10)
    birth = random.uniform(-LIFE, DAYS, campaigns)
    death = birth + 1 + random.exponential(LIFE - 1, campaigns)
    campaign = world.arrays["item_campaign"]
    world.arrays["item_birth"], world.arrays["item_death"] = birth[campaign], death[campaign]
    frame = pl.concat(list(simulate(config, world)))
    schema = simulation_schema().without(["brand", "campaign"])
    raw = [_raw(feature) for feature in schema.features]
    schema = schema.model_copy(update={"features": tuple(raw), "labels": (Label(name="click"),)})
    schema = Schema.model_validate(schema.model_dump())
    encoders = Encoders.fit(schema, [frame])
    batch = batch_from_frame(encoders.transform(frame), encoders.schema)
    time_N = torch.from_numpy(frame["timestamp"].cast(pl.Int64).to_numpy().copy())
    return encoders.schema, batch, (time_N - int(time_N[0])) // 86_400, world.arrays["item_popularity"]


def _raw(feature: Any) -> Any:
    if isinstance(feature, Categorical) and feature.name == ADS_TABLE:
        return feature.model_copy(update={"encoding": "raw"})
    if isinstance(feature, Sequence):
        fields = [f.model_copy(update={"encoding": "raw"}) if f.name == "item" else f for f in feature.fields]
        return feature.model_copy(update={"fields": tuple(fields)})
    return feature


def numbered(schema: Schema, rows: int) -> Schema:
    """The schema with ads that are numbered beforehand."""

    def known(part: Any) -> Any:
        if isinstance(part, Sequence):
            return part.model_copy(update={"fields": tuple(known(field) for field in part.fields)})
        if getattr(part, "encoding", "") != "raw":
            return part
        return part.model_copy(update={"encoding": "identity", "num_embeddings": rows})

    return Schema.model_validate(
        schema.model_copy(update={"features": tuple(known(f) for f in schema.features)}).model_dump()
    )


def with_ads(batch: Batch, column: int, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with other ids of its ads: all in one call, those shown first, then those of histories."""
    key = batch.jagged_keys.index("history.item")
    begin = int(batch.jagged_lengths_KB[:key].sum())
    end = begin + int(batch.jagged_lengths_KB[key].sum())
    ids = change(torch.cat([batch.ids_BF[:, column], batch.jagged_values[begin:end]]))
    ids_BF, values = batch.ids_BF.clone(), batch.jagged_values.clone()
    ids_BF[:, column], values[begin:end] = ids[: len(batch)], ids[len(batch) :]
    return Batch(**{**{name: getattr(batch, name) for name in Batch.__dataclass_fields__}, "ids_BF": ids_BF,
                    "jagged_values": values})  # fmt: skip


class ManagedCollision:
    """TorchRec's module in front of a plain table: ids to rows, as it does it on its own."""

    def __init__(self, rows: int, policy: str) -> None:
        from torchrec.modules import mc_modules
        from torchrec.sparse.jagged_tensor import JaggedTensor

        policies = {"LFU": mc_modules.LFU_EvictionPolicy, "DistanceLFU": mc_modules.DistanceLFU_EvictionPolicy}
        self.jagged = JaggedTensor
        self.module = mc_modules.MCHManagedCollisionModule(
            zch_size=rows, device=torch.device("cpu"), eviction_policy=policies[policy](), eviction_interval=10,
            input_hash_size=2**62,
        )  # fmt: skip

    def __call__(self, ids_N: Tensor, training: bool) -> Tensor:
        self.module.train(training)
        jagged = self.jagged(values=ids_N, lengths=torch.tensor([ids_N.numel()]))
        return self.module({"ads": jagged})["ads"].values()

    @staticmethod
    def rows_of(budget: int) -> int:
        """Sorted ids, rows, counts and times of the last look-up are int64."""
        return budget // (ROW + 4 * 8)


def admitted_bytes(capacity: int) -> int:
    """Rows, and of each id: itself, count, step, slots of the map, counters of the sketch."""
    slots = 1 << max(2 * capacity - 1, 3).bit_length()
    return capacity * (ROW + 8 + 4 + 4) + slots * 4 + 4 * (1 << (2 * capacity - 1).bit_length())


def unlimited(ads: int) -> dict[str, dict[str, Any]]:
    """By name: the table, and its rows."""
    return {
        "oracle: a row for every ad": {"table": None, "rows": ads},
        "admitted, room for all": {"table": {"kind": "admitted", "capacity": ads}, "rows": ads},
    }


def limited(capacity: int, ads: int, day: int) -> dict[str, dict[str, Any]]:
    """By name: the table, whether its ids are numbered, rows, and how those of managed collision are given.

    Args:
        day: steps of a day. Counts of admitted ids are halved every two days, and ids go after two days: by a log of
            another seed than those that are reported.
    """
    budget = admitted_bytes(capacity)
    rows, managed = budget // ROW, ManagedCollision.rows_of(budget)
    collisions = next(c for c in range(2, ads) if sum(quotient_remainder_sizes(ads, c)) <= rows)
    product = {"kind": "quotient_remainder", "collisions": collisions}
    admitted = {"kind": "admitted", "capacity": capacity}
    return {
        HASHING: {"table": {"kind": "hash", "stored_rows": rows}, "rows": rows},
        "quotient-remainder, ids numbered": {"table": product, "rows": rows, "numbered": True},
        "admitted, LFU": {"table": {**admitted, "half_life": 2 * day}, "rows": capacity},
        "admitted, LFU without ageing": {"table": admitted, "rows": capacity},
        "admitted, TTL": {"table": {**admitted, "evict": "ttl", "ttl": 2 * day}, "rows": capacity},
        "TorchRec MCH, LFU": {"table": None, "managed": "LFU", "rows": managed},
        "TorchRec MCH, DistanceLFU": {"table": None, "managed": "DistanceLFU", "rows": managed},
    }


def one(arm: dict[str, Any], schema: Schema, log: Batch, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Logits of all rows, each before its batch was learnt from."""
    ads = int(log.ids_BF[:, column_of(schema)].max()) + 1
    rows = arm["rows"] if "managed" in arm else ads
    own = numbered(schema, rows) if "managed" in arm or "numbered" in arm or arm["table"] is None else schema
    torch.manual_seed(seed)
    tables = {} if arm["table"] is None else {ADS_TABLE: arm["table"]}
    model = RankerSpec.of({"name": "dcn_v2", "embedding_dim": WIDTH, "hidden": [64], "tables": tables}).build(own)
    embedding = EmbeddingOptimizer(kind="row_wise_adagrad", learning_rate=RATE)
    engine = LocalEngine()
    engine.prepare(model, TrainerConfig(batch_size=BATCH), embedding)
    managed = ManagedCollision(rows, arm["managed"]) if "managed" in arm else None
    column = column_of(schema)
    logits, begin = [], time.process_time()
    for first in range(0, len(log), BATCH):
        batch = log[first : first + BATCH]
        asked = with_ads(batch, column, lambda ids: managed(ids, False)) if managed else batch
        if first == 0:
            model.start_at_base_rate(asked)
        with torch.no_grad():
            logits.append(model.eval()(asked).logits_BT[:, 0])
        model.train()
        if managed:
            batch = with_ads(batch, column, lambda ids: managed(ids, True))
        engine.step(batch, 1.0, lambda loss: None)
    facts = {"rows": arm["rows"], "cpu_seconds": time.process_time() - begin, **id_counts(model).get(ADS_TABLE, {})}
    return torch.cat(logits), facts


def column_of(schema: Schema) -> int:
    return [feature.name for feature in schema.categorical].index(ADS_TABLE)


def normalised(logits: Tensor, labels: Tensor) -> float:
    """Logloss over that of the mean rate of the same rows."""
    rate = float(labels.double().mean())
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float(log_loss(logits, labels) / entropy)


def groups(schema: Schema, log: Batch, day_N: Tensor, popularity: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    ids = log.ids_BF[:, column_of(schema)].numpy() - FIRST_VOCABULARY_ID
    before = pl.DataFrame({"id": ids}).select(pl.int_range(pl.len()).over("id")).to_series().to_numpy()
    popular = popularity[ids] >= np.quantile(popularity, 0.9)
    counted = (day_N >= BURN_IN).numpy()
    is_new = before < NEW
    found = {"all": counted, "new": counted & is_new, "tail": counted & ~is_new & ~popular,
             "head": counted & ~is_new & popular}  # fmt: skip
    return {name: torch.from_numpy(rows) for name, rows in found.items()}


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    by = {(run["capacity"], run["tables"], run["seed"]): run for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    for capacity, name in dict.fromkeys((run["capacity"], run["tables"]) for run in runs):
        mine = [by[capacity, name, seed] for seed in seeds]
        row: dict[str, Any] = {"capacity": capacity, "tables": name}
        for key in ("rows", "bytes", "all", "new", "tail", "head", "evicted", "cpu_seconds"):
            values = [run[key] for run in mine if key in run]
            row[key] = statistics.mean(values) if values else None
        if capacity is not None and name != HASHING:
            less = [run["all"] - by[capacity, HASHING, run["seed"]]["all"] for run in mine]
            row["minus_hash"] = statistics.mean(less)
            row["error"] = statistics.stdev(less) / len(less) ** 0.5 if len(less) > 1 else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impressions", type=int, default=400_000)
    parser.add_argument("--capacities", nargs="+", type=int, default=[2_000, 5_000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in args.seeds:
        schema, log, day_N, popularity = log_of(args.impressions, seed)
        chosen = groups(schema, log, day_N, popularity)
        ads = int(log.ids_BF[:, column_of(schema)].max()) + 1
        arms = [(None, name, arm) for name, arm in unlimited(ads).items()]
        for capacity in args.capacities:
            found = limited(capacity, ads, len(log) // BATCH // DAYS)
            arms += [(capacity, name, arm) for name, arm in found.items()]
        for capacity, name, arm in arms:
            logits, facts = one(arm, schema, log, seed)
            losses = {group: normalised(logits[rows], log.labels_BT[rows, 0]) for group, rows in chosen.items()}
            runs.append({"capacity": capacity, "tables": name, "seed": seed, **losses, **facts})
            if capacity is not None:
                runs[-1]["bytes"] = admitted_bytes(capacity)
            print(runs[-1], flush=True)
    summary = summarise(runs)
    columns = ["capacity", "tables", "rows", "bytes", "all", "minus_hash", "error", "new", "tail", "head", "evicted"]
    table(summary, [*columns, "cpu_seconds"])
    settings = {
        "impressions": args.impressions, "ads": ADS, "days": DAYS, "batch": BATCH, "width": WIDTH,
        "learning_rate": RATE, "threads": 1,
    }  # fmt: skip
    write("admitted_stream", {"settings": settings, "summary": summary, "runs": runs})


if __name__ == "__main__":
    main()
