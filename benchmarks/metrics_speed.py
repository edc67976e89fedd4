"""AUC and GAUC of a large log: ours, scikit-learn, a loop over users, TorchRec and FuxiCTR.

    python -m benchmarks.metrics_speed --fuxictr ENVIRONMENT/bin/python

Logits are float32 and normal, clicks are drawn from them, so are users: with equal odds, or by a power law (user
u of U has odds proportional to u ** -1/2). All sides get the same arrays and must agree on the value to 1e-9, but for
TorchRec's GAUC, which counts users once, computes in float32, and lets the order of the rows decide ties: it must agree
to 1e-4 with our uniform weighting. It pads every user to the length of the longest, so only the equal odds fit into
memory. Medians; the loop runs once, and so does FuxiCTR, on the equal odds only: it needs minutes for 100,000 users,
whose rows it sends one user at a time to a pool of worker processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, rankdata
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.machine import table, write
from fullrank import metrics

PEER = Path(__file__).parent / "peers" / "fuxictr_metrics.py"


def log(rows: int, users: int, law: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_n = torch.randn(rows, generator=generator) - 2
    labels_n = (torch.rand(rows, generator=generator) < torch.sigmoid(logits_n)).float()
    uniform_n = torch.rand(rows, generator=generator, dtype=torch.float64)
    return logits_n, labels_n, ((uniform_n**2 if law == "power law" else uniform_n) * users).long()


def timed(call: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Value and median seconds, after one call to warm up where there are several."""
    value = call() if repeats > 1 else 0.0
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        value = call()
        seconds.append(time.perf_counter() - begin)
    return value, statistics.median(seconds)


def loop(logits: Tensor, labels: Tensor, users: Tensor) -> float:
    """What a careful user writes: sort by user once, then rank each user's rows that have both classes."""
    order = np.argsort(users.numpy(), kind="stable")
    z, y, u = (values.numpy()[order] for values in (logits, labels, users))
    cuts = np.flatnonzero(np.diff(u, prepend=-1, append=-1))
    total = mass = 0.0
    for low, high in itertools.pairwise(cuts.tolist()):
        y_user = y[low:high]
        rows, clicks = high - low, float(y_user.sum())
        if 0 < clicks < rows:
            won = float(rankdata(z[low:high]) @ y_user) - clicks * (clicks + 1) / 2
            total += rows * won / (clicks * (rows - clicks))
            mass += rows
    return total / mass


def torchrec_gauc(logits: Tensor, labels: Tensor, users: Tensor) -> float | None:
    """None where TorchRec is not installed."""
    try:
        from torchrec.metrics.gauc import compute_window_auc, get_auc_states
    except (ImportError, OSError):
        return None
    order = torch.argsort(users)
    # Zero is padding to it, so it gets probabilities.
    p, y = torch.sigmoid(logits[order])[None], labels[order][None]
    states = get_auc_states(y, p, torch.ones_like(p), torch.bincount(users))
    return float(compute_window_auc(states["auc_sum"], states["num_samples"])["gauc"])


