"""External distillation in a drifting stream: biased and stale teachers, a head of their own, the adapter, and cost.

    python -m benchmarks.transfer.exfm

20 days of 2,000 impressions with some 10 % clicks: log-odds are a linear function of ten numbers whose weights walk,
and of one of 50 ads. The teacher is the truth, as it was Δ days ago, plus a bias of its log-odds; the student is a
small DCN-V2 that predicts each day before it learns it, in one pass. Days 5 to 19 count; the calibration is what is
predicted over what happened. Settings are the specification's, and were not tuned on these seeds.

The cost is of training steps in turn on the same batches of the simulated ads log, in CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.machine import table, write
from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.metrics import calibration, normalized_entropy
from fullrank.models import RankerSpec
from fullrank.models.base import Ranker
from fullrank.schema import Categorical, Label, Numeric, Schema
from fullrank.training import TrainerConfig
from fullrank.training.engine import LocalEngine
from fullrank.transfer.student import TEACHER

DAYS, ROWS, NUMBERS, ADS, BURN_IN, BATCH = 20, 2_000, 10, 50, 5, 50
WALK = 0.12
SCHEMA = Schema(
    features=(
        *(Numeric(name=f"x{k}", transform="standard", encoding="scalar") for k in range(NUMBERS)),
        Categorical(name="ad", role="item", encoding="identity", num_embeddings=ADS),
    ),
    labels=(Label(name="click"),),
)
BACKBONE = {"name": "dcn_v2", "hidden": [32, 16], "num_cross_layers": 1, "embedding_dim": 4, "embedding_init": 0.1}
ARMS: dict[str, dict[str, Any] | None] = {
    "no teacher": None,
    "kd": {"mode": "kd"},
    "aux_head": {"mode": "aux_head"},
    "aux_head, beta 5": {"mode": "aux_head", "beta": 5},
    "aux_head+adapter, beta 5": {"mode": "aux_head+adapter", "beta": 5},
}
TEACHERS = {"unbiased": (0, 0.0), "log-odds + 1": (0, 1.0)}
STALENESS = (1, 2, 3, 5, 8)
STALE_ARMS = ("kd", "aux_head", "aux_head+adapter, beta 5")


class World:
    """The stream of a seed: a batch for each day, and the truth of any of its days for the rows of another."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        weights = rng.standard_normal(NUMBERS) * 0.4 + np.cumsum(WALK * rng.standard_normal((DAYS, NUMBERS)), 0)
        self.weights_DN = torch.from_numpy(weights).float()
        self.ad_A = torch.from_numpy(rng.standard_normal(ADS) * 0.5).float()
        self.days = []
        for day in range(DAYS):
            x_BN = torch.from_numpy(rng.standard_normal((ROWS, NUMBERS))).float()
            ad_B = torch.from_numpy(rng.integers(0, ADS, ROWS))
            p_B = torch.sigmoid(self.truth(day, x_BN, ad_B))
            click_B = torch.from_numpy(rng.random(ROWS)) < p_B
            none = torch.zeros(0, dtype=torch.int64)
            self.days.append(
                Batch(x_BN, ad_B[:, None], (), none, torch.zeros(0, ROWS, dtype=torch.int64), (), torch.zeros(0),
                      torch.zeros(0, ROWS, dtype=torch.int64), click_B.float()[:, None])
            )  # fmt: skip

    def truth(self, day: int, x_BN: torch.Tensor, ad_B: torch.Tensor) -> torch.Tensor:
        return x_BN @ self.weights_DN[max(day, 0)] + self.ad_A[ad_B] - 2.9

    def said(self, day: int, late: int, bias: float) -> torch.Tensor:
        """The teacher's probabilities of a day's rows; of the first days NaN where there is no version that old."""
        batch = self.days[day]
        if day < late:
            return torch.full((ROWS, 1), torch.nan)
        return torch.sigmoid(self.truth(day - late, batch.numeric_BN, batch.ids_BF[:, 0]) + bias)[:, None]


def student(distillation: dict[str, Any] | None, seed: int) -> tuple[Ranker, LocalEngine]:
    torch.manual_seed(seed)
    model = RankerSpec.of({"name": "student", "backbone": BACKBONE, "distillation": distillation}).build(SCHEMA)
    engine = LocalEngine()
    config = TrainerConfig(batch_size=BATCH, learning_rate=0.003)
    engine.prepare(model, config, EmbeddingOptimizer(learning_rate=0.02))
    return model, engine


