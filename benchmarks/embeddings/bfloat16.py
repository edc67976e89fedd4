"""The same training in float32 and with bfloat16 in one place or another: test NE, bytes of tables, time of a step.

    python -m benchmarks.tables --data DIR --out tables --tables ml1m_ctr
    python -m benchmarks.embeddings.bfloat16 --tables tables

DLRM and DCN-V2 on MovieLens-1M, one setting for all ways: one epoch, batch 2048, dim 16, hidden 256-128-64, Adam from
1e-3 to zero, tables by row-wise Adagrad, whose rate is the better of two for float32 on the validation rows (seed 0). A
falling rate and no batch norm, because runs part least so. The seeds that are reported are others. A seed sets the
start, the order of rows and the random roundings, and each way is compared with float32 seed by seed. The way
`float32, nudged` starts from weights that differ in their last bits: how far two float32 runs part. The ways with
`trunc` cut the lower bits off; for tables no setting offers that, only this script.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.machine import table, write
from fullrank.bfloat16 import has_units, to_bf16
from fullrank.data.dataset import Dataset
from fullrank.data.importing import import_dataset
from fullrank.data.loader import Loader
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer
from fullrank.embeddings.optimizer import Storage
from fullrank.models import RankerSpec
from fullrank.schema import Schema
from fullrank.training import Callback, LocalEngine, Trainer, TrainerConfig, evaluate
from fullrank.training.mixed_precision import products_in

HERE = Path(__file__).parent
MODELS: dict[str, dict[str, Any]] = {
    "dlrm": {"interaction": "dot", "hidden": [256, 128, 64], "embedding_init": 0.01},
    "dcn_v2": {"num_cross_layers": 3, "hidden": [256, 128, 64], "embedding_init": 0.01},
}
# precision, rounding of the emulation, storage of tables, tables cut off
WAYS: dict[str, tuple[str, str, Storage, bool]] = {
    "float32": ("float32", "rne", "float32", False),
    "float32, nudged": ("float32", "rne", "float32", False),
    "products bfloat16": ("bfloat16", "rne", "float32", False),
    "products emulated rne": ("bfloat16_emulated", "rne", "float32", False),
    "products emulated trunc": ("bfloat16_emulated", "trunc", "float32", False),
    "tables bfloat16": ("float32", "rne", "bfloat16", False),
    "tables bfloat16_stochastic": ("float32", "rne", "bfloat16_stochastic", False),
    "tables split": ("float32", "rne", "split", False),
    "tables trunc": ("float32", "rne", "bfloat16", True),
}
RATES = (0.03, 0.1)
# Steps whose losses make one point of a curve.
POINT = 20


class Curve(Callback):
    """Mean training loss of every `POINT` steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_step(self, step: int, loss: Tensor) -> None:
        self.losses.append(float(loss))

    def points(self) -> list[float]:
        return [round(statistics.mean(self.losses[i : i + POINT]), 5) for i in range(0, len(self.losses), POINT)]


def settings(way: str, rate: float, seed: int = 0) -> tuple[TrainerConfig, EmbeddingOptimizer]:
    precision, rounding, storage, _ = WAYS[way]
    config = {"batch_size": 2048, "schedule": "linear", "precision": precision, "rounding": rounding, "seed": seed}
    embedding = EmbeddingOptimizer(kind="row_wise_adagrad", learning_rate=rate, storage=storage)
    return TrainerConfig.model_validate(config), embedding


