"""Plots of the pages on sub-sampled Newton and pwSGD, from the results of their benchmarks.

python -m benchmarks.randomized.newton_plots
"""

from __future__ import annotations

from benchmarks.randomized.pages import plt, results, write_plot

SETS = {"small": "100,000 x 100", "tall": "500,000 x 100", "a9a": "a9a: 32,561 x 124, sparse"}
GOALS = {"1e-06": "to 1e-6", "1e-10": "to 1e-10"}
SOLVERS = {
    "ours, auto": ("sub-sampled Newton", "#00796b"),
    "ours, full Newton": ("full Newton, same code", "#7fb8b0"),
    "newton-cholesky": ("newton-cholesky", "#c2571a"),
    "newton-cg": ("newton-cg", "#7b4fa3"),
    "lbfgs": ("lbfgs", "#555555"),
}
METHODS = {
    "SGD, tuned": ("SGD, tuned", "#888888", "v"),
    "Kaczmarz, tuned": ("Kaczmarz, tuned", "#c2571a", "s"),
    "pwSGD, tuned": ("pwSGD, tuned", "#7fb8b0", "^"),
    "pwSGD, auto": ("pwSGD, as it comes", "#00796b", "o"),
}


def subsampled_newton() -> None:
    rows = results("logistic_newton")
    figure, axes = plt.subplots(1, len(SETS), figsize=(9, 3.4))
    for axis, (name, title) in zip(axes, SETS.items(), strict=True):
        seconds = {(row["solver"], row["goal"]): row["cpu_s"] for row in rows if row["set"] == name and "goal" in row}
        for i, (solver, (label, colour)) in enumerate(SOLVERS.items()):
            for j, goal in enumerate(GOALS):
                place, found = j + 0.17 * (i - 2), seconds.get((solver, goal))
                axis.bar(place, found or 0, 0.15, color=colour, label=label if j == 0 else None)
                if found is None:
                    axis.text(place, 0, " not there", rotation=90, ha="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(GOALS)), list(GOALS.values()))
        axis.tick_params(axis="x", length=0)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("CPU seconds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=5, fontsize=8, frameon=False, bbox_to_anchor=(0.5, 0.02))
    write_plot(figure, "subsampled-newton", bbox_inches="tight")


def pwsgd() -> None:
    rows = results("pwsgd")
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.3), sharey=True)
    for axis, loss in zip(axes, ("squared", "absolute"), strict=True):
        for method, (label, colour, marker) in METHODS.items():
            of_method = [row for row in rows if row["method"] == method and row["loss"] == loss]
            conditions, errors = ([float(row[key]) for row in of_method] for key in ("condition", "error"))
            axis.loglog(conditions, errors, color=colour, marker=marker, markersize=4, label=label)
        axis.set_title(f"{loss} loss", fontsize=10)
        axis.set_xlabel("condition of the table")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error over the minimum")
    axes[1].legend(fontsize=8, frameon=False, loc="center right")
    write_plot(figure, "pwsgd")


if __name__ == "__main__":
    subsampled_newton()
    pwsgd()