def fuxictr(python: str, arrays: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        for name, values in zip(("scores", "labels", "users"), arrays, strict=True):
            np.save(Path(folder) / f"{name}.npy", values.numpy())
        done = subprocess.run([python, str(PEER), folder], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(done.stdout.splitlines()[-1])


def measure(law: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    arrays = logits, labels, users = log(args.rows, args.users, law, args.seed)
    weights = torch.rand(args.rows, generator=torch.Generator().manual_seed(args.seed + 1))
    rows: list[dict[str, Any]] = []

    def add(metric: str, side: str, value: float, seconds: float) -> None:
        rows.append({"users": law, "metric": metric, "side": side, "value": value, "ms": seconds * 1e3})

    add("AUC", "fullrank", *timed(lambda: metrics.auc(logits, labels), 9))
    add("AUC", "scikit-learn", *timed(lambda: float(roc_auc_score(labels.numpy(), logits.numpy())), 3))
    add("GAUC", "fullrank", *timed(lambda: metrics.gauc(logits, labels, users).value, 9))
    add("GAUC", "loop over users, SciPy ranks", *timed(lambda: loop(*arrays), 1))
    if args.fuxictr and law == "equal odds":
        theirs = fuxictr(args.fuxictr, arrays)
        for name in ("AUC", "gAUC"):
            add(name.upper(), f"FuxiCTR {theirs['version']}", *theirs[name].values())
    for metric in ("AUC", "GAUC"):
        ours, *others = (row for row in rows if row["metric"] == metric)
        for row in (ours, *others):
            assert abs(row["value"] - ours["value"]) < 1e-9, row
            row["times_ours"] = row["ms"] / ours["ms"]
    if law == "equal odds" and torchrec_gauc(*arrays) is not None:
        uniform = timed(lambda: metrics.gauc(logits, labels, users, weighting="uniform").value, 9)
        theirs = timed(lambda: torchrec_gauc(*arrays) or 0.0, 3)
        add("GAUC, users once", "fullrank", *uniform)
        add("GAUC, users once", "TorchRec 1.8.0", *theirs)
        assert abs(uniform[0] - theirs[0]) < 1e-4
        rows[-2]["times_ours"], rows[-1]["times_ours"] = 1.0, theirs[1] / uniform[1]
    names = torch.randint(-(1 << 62), 1 << 62, (args.users,), generator=torch.Generator().manual_seed(args.seed))
    add("AUC, weighted rows", "fullrank", *timed(lambda: metrics.auc(logits, labels, weights), 5))
    add("GAUC, weighted rows", "fullrank", *timed(lambda: metrics.gauc(logits, labels, users, weights).value, 5))
    add("GAUC, float64", "fullrank", *timed(lambda: metrics.gauc(logits.double(), labels, users).value, 5))
    add(
        "GAUC, users are 64-bit hashes", "fullrank", *timed(lambda: metrics.gauc(logits, labels, names[users]).value, 5)
    )
    binned = metrics.BinnedMetrics()
    binned_seconds = timed(lambda: binned.update(logits, labels) or 0.0, 5)[1]
    add("all of BinnedMetrics", "fullrank", binned.compute()["auc"], binned_seconds)
    exact = metrics.BinaryMetrics()
    exact.update(logits, labels, weights, users)
    add("all of BinaryMetrics, weighted", "fullrank", *timed(lambda: exact.compute()["gauc"], 3))
    return rows


def rank_agreement(requests: int, candidates: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(requests, candidates, generator=generator) for _ in range(2))
    ours = timed(lambda: metrics.kendall_tau(first, second), 5)
    pairs = list(zip(first.numpy(), second.numpy(), strict=True))
    theirs = timed(lambda: float(np.mean([kendalltau(a, b).statistic for a, b in pairs])), 3)
    assert abs(ours[0] - theirs[0]) < 1e-9
    return [
        {
            "metric": f"tau-b, {requests} x {candidates}",
            "side": side,
            "value": value,
            "ms": seconds * 1e3,
            "times_ours": seconds / ours[1],
        }
        for side, (value, seconds) in (("fullrank", ours), ("SciPy, a loop", theirs))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--laws", nargs="+", choices=("equal odds", "power law"), default=["equal odds", "power law"])
    parser.add_argument("--fuxictr", help="Python interpreter of an environment with FuxiCTR; left out without it")
    args = parser.parse_args()
    rows = [row for law in args.laws for row in measure(law, args)]
    rows += rank_agreement(2000, 50, args.seed) + rank_agreement(200, 1000, args.seed)
    table(rows, ["users", "metric", "side", "value", "ms", "times_ours"])
    settings = {"rows": args.rows, "users": args.users, "seed": args.seed, "threads": torch.get_num_threads()}
    write("metrics_speed", {"settings": settings, "command": "benchmarks.metrics_speed", "results": rows})


if __name__ == "__main__":
    main()
