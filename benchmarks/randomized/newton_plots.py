"""Plots of the pages on sub-sampled Newton and pwSGD, from the results of their benchmarks.

python benchmarks/randomized/newton_plots.py
"""

from __future__ import annotations

from pages import plt, results, write_plot

SOLVERS = {
    "ours, auto": ("sub-sampled Newton", "#00796b"),
    "ours, full Newton": ("full Newton, same code", "#7fb8b0"),
    "newton-cholesky": ("newton-cholesky", "#c2571a"),
    "newton-cg": ("newton-cg", "#7b4fa3"),
    "lbfgs": ("lbfgs", "#888888"),
}


def subsampled_newton() -> None:
    rows = [row for row in results("logistic_newton") if row["set"] != "adult"]
    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, goal in zip(axes, ("1e-06", "1e-10"), strict=True):
        for i, (solver, (label, colour)) in enumerate(SOLVERS.items()):
            found = {row["set"]: row["cpu_s"] for row in rows if row["solver"] == solver and row["goal"] == goal}
            places = [j + 0.16 * (i - 2) for j in range(len(sets))]
            axis.bar(places, [found.get(name) or 0 for name in sets], 0.15, color=colour, label=label)
        axis.set_yscale("log")
        axis.set_xticks(range(len(sets)), sets)
        axis.set_title(f"CPU seconds to {goal} of the minimum", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    write_plot(figure, "subsampled-newton")


def pwsgd() -> None:
    rows = results("pwsgd")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, loss in zip(axes, ("squared", "absolute"), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            of_method = [row for row in rows if row["method"] == method and row["loss"] == loss]
            conditions, errors = ([float(row[key]) for row in of_method] for key in ("condition", "error"))
            axis.loglog(conditions, errors, marker="o", markersize=4, label=method)
        axis.set_title(f"{loss} loss", fontsize=10)
        axis.set_xlabel("condition of the table")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("error over the minimum")
    axes[1].legend(fontsize=8, frameon=False)
    write_plot(figure, "pwsgd")


if __name__ == "__main__":
    subsampled_newton()
    pwsgd()
