"""Plots of the pages on LoopFM and ExFM, from the results of their benchmarks.

python -m benchmarks.transfer.plots
"""

from __future__ import annotations

import json

from benchmarks.machine import RESULTS
from benchmarks.randomized.pages import plt, write_plot


def staleness() -> None:
    curve = json.loads((RESULTS / "transfer_exfm.json").read_text())["staleness"]
    figure, axis = plt.subplots(figsize=(5.2, 3.2))
    arms = [name for name in curve[0] if name != "staleness"]
    for name, colour in zip(arms, ("#c2571a", "#7fb8b0", "#00796b"), strict=True):
        axis.plot([row["staleness"] for row in curve], [row[name] for row in curve], "o-", color=colour, label=name)
    axis.set_xlabel("days between what the teacher has learnt and what it labels")
    axis.set_ylabel("NE of the student")
    axis.legend(frameon=False, fontsize=8)
    write_plot(figure, "exfm")


def leak() -> None:
    rows = json.loads((RESULTS / "transfer_leak.json").read_text())["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 2.6))
    colours = ["#c2571a", "#7b4fa3", "#00796b", "#7fb8b0"]
    for axis, metric in zip(axes, ("auc", "ne"), strict=True):
        axis.barh([row["what"] for row in rows][::-1], [row[metric] for row in rows][::-1], color=colours[::-1])
        axis.set_xlim(*((0.5, 0.95) if metric == "auc" else (0.5, 1.5)))
        axis.set_title(metric.upper(), fontsize=10)
    axes[1].axvline(1, color="#888888", linewidth=0.8)
    axes[1].set_yticklabels([])
    write_plot(figure, "loopfm")


if __name__ == "__main__":
    staleness()
    leak()
