"""A funnel kept fresh against one that is frozen, in a world that drifts.

    python -m benchmarks.funnel.fresh

The simulator makes 14 days of a log in which interests drift and campaigns are born and retired. A funnel (two towers,
an early-stage ranker, DIN) learns the first 7 days, day by day. Then one stays as it is; one goes on day by day, one
hour by hour, with the same recipe: the same batches, rates and passes, and a retriever fitted once a day. "Frozen
models" are the frozen ones over the hourly funnel's catalogue: living ads, present bids.

* NE of the final stage on days 8 to 14: every impression is predicted by what was served when it happened.
* True value of a request by what was served when it came, 4 times a day: the sum over slots of bid times true click
  probability; a retired ad earns nothing. Also as a share of the best possible lists.

Differences between funnels are paired: the same rows, the same requests; the interval is over the seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch

from benchmarks import machine
from fullrank.data.dataset import Dataset
from fullrank.data.simulate import DAY, START, World, simulate_dataset
from fullrank.funnel import Funnel, load_bundle
from fullrank.funnel.stream import TIME, written
from fullrank.funnel.true_value import true_value
from fullrank.metrics import BinaryMetrics
from fullrank.training.evaluation import TaskMetrics, observe
from fullrank.training.learner import batches_of
from fullrank.training.stream import Hook, Window, stream

DAYS, LEARNT = 14, 7
# True values are taken so often, of so many requests.
EVERY, REQUESTS = 6 * 3600, 100
LEARNING = {"batch_size": 128, "learning_rate": 1e-3}


def recipe(data: Path, hours: int) -> dict[str, Any]:
    per_day = 24 // hours
    return {
        "data": {"dataset": str(data)},
        "funnel": {
            "retrieval": {"name": "two_tower"},
            "early": {"training": LEARNING},
            "final": {"model": {"name": "din", "hidden": [64, 32]}, "training": LEARNING},
            "sizes": {"retrieve": 200, "keep": 50},
            "active_days": 1,
        },
        "stream": {
            "window": hours * 3600,
            "rollback": None,
            "retrieval_every": per_day,
            "retrieval_windows": 3 * per_day,
        },
        "threads": 1,
    }


class Funnels(Hook):
    """The funnels that were served from each point in time at which true values are taken."""

    def __init__(self) -> None:
        self.at: dict[int, Funnel] = {}
        self.bundles: dict[int, Path] = {}

    def published(self, window: Window, bundle: Path, record: Mapping[str, Any]) -> None:
        if (window.end - START) % EVERY == 0:
            funnel = load_bundle(bundle)
            assert isinstance(funnel, Funnel)
            self.at[window.end] = funnel
        self.bundles = {window.end: bundle}


def rows_between(log: pl.DataFrame, begin: int, end: int) -> pl.DataFrame:
    return log.filter((pl.col(TIME) >= begin) & (pl.col(TIME) < end))


def pooled(records: list[dict[str, float]]) -> float:
    """NE of all rows of some windows together."""
    rows = sum(record["rows"] for record in records)
    loss = sum(record["rows"] * record["logloss"] for record in records) / rows
    rate = sum(record["rows"] * record["rate"] for record in records) / rows
    return loss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def one_seed(place: Path, seed: int, impressions: int, drift: float) -> dict[str, Any]:
    data = place / "data"
    dataset = simulate_dataset(data, impressions, seed, days=DAYS, drift=drift)
    world = World.load(data / "world.npz")
    log = pl.concat([dataset.scan(split).collect() for split in dataset.splits])
    cut = START + LEARNT * DAY
    parts = {"first": rows_between(log, START, cut), "then": rows_between(log, cut, START + DAYS * DAY)}
    for name, rows in parts.items():
        written(place / name, dataset.encoders, [rows])
    stream(recipe(place / "first", 24), place / "learnt", source="fresh")
    frozen_at = max((place / "learnt" / "bundles").iterdir())
    frozen = load_bundle(frozen_at)
    assert isinstance(frozen, Funnel)
    result: dict[str, Any] = {"seed": seed, "seconds": {}}
    funnels: dict[str, dict[int, Funnel]] = {"frozen": {cut: frozen}}
    found: dict[str, list[dict[str, float]]] = {"frozen": []}
    for day in range(LEARNT, DAYS):
        metrics = TaskMetrics(dataset.schema.labels)
        rows = rows_between(log, START + day * DAY, START + (day + 1) * DAY)
        observe(frozen.final, batches_of(rows, dataset.schema, 8192), metrics)
        found["frozen"].append({**metrics.of(dataset.schema.labels[0]), "day": day})
    for name, hours in (("daily", 24), ("hourly", 1)):
        hook, begin = Funnels(), time.process_time()
        report = stream(recipe(place / "then", hours), place / name, start=frozen_at, hooks=[hook], source="fresh")
        result["seconds"][name] = time.process_time() - begin
        funnels[name] = {cut: frozen, **hook.at}
        found[name] = [
            {**record["metrics"]["click"], "day": (record["begin"] - START) // DAY} for record in report.windows
        ]
    funnels["frozen models"] = {at: with_catalogue_of(frozen_at, funnel) for at, funnel in funnels["hourly"].items()}
    found["frozen models"] = found["frozen"]
    result["ne"] = {name: pooled(records) for name, records in found.items()}
    result["ne_by_day"] = {
        name: [pooled([record for record in records if record["day"] == day]) for day in range(LEARNT, DAYS)]
        for name, records in found.items()
    }
    result["oracle_ne"] = oracle(parts["then"])
    result["value"] = values(place, dataset, world, log, funnels, range(cut, START + DAYS * DAY, EVERY))
    return result


def with_catalogue_of(frozen_at: Path, fresh: Funnel) -> Funnel:
    """The models of a bundle with the catalogue of a fresh funnel, whose active items are indexed."""
    frozen = load_bundle(frozen_at)
    assert isinstance(frozen, Funnel)
    funnel = frozen.with_parts(items=fresh.items, users=fresh.users)
    funnel.index_active()
    return funnel


def oracle(rows: pl.DataFrame) -> float:
    metric = BinaryMetrics()
    p = torch.from_numpy(rows["__true_click"].to_numpy().copy()).double().clamp(1e-9, 1 - 1e-9)
    metric.update(torch.logit(p), torch.from_numpy(rows["click"].to_numpy().copy()))
    return metric.compute()["ne"]


def values(
    place: Path,
    dataset: Dataset,
    world: World,
    log: pl.DataFrame,
    funnels: Mapping[str, Mapping[int, Funnel]],
    times: range,
) -> dict[str, Any]:
    """True value per request of each funnel and of the best lists: the mean over all requests."""
    totals: dict[str, list[float]] = {}
    for at in times:
        part = place / f"at-{at}"
        rows = written(part, dataset.encoders, [rows_between(log, at, at + EVERY)], "test")
        for name, served in funnels.items():
            latest = served[max(time for time in served if time <= at)]
            found = true_value(latest, rows, world, "test", requests=REQUESTS)
            totals.setdefault(name, []).append(found["funnel"])
            if name == "frozen":
                for other in ("log", "random", "best"):
                    totals.setdefault(other, []).append(found[other])
    means = {name: statistics.mean(found) for name, found in totals.items()}
    shares = {name: means[name] / means["best"] for name in means if name != "best"}
    return {"mean": means, "share_of_best": shares, "requests": REQUESTS * len(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--impressions", type=int, default=300_000)
    parser.add_argument("--drift", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    begin = time.process_time()
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as place:
            runs.append(one_seed(Path(place), seed, options.impressions, options.drift))
        table = [
            {
                "funnel": name,
                **summary("NE", [run["ne"][name] for run in runs], [run["ne"]["frozen"] for run in runs]),
                **summary(
                    "value",
                    [run["value"]["mean"][name] for run in runs],
                    [run["value"]["mean"]["frozen"] for run in runs],
                ),
                "share of best": statistics.mean(run["value"]["share_of_best"][name] for run in runs),
            }
            for name in ("frozen", "frozen models", "daily", "hourly")
        ]
        machine.table(table, ["funnel", "NE", "NE - frozen", "value", "value - frozen", "share of best"])
        machine.write(
            "fresh",
            {"options": vars(options), "cpu_seconds": time.process_time() - begin, "table": table, "runs": runs},
        )


def summary(name: str, own: list[float], frozen: list[float]) -> dict[str, Any]:
    """Mean, paired difference from the frozen funnel, and that of each seed."""
    differences = [a - b for a, b in zip(own, frozen, strict=True)]
    spread = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return {
        name: statistics.mean(own),
        f"{name} - frozen": statistics.mean(differences),
        f"{name} standard error": spread,
        f"{name} differences": differences,
    }


if __name__ == "__main__":
    main()
