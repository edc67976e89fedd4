"""Plots of the pages on kernel features and tensor machines, from the results of their benchmarks.

python benchmarks/randomized/kernel_plots.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
PAGES = HERE.parents[1] / "docs" / "papers"
STYLES = {
    "mc": ("drawn", "#888888", "o"),
    "orthogonal": ("orthogonal", "#c2571a", "s"),
    "halton": ("Halton", "#7b4fa3", "v"),
    "sobol": ("Sobol", "#00796b", "^"),
}


def results(name: str) -> list[dict[str, Any]]:
    return json.loads((HERE.parent / "results" / "randomized" / f"{name}.json").read_text())["results"]


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(PAGES / f"{name}.svg", metadata={"Date": None})
    print(f"written: docs/papers/{name}.svg")


def kernel_features() -> None:
    rows = [row for row in results("kernel_features") if row["part"] == "error"]
    names = [
        name
        for name in ("diabetes", "forest", "digits", "forest, with indicators")
        if any(r["set"] == name for r in rows)
    ]
    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        of_set = sorted((row for row in rows if row["set"] == name), key=lambda row: row["s"])
        for sequence, (label, colour, marker) in STYLES.items():
            sizes, errors = [row["s"] for row in of_set], [row[sequence] for row in of_set]
            axis.loglog(sizes, errors, color=colour, marker=marker, markersize=4, label=label, base=2)
        axis.set_yscale("log", base=10)
        axis.set_title(f"{name}, d = {of_set[0]['d']}", fontsize=10)
        axis.set_xlabel("frequencies")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative kernel error")
    axes[0].legend(fontsize=8, frameon=False)
    save(figure, "qmc-features")


def tensor_machines() -> None:
    rows = results("tensor_machines")
    names = list(dict.fromkeys(row["set"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(2.4 * len(names), 3))
    colours = {row["method"].split(",")[0]: f"C{i}" for i, row in enumerate(rows[:6])}
    for axis, name in zip(axes, names, strict=True):
        for row in (row for row in rows if row["set"] == name):
            method = row["method"].split(",")[0]
            filled = {} if "steps" not in row["method"] else {"markerfacecolor": "none"}
            label = row["method"] if "steps" in row["method"] else method
            axis.semilogx(row["numbers"], row["error"], "o", color=colours[method], label=label, **filled)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("numbers per row")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test error")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=8, frameon=False, bbox_to_anchor=(0.5, -0.08))
    figure.tight_layout()
    figure.savefig(PAGES / "tensor-machines.svg", metadata={"Date": None}, bbox_inches="tight")
    print("written: docs/papers/tensor-machines.svg")


if __name__ == "__main__":
    kernel_features()
    tensor_machines()
