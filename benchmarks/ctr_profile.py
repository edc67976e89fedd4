"""Where a training step's time goes: matrix products against the machine's peak, lookups against its memory, the rest.

    python -m benchmarks.tables --data DIR --out tables
    python -m benchmarks.ctr_profile --tables tables

Each case is a recipe's model on its table. `--steps` training steps are timed as they are, and as many again under
PyTorch's profiler, whose operations are sorted into four kinds by their own time on the training thread: `products`
(matrix products), `lookups` (reading rows of embedding tables, summing their gradients by row, updating them),
`elementwise` (all other operations, the dense optimiser's among them) and `between`, the time in no operation: Python,
dispatch and waiting for batches. FLOPs are three times those of the forward pass. Bytes of lookups count each id's row
once read, once written out, its gradient once read, and the row and its two moments read and written by the update.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write

RECIPES = ("movielens-1m-deepfm", "movielens-1m-dcn_v2", "movielens-1m-dlrm", "movielens-1m-finalmlp", "globo-din")
TABLES = {"movielens-1m": "ml1m_ctr", "globo": "globo_seq"}
BATCH = 4096
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "mkldnn::")
LOOKUPS = (
    "fbgemm::", "SplitLookup", "aten::embedding", "aten::_embedding", "aten::index", "aten::_index", "aten::gather",
    "aten::scatter", "aten::take", "aten::segment_reduce", "aten::sort", "aten::unique",
)  # fmt: skip


def kind(operation: str) -> str:
    if operation.startswith(PRODUCTS):
        return "products"
    return "lookups" if operation.startswith(LOOKUPS) else "elementwise"


def prepare(recipe: str, tables: Path, scratch: Path) -> Path:
    """Import the recipe's table through the command line; the dataset's directory."""
    data = recipe.rsplit("-", 1)[0]
    dataset = scratch / TABLES[data]
    if not dataset.exists():
        schema = Path(__file__).parents[1] / f"recipes/{data}.schema.json"
        subprocess.run(
            [sys.executable, "-c", "from fullrank.cli.main import main; main()", "data", "import", "csv",
             str(tables / TABLES[data]), str(dataset), "--schema", str(schema)], check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return dataset


def measure(recipe: str, dataset_path: Path, threads: int, steps: int) -> dict[str, Any]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from fullrank.data.dataset import Dataset
    from fullrank.data.loader import Loader
    from fullrank.training import Trainer
    from fullrank.training.callbacks import Callback
    from fullrank.training.recipe import read_recipe

    torch.set_num_threads(threads)
    settings = read_recipe(Path(__file__).parents[1] / f"recipes/{recipe}.yaml")
    dataset = Dataset.open(dataset_path)
    warm = 20

    class Watch(Callback):
        def __init__(self) -> None:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.plain = self.profiled = 0.0

        def after_step(self, step: int, loss: torch.Tensor) -> None:
            if step == warm:
                self.begin = time.perf_counter()
            if step == warm + steps:
                self.plain = time.perf_counter() - self.begin
                self.profiler.start()
                self.begin = time.perf_counter()
            if step == warm + 2 * steps:
                self.profiled = time.perf_counter() - self.begin
                self.profiler.stop()

    torch.manual_seed(0)
    assert settings.model is not None
    model = settings.model.build(dataset.schema)
    loader = Loader(dataset, "train", BATCH, shuffle=True)
    config = settings.training.model_copy(update={"epochs": 100, "max_steps": warm + 2 * steps, "batch_size": BATCH})
    watch = Watch()
    # Not `fit_ranker`: its validation after each epoch would stand among the steps.
    result = Trainer(config, settings.embedding, [watch]).fit(model, loader)

    seconds = {"products": 0.0, "lookups": 0.0, "elementwise": 0.0}
    for event in watch.profiler.key_averages():
        seconds[kind(event.key)] += event.self_cpu_time_total / 1e6
    seconds["between"] = watch.profiled - sum(seconds.values())
    shares = {name: value / watch.profiled for name, value in seconds.items()}
    # Shares of the profiled steps, applied to the time of those without the profiler.
    own = {name: share * watch.plain for name, share in shares.items()}
    batch = next(iter(loader))
    ids = batch.ids_BF.numel() + batch.jagged_values.numel()
    width = model.config.embedding_dim
    bytes_per_step = ids * width * 4 * (1 + 1 + 1 + 6)
    products = 3 * model.flops_per_example() * BATCH * steps / 1e9
    return {
        "case": recipe,
        "precision": result.precision,
        "samples_per_s": BATCH * steps / watch.plain,
        "samples_per_s_profiled": BATCH * steps / watch.profiled,
        **{f"share_{name}": share for name, share in shares.items()},
        "gflops_of_step": products / watch.plain,
        "gflops_of_products": products / own["products"],
        "lookup_gb_per_s": bytes_per_step * steps / 1e9 / own["lookups"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--keep", type=Path, help="directory for the datasets, to be used again")
    args = parser.parse_args()
    import torch

    from fullrank.cli.doctor import memory_bandwidth
    from fullrank.training.precision import gemm_gflops

    torch.set_num_threads(args.threads)
    scratch = args.keep or Path(tempfile.mkdtemp())
    try:
        rows = [measure(recipe, prepare(recipe, args.tables, scratch), args.threads, args.steps)
                for recipe in args.recipes]  # fmt: skip
    finally:
        if args.keep is None:
            shutil.rmtree(scratch)
    peaks = {"float32": gemm_gflops(torch.float32), "bfloat16": gemm_gflops(torch.bfloat16)}
    bandwidth = memory_bandwidth()
    for row in rows:
        row["products_over_peak"] = row["gflops_of_products"] / peaks[row["precision"]]
        row["step_over_peak"] = row["gflops_of_step"] / peaks[row["precision"]]
        row["lookups_over_bandwidth"] = row["lookup_gb_per_s"] / bandwidth
    table(rows, list(rows[0]))
    print(json.dumps({"gemm_gflops": peaks, "memory_gb_per_s": bandwidth}))
    write("ctr_profile", {"settings": {"threads": args.threads, "steps": args.steps, "batch": BATCH},
                          "gemm_gflops": peaks, "memory_gb_per_s": bandwidth, "rows": rows})  # fmt: skip


if __name__ == "__main__":
    main()