def one(world: World, distillation: dict[str, Any] | None, late: int, bias: float, seed: int) -> dict[str, float]:
    """NE and calibration of what is served, over the days that count."""
    model, engine = student(distillation, seed)
    logits, labels = [], []
    for day, batch in enumerate(world.days):
        batch = replace(batch, extra={TEACHER: world.said(day, late, bias)})
        if day == 0:
            model.start_at_base_rate(batch)
        elif day >= BURN_IN:
            with torch.no_grad():
                logits.append(model.eval()(batch).logits_BT[:, 0])
            labels.append(batch.labels_BT[:, 0])
        model.train()
        for begin in range(0, ROWS, BATCH):
            engine.step(batch[begin : begin + BATCH], 1.0, lambda loss: None)
    z, y = torch.cat(logits), torch.cat(labels)
    return {"ne": float(normalized_entropy(z, y)), "calibration": float(calibration(z, y))}


def interval(values: list[float]) -> list[float]:
    """Mean, and its 95 % interval by Student's t."""
    from scipy import stats

    mean, n = statistics.mean(values), len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    return [mean, mean - half, mean + half]


def cost() -> list[dict[str, Any]]:
    """CPU seconds of a training step by arm, relative to no teacher: medians of steps in turn."""
    from fullrank.data.encoders import Encoders
    from fullrank.data.loader import batch_from_frame
    from fullrank.data.simulate import SimulationConfig, simulate, simulation_schema

    frame = next(iter(simulate(SimulationConfig(impressions=20_000))))
    encoders = Encoders.fit(simulation_schema(), [frame])
    whole = batch_from_frame(encoders.transform(frame), encoders.schema)
    whole = replace(whole, extra={TEACHER: torch.rand(len(whole), 3)})
    arms = {}
    for name, distillation in ARMS.items():
        torch.manual_seed(0)
        spec = {
            "name": "student",
            "backbone": {"name": "dcn_v2", "hidden": [256, 128, 64]},
            "distillation": distillation,
        }
        model, engine = RankerSpec.of(spec).build(encoders.schema).train(), LocalEngine()
        engine.prepare(model, TrainerConfig(), EmbeddingOptimizer())
        arms[name] = engine
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for step in range(60):
        batch = whole[step % 9 * 2048 : step % 9 * 2048 + 2048]
        for name, engine in arms.items():
            began = time.process_time()
            engine.step(batch, 1.0, lambda loss: None)
            if step >= 10:
                seconds[name].append(time.process_time() - began)
    plain = statistics.median(seconds["no teacher"])
    return [
        {"arm": name, "ms": 1000 * statistics.median(took), "relative": statistics.median(took) / plain}
        for name, took in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--adapter-seeds", type=int, default=10)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    worlds = {seed: World(seed) for seed in range(max(asked.seeds, asked.adapter_seeds))}
    rows = []
    for teacher, (late, bias) in TEACHERS.items():
        for arm, distillation in ARMS.items():
            found = [one(worlds[seed], distillation, late, bias, seed) for seed in range(asked.seeds)]
            rows.append(
                {"teacher": teacher, "arm": arm, "ne": statistics.mean(f["ne"] for f in found),
                 "calibration": statistics.mean(f["calibration"] for f in found), "seeds": found}
            )  # fmt: skip
    table(rows, ["teacher", "arm", "ne", "calibration"])
    curve = []
    for late in STALENESS:
        row: dict[str, Any] = {"staleness": late}
        for arm in STALE_ARMS:
            row[arm] = statistics.mean(one(worlds[s], ARMS[arm], late, 0.0, s)["ne"] for s in range(asked.seeds))
        curve.append(row)
    table(curve, list(curve[0]))
    effect = {}
    for name, (late, bias) in {"log-odds + 1": (1, 1.0), "stale 5": (5, 0.0)}.items():
        without, adapted = ({**ARMS["aux_head, beta 5"], "mode": mode} for mode in ("aux_head", "aux_head+adapter"))
        effect[name] = interval(
            [
                one(worlds[s], adapted, late, bias, s)["ne"] - one(worlds[s], without, late, bias, s)["ne"]
                for s in range(asked.adapter_seeds)
            ]
        )
    print("NE with the adapter minus without, mean and 95 % interval:", effect)
    steps = cost()
    table(steps, list(steps[0]))
    write(
        "transfer_exfm",
        {
            "arms": rows,
            "staleness": curve,
            "adapter": effect,
            "cost": steps,
            "cpu_seconds": time.process_time() - began,
        },
    )


if __name__ == "__main__":
    main()
