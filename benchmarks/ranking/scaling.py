"""Normalised entropy against operations of InterFormer and Kunlun at four sizes, with their fitted laws and a plot.

    python -m benchmarks.tables --data DIR --out tables
    python -m benchmarks.ranking.scaling --tables tables            # news clicks with histories
    python -m benchmarks.ranking.scaling --set heterogeneous        # a planted task

A size multiplies the width of all vectors and the layers of the backbone together. One epoch (3 on planted tasks),
Adam 1e-3, batch norm in the head on for both, no other tuning: the question is how each falls, not which is better
tuned. A law is fitted to the means over seeds; the interval of its slope is from the seeds, each fitted alone.

Finished runs are kept in `--work` and not repeated, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write
from benchmarks.ranking import compare

# width, layers
SIZES = ((4, 1), (8, 1), (16, 2), (32, 3))
MODELS = ("interformer", "kunlun")


def config(width: int, layers: int) -> dict[str, Any]:
    return {"embedding_dim": width, "num_layers": layers, "hidden": compare.HIDDEN, "batch_norm": True}


def summarise(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from fullrank.metrics.scaling_law import fit_scaling_law

    rows, laws = [], {}
    for model in MODELS:
        for size in range(len(SIZES)):
            mine = [r for r in records if (r["model"], r["size"]) == (model, size)]
            if not mine:
                continue
            rows.append({
                "model": model, "width": SIZES[size][0], "seeds": len(mine),
                **{key: statistics.mean(r[key] for r in mine)
                   for key in ("flops_per_example", "dense_parameters", "samples_per_s", "test_ne", "test_auc")},
                "standard_error": compare.standard_error([r["test_ne"] for r in mine]),
            })  # fmt: skip
        own = [row for row in rows if row["model"] == model]
        if len(own) == len(SIZES):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                law = fit_scaling_law([r["flops_per_example"] for r in own], [r["test_ne"] for r in own])
                slopes = []
                for seed in {r["seed"] for r in records}:
                    alone = [r for r in records if r["model"] == model and r["seed"] == seed]
                    if len(alone) == len(SIZES):
                        slopes.append(
                            fit_scaling_law([r["flops_per_example"] for r in alone], [r["test_ne"] for r in alone]).eta
                        )
            error = compare.standard_error(slopes)
            laws[model] = {"ne0": law.ne0, "eta": law.eta, "eta_standard_error": error, "r2": law.r2}
    return rows, laws


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for model in MODELS:
        own = [row for row in rows if row["model"] == model]
        axes.errorbar(
            [row["flops_per_example"] for row in own],
            [row["test_ne"] for row in own],
            yerr=[row["standard_error"] for row in own],
            marker="o",
            capsize=3,
            label=model,
        )
    axes.set(xscale="log", xlabel="operations of a forward pass per row", ylabel="normalised entropy, test")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set",
        dest="name",
        default="globo_seq",
        choices=["globo_seq", "globo_time", *compare.AMAZON, "heterogeneous", "timed"],
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", type=Path, default=Path("tables"))
    parser.add_argument("--work", type=Path, default=Path("runs/ranking"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    journal = args.work / f"scaling-{args.name}.jsonl"
    records = compare.read_journal(journal)
    done = {(r["model"], r["size"], r["seed"]) for r in records}
    with tempfile.TemporaryDirectory() as folder:
        dataset = compare.dataset_of(args.name, args, Path(folder))
        for seed in args.seeds:
            for size, (width, layers) in enumerate(SIZES):
                for model in MODELS:
                    if (model, size, seed) in done:
                        continue
                    found = compare.run(dataset, model, config(width, layers), seed, compare.EPOCHS[args.name])
                    records.append({"model": model, "size": size, "seed": seed, **found})
                    compare.append_journal(journal, records[-1:])
                    print(
                        json.dumps({key: records[-1][key] for key in ("model", "size", "seed", "test_ne")}), flush=True
                    )
    rows, laws = summarise(records)
    table(rows, list(rows[0]))
    for model, law in laws.items():
        print(model, json.dumps(law))
    write(f"scaling_{args.name}", {"settings": {"seeds": args.seeds, "threads": args.threads, "sizes": SIZES},
                                   "rows": rows, "laws": laws, "runs": records})  # fmt: skip
    plot(rows, Path(__file__).parents[2] / "docs" / "papers" / f"scaling_{args.name}.svg")


if __name__ == "__main__":
    main()