def fit(name: str, dataset: Dataset, way: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    torch.manual_seed(seed)
    config, embedding = settings(way, rate, seed)
    model = RankerSpec.of({"name": name, **MODELS[name]}).build(dataset.schema)
    if way == "float32, nudged":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-7 * torch.randn_like(parameter))
    curve = Curve()
    loader = Loader(dataset, "train", config.batch_size, shuffle=True, seed=seed)
    rounded = (lambda x: to_bf16(x, "trunc")) if WAYS[way][3] else to_bf16
    with mock.patch("fullrank.embeddings.row_buffer.to_bf16", rounded):
        Trainer(config, embedding, [curve]).fit(model, loader)
    found = evaluate(model, Loader(dataset, split, 16384))["label"]
    collections = [module for module in model.modules() if isinstance(module, EmbeddingCollection)]
    return {
        "model": name, "way": way, "seed": seed, f"{split}_ne": found["ne"], f"{split}_auc": found["auc"],
        f"{split}_logloss": found["logloss"],
        "table_bytes": sum(collection.weight_bytes() for collection in collections),
        "looked_up_bytes": sum(w.nbytes for collection in collections for w in collection.weights()),
        "losses": curve.points(),
    }  # fmt: skip


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each way against float32 of the same model and seed."""
    plain = {(run["model"], run["seed"]): run for run in runs if run["way"] == "float32"}
    rows = []
    for name, way in dict.fromkeys((run["model"], run["way"]) for run in runs):
        mine = [run for run in runs if (run["model"], run["way"]) == (name, way)]
        pairs = [(run, plain[name, run["seed"]]) for run in mine]
        relative = [100 * (a["test_ne"] / b["test_ne"] - 1) for a, b in pairs]
        rows.append({
            "model": name, "way": way, "seeds": len(mine), "test_ne": statistics.mean(run["test_ne"] for run in mine),
            "ne_percent": statistics.mean(relative),
            "standard_error": statistics.stdev(relative) / math.sqrt(len(relative)) if len(relative) > 1 else None,
            "logloss_difference": statistics.mean(a["test_logloss"] - b["test_logloss"] for a, b in pairs),
            "largest_curve_gap": max(
                abs(x - y) for a, b in pairs for x, y in zip(a["losses"][1:], b["losses"][1:], strict=True)
            ),
            "table_bytes": mine[0]["table_bytes"], "looked_up_bytes": mine[0]["looked_up_bytes"],
        })  # fmt: skip
    return rows


def step_times(name: str, dataset: Dataset, ways: list[str], rate: float, rounds: int = 30) -> dict[str, float]:
    """Milliseconds of the fastest training step of each way; ways take turns."""
    batches = list(itertools.islice(Loader(dataset, "train", 2048), rounds))
    engines = {}
    for way in ways:
        torch.manual_seed(0)
        engines[way] = LocalEngine()
        engines[way].prepare(
            RankerSpec.of({"name": name, **MODELS[name]}).build(dataset.schema).train(), *settings(way, rate)
        )
    best = dict.fromkeys(ways, math.inf)
    for batch in batches:
        for way, engine in engines.items():
            begin = time.perf_counter()
            engine.step(batch, 1.0, lambda _: None)
            best[way] = min(best[way], 1e3 * (time.perf_counter() - begin))
    return best


def speed(width: int, rounds: int = 7) -> dict[str, Any]:
    """Forward and backward pass of an MLP of three layers of one width, ways taking turns; the fastest of each."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(width, width), nn.ReLU())))
    x = torch.randn(2048, width)
    best = dict.fromkeys(("float32", "bfloat16", "bfloat16_emulated"), math.inf)
    for _ in range(rounds):
        for precision in best:
            begin = time.perf_counter()
            with products_in(precision, torch.device("cpu")):  # type: ignore[arg-type]
                output = layers(x)
            output.float().square().mean().backward()
            best[precision] = min(best[precision], time.perf_counter() - begin)
    return {
        "width": width, **{f"{name}_ms": 1e3 * seconds for name, seconds in best.items()},
        "bfloat16_speedup": best["float32"] / best["bfloat16"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reuse", type=Path, help="result of an earlier run: its fits are not run again")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    schema = Schema.read(HERE.parent.parent / "recipes/movielens-1m.schema.json")
    before = json.loads(args.reuse.read_text()) if args.reuse else {"runs": [], "grid": []}
    runs, grid, steps = before["runs"], before["grid"], {}
    done = {(run["model"], run["way"], run["seed"]) for run in runs}
    with tempfile.TemporaryDirectory() as scratch:
        dataset = import_dataset("csv", args.tables / "ml1m_ctr", Path(scratch) / "dataset", schema=schema)
        for name in args.models:
            for rate in RATES if name not in {row["model"] for row in grid} else ():
                tried = fit(name, dataset, "float32", rate, 0, "valid")
                grid.append({"model": name, "rate": rate, "valid_ne": tried["valid_ne"]})
                print(grid[-1], flush=True)
            rate = min((row for row in grid if row["model"] == name), key=lambda row: row["valid_ne"])["rate"]
            for seed in args.seeds:
                for way in dict.fromkeys(["float32", *args.ways]):
                    if (name, way, seed) in done:
                        continue
                    runs.append(fit(name, dataset, way, rate, seed, "test"))
                    print({key: value for key, value in runs[-1].items() if key != "losses"}, flush=True)
            timed = [way for way in args.ways if not WAYS[way][3] and way != "float32, nudged"]
            steps[name] = step_times(name, dataset, timed, rate)
    rows, speeds = summarise(runs), [speed(width) for width in (256, 512, 1024)]
    print()
    for row in rows:
        row["step_ms"] = steps[row["model"]].get(row["way"])
    table(rows, list(rows[0]))
    table(speeds, list(speeds[0]))
    write("bfloat16", {
        "settings": {"models": args.models, "seeds": args.seeds, "threads": args.threads, "has_units": has_units()},
        "grid": grid, "summary": rows, "speed": speeds, "runs": runs,
    })  # fmt: skip


if __name__ == "__main__":
    main()
