"""How often the intervals of off-policy estimates cover what another policy is truly worth, on simulated logs.

One funnel is trained on a simulated log. It then fills lists in the same world, four slots of twenty candidates, by
softmax or epsilon-greedy, and logs propensities; other policies are estimated from these logs by IPS, self-normalised
IPS and the doubly robust estimator. The truth is the mean, by the world's click probabilities, of the lists that the
other policy fills itself for the same distribution of requests; clicks of a rollout do not reach later histories, so
that this distribution does not depend on the policy.

    python -m benchmarks.funnel.off_policy

`covers` counts, of the runs, those whose 95 % interval holds the truth; `bias` is the mean error and `rmse` the root
mean squared one, both over the truth; `width` is the mean width of an interval over the truth. `effective` is the mean
effective sample size of a log, and `warned` the share of logs of which a warning was given. `logging` policies are
those that the logs were drawn by. Two policies are there to be warned of, because the early stage goes by their value
formula too: the last keeps candidates that the log does not have, the second one some.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from benchmarks.machine import table, write
from fullrank.data.dataset import Dataset
from fullrank.data.simulate import Histories, World, simulate, simulate_dataset
from fullrank.funnel import Funnel, FunnelConfig, StageSizes, save_bundle, train_funnel
from fullrank.funnel.off_policy import LogColumns, evaluate_off_policy
from fullrank.funnel.rollout import FunnelPolicy, begin_of, histories_before
from fullrank.funnel.slate import PolicySpec, SlateConfig
from fullrank.funnel.training import EarlyConfig, FinalConfig
from fullrank.retrieval import TwoTower
from fullrank.training import TrainerConfig

IMPRESSIONS, USERS, ITEMS = 100_000, 10_000, 500
VALUE, REWARD = "bid * click", "bid * click"
ESTIMATORS = ("ips", "snips", "dr")
UNSUPPORTED = "softmax .2 of click"


class Frozen(Histories):
    """Histories that rollouts do not add to."""

    def __init__(self, histories: Histories) -> None:
        self.items, self.times, self.counts = histories.items, histories.times, histories.counts

    def add(self, users: Any, items: Any, times: Any) -> None:
        pass


def trained(place: Path) -> tuple[Funnel, Dataset]:
    log = simulate_dataset(place / "log", IMPRESSIONS, 0, users=USERS, items=ITEMS)
    training = TrainerConfig(batch_size=1024, epochs=2, learning_rate=5e-3, monitor="ne")
    config = FunnelConfig(
        retrieval=TwoTower.Config(epochs=2),
        early=EarlyConfig(training=training),
        final=FinalConfig(model={"name": "din", "hidden": [32], "embedding_dim": 8}, training=training),
        sizes=StageSizes(retrieve=100, keep=20),
        value=VALUE,
    )
    funnel = train_funnel(log, config)[0]
    save_bundle(funnel, place / "bundle")
    return funnel, log


def variant(funnel: Funnel, policy: dict[str, Any], value: str = VALUE, keep: int = 20) -> Funnel:
    """The same stages with another policy, value formula or size of the early stage."""
    return Funnel(
        encoders=funnel.encoders, items=funnel.items, users=funnel.users, context=funnel.context,
        retriever=funnel.retriever, early=funnel.early, final=funnel.final, value=value,
        sizes=StageSizes(retrieve=funnel.sizes.retrieve, keep=keep), slate=SlateConfig(policy=PolicySpec.of(policy)),
    )  # fmt: skip


def pairs(funnel: Funnel) -> list[tuple[str, str, Funnel]]:
    """Logging policy, and name and funnel of what is estimated from its logs."""

    def softmax(temperature: float) -> dict[str, Any]:
        return {"name": "softmax", "temperature": temperature}

    return [
        ("softmax .2", "softmax .12", variant(funnel, softmax(0.12))),
        ("softmax .2", "softmax .2 of min(bid, 2) * click", variant(funnel, softmax(0.2), value="min(bid, 2) * click")),
        ("softmax .2", "softmax .2 of 15 candidates", variant(funnel, softmax(0.2), keep=15)),
        ("epsilon .2", "greedy", variant(funnel, {"name": "greedy"})),
        ("softmax .2", UNSUPPORTED, variant(funnel, softmax(0.2), value="click")),
    ]


def logging(funnel: Funnel) -> dict[str, Funnel]:
    return {
        "softmax .2": variant(funnel, {"name": "softmax", "temperature": 0.2}),
        "epsilon .2": variant(funnel, {"name": "epsilon", "epsilon": 0.2}),
    }


def rolled_out(funnel: Funnel, world: World, histories: Histories, requests: int, seed: int) -> pl.DataFrame:
    slots = world.config.slots
    config = world.config.model_copy(update={"impressions": requests * slots, "seed": seed})
    policy = FunnelPolicy(funnel, world, slots)
    return pl.concat(list(simulate(config, world, policy=policy, histories=histories, begin=begin_of(world))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--requests", type=int, default=2_000, help="of each log")
    parser.add_argument("--truth", type=int, default=40_000, help="requests that the truth is a mean over")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        funnel, log = trained(place)
        world = World.load(log.path / "world.npz")
        histories = Frozen(histories_before(log, world))
        targets = pairs(funnel)
        true = pl.col("bid") * pl.col("__true_click")
        truths = []
        for _, name, target in targets:
            own = rolled_out(target, world, histories, args.truth, 10**6)
            values = own.group_by("slate").agg(true.sum())["bid"]
            truths.append((float(values.mean()), float(values.std()) / len(values) ** 0.5))
            print(f"{name}: {truths[-1][0]:.4f} +- {truths[-1][1]:.4f}", flush=True)
        found: list[dict[str, list[Any]]] = [defaultdict(list) for _ in targets]
        for run in range(args.runs):
            logs = {
                name: Dataset.from_frame(
                    rolled_out(policy, world, histories, args.requests, run), like=place / "bundle",
                    keep=list(LogColumns()[:3]), split="none",
                )
                for name, policy in logging(funnel).items()
            }  # fmt: skip
            for (by, _, target), results in zip(targets, found, strict=True):
                report = evaluate_off_policy(target, logs[by], "train", reward=REWARD, seed=run)
                results["effective"].append(report["effective_sample_size"])
                results["warned"].append(bool(report["warnings"]))
                results["logged"].append(report["logged"]["value"])
                for estimator in ESTIMATORS:
                    results[estimator].append((report[estimator]["value"], *report[estimator]["interval"]))
            if run % 10 == 9:
                print(f"{run + 1} runs, {time.process_time() - begun:.0f} s", flush=True)
        rows = []
        for (by, name, _), results, (truth, error) in zip(targets, found, truths, strict=True):
            for estimator in ESTIMATORS:
                value, low, high = np.array(results[estimator]).T
                rows.append(
                    {
                        "logging": by,
                        "target": name,
                        "estimator": estimator,
                        "truth": truth,
                        "error_of_truth": error,
                        "logged": statistics.mean(results["logged"]),
                        "covers": int(((low <= truth) & (truth <= high)).sum()),
                        "runs": args.runs,
                        "bias": float(value.mean() / truth - 1),
                        "rmse": float(np.sqrt(((value / truth - 1) ** 2).mean())),
                        "width": float((high - low).mean() / truth),
                        "effective": statistics.mean(results["effective"]),
                        "warned": statistics.mean(results["warned"]),
                    }
                )
    columns = ["logging", "target", "estimator", "truth", "logged", "covers", "bias", "rmse", "width", "effective"]
    table(rows, [*columns, "warned"])
    settings = {**vars(args), "impressions": IMPRESSIONS, "users": USERS, "items": ITEMS, "slots": world.config.slots,
                "candidates": 20, "value": VALUE, "reward": REWARD, "threads": 1}  # fmt: skip
    seconds = time.process_time() - begun
    write("off_policy", {"settings": settings, "cpu_seconds": seconds, "coverage": rows})


if __name__ == "__main__":
    main()
