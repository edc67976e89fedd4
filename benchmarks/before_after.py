"""Two checkouts of fullrank in turn: imports, training speed, steps with tables, and latency of recommendations.

    git worktree add ../before COMMIT
    python -m benchmarks.tables --data DIR --out tables
    python -m benchmarks.before_after --before ../before --tables tables [--only import]

Each measurement is a process of its own with the checkout's `src` before everything else; the two take turns, and the
order turns around with every repeat. The figure is the median of the ratios after / before, each of one turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import process_tree
from benchmarks.machine import table, write
from benchmarks.serving.load import FULLRANK, ask, free_port, running

HERE = Path(__file__).parents[1]
RECIPES = ("movielens-1m-deepfm", "movielens-1m-dcn_v2", "globo-din")
DATA = {"movielens-1m": "ml1m_ctr", "globo": "globo_seq"}
# Fields and rows of their tables, and how they learn; the program runs on either checkout.
STEPS = """
import json, statistics, sys, time
import torch
from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer
from fullrank.models import MODELS
from fullrank.schema import Categorical, Label, Schema

fields, rows, kind, threads = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
torch.set_num_threads(threads)
torch.manual_seed(0)
schema = Schema(features=tuple(Categorical(name=f"f{i}", num_embeddings=rows) for i in range(fields)),
                labels=(Label(name="click"),))
model = MODELS["deepfm"].from_config(schema).train()
for module in model.modules():
    if isinstance(module, EmbeddingCollection):
        module.set_optimizer(EmbeddingOptimizer(kind=kind))
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)
empty, none = torch.zeros(0), torch.zeros(0, 4096, dtype=torch.int64)
seconds = []
for step in range(32):
    ids = (torch.rand(4096, fields) ** 3 * rows).long()
    labels = (torch.rand(4096, 1) < 0.3).float()
    begin = time.perf_counter()
    batch = Batch(torch.zeros(4096, 0), ids, (), empty.long(), none, (), empty, none, labels)
    model.loss(model(batch), batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - begin)
print(json.dumps(4096 / statistics.median(seconds[4:])))
"""
TABLES = ((26, 100_000, "row_wise_adagrad"), (26, 100_000, "adam"), (26, 10_000, "dense"))


class Checkout:
    """One of the two."""

    def __init__(self, path: Path, scratch: Path, threads: int) -> None:
        self.path, self.scratch, self.threads = path.resolve(), scratch, threads
        self.environment = {**os.environ, "PYTHONPATH": str(self.path / "src"), "OMP_NUM_THREADS": str(threads)}

    def output(self, command: list[str]) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        return done.stdout

    def importing(self, name: str, tables: Path) -> process_tree.Usage:
        """CPU seconds and memory of an import of a comparison table, as a whole program."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            schema = str(self.path / "recipes" / f"{name}.schema.json")
            words = ["data", "import", "csv", str(tables / DATA[name]), f"{folder}/out", "--schema", schema, "--json"]
            return process_tree.run([*FULLRANK, *words], self.environment)

    def training(self, recipe: str, tables: Path) -> float:
        """Rows per second of training steps; the log is imported once."""
        shutil.rmtree(self.scratch / "run", ignore_errors=True)
        name = recipe.rsplit("-", 1)[0]
        settings = [
            f"data.dataset={self.scratch / name}",
            f"data.source.path={tables / DATA[name]}",
            f"data.source.schema_file={self.path / 'recipes' / f'{name}.schema.json'}",
            f"threads={self.threads}",
        ]
        overrides = [word for setting in settings for word in ("--set", setting)]
        file = str(self.path / "recipes" / f"{recipe}.yaml")
        command = [*FULLRANK, "train", file, *overrides, "--out", str(self.scratch / "run"), "--json"]
        return float(json.loads(self.output(command))["samples_per_second"])

    def steps(self, fields: int, rows: int, kind: str) -> float:
        """Rows per second of steps of DeepFM on ids alone."""
        arguments = [str(fields), str(rows), kind, str(self.threads)]
        return float(json.loads(self.output([sys.executable, "-c", STEPS, *arguments])))

    def requests(self, connections: int, seconds: float) -> float:
        """Recommendations per second at a number of connections, of a funnel on a simulated log."""
        demo = self.scratch / "demo"
        if not demo.exists():
            self.output([*FULLRANK, "demo", "--impressions", "100000", "--out", str(demo), "--json"])
        port = free_port()
        with running([*FULLRANK, "serve", str(demo / "bundle"), "--port", str(port)], port, self.environment):
            found = ask(port, "--connections", str(connections), "--seconds", str(seconds))
        if found["failures"]:
            raise RuntimeError(f"{found['failures']} of {found['requests']} requests failed")
        return float(found["per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout")
    parser.add_argument("--after", type=Path, default=HERE, help="another one; default this")
    parser.add_argument("--tables", type=Path, help="of benchmarks.tables; without them training is left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="of load for each line")
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--name", default="before_after", help="of the file of results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {}
        for name, path in (("before", args.before), ("after", args.after)):
            (Path(folder) / name).mkdir()
            checkouts[name] = Checkout(path, Path(folder) / name, args.threads)
        cases: dict[str, Callable[[Checkout], float]] = {}
        if args.tables is not None:
            tables = args.tables.resolve()
            for name in DATA:
                cases[f"import {name}, CPU s (less is better)"] = lambda c, n=name: c.importing(n, tables).cpu_s
                cases[f"import {name}, peak MiB (less is better)"] = lambda c, n=name: (
                    c.importing(n, tables).peak_mib_all
                )
            cases |= {f"train {recipe}, rows/s": lambda c, r=recipe: c.training(r, tables) for recipe in RECIPES}
        for fields, rows, kind in TABLES:
            label = f"{fields} tables of {rows:,} rows, {kind}, rows/s"
            cases[label] = lambda c, f=fields, r=rows, k=kind: c.steps(f, r, k)
        for connections in (1, 16):
            label = f"recommend, {connections} connection{'s' * (connections > 1)}, requests/s"
            cases[label] = lambda c, n=connections: c.requests(n, args.seconds)
        cases = {case: measure for case, measure in cases.items() if args.only in case}
        runs: list[dict[str, Any]] = []
        for repeat in range(args.repeats):
            for case, measure in cases.items():
                order = ("before", "after") if repeat % 2 == 0 else ("after", "before")
                runs.append({"case": case, "repeat": repeat} | {name: measure(checkouts[name]) for name in order})
                print(runs[-1], flush=True)
    results = []
    for case in cases:
        mine = [run for run in runs if run["case"] == case]
        ratios = sorted(run["after"] / run["before"] for run in mine)
        middle = {name: statistics.median(run[name] for run in mine) for name in ("before", "after")}
        spread = {"lowest": ratios[0], "highest": ratios[-1]}
        results.append({"case": case, **middle, "after / before": statistics.median(ratios), **spread})
    table(results, list(results[0]))
    commits = {name: checkout.output(["git", "-C", str(checkout.path), "rev-parse", "--short", "HEAD"]).strip()
               for name, checkout in checkouts.items()}  # fmt: skip
    write(args.name, {"commits": commits, "threads": args.threads, "table": results, "runs": runs})


if __name__ == "__main__":
    main()
