"""Plots of the page on quantile regression, from the results of its benchmarks.

python -m benchmarks.randomized.quantile_plots
"""

from __future__ import annotations

from benchmarks.randomized.pages import plt, results, write_plot

SIDES = {
    "fullrank": ("fullrank", "#00796b", "o"),
    "pyfixest fn, solver alone": ("pyfixest, solver alone", "#7b4fa3", "s"),
    "statsmodels": ("statsmodels", "#c2571a", "^"),
    "scikit-learn highs-ipm": ("scikit-learn highs-ipm", "#888888", "v"),
    "scikit-learn highs": ("scikit-learn highs", "#333333", "D"),
}
CONDITIONINGS = {"none": "#888888", "spc1": "#7b4fa3", "spc3": "#00796b", "uniform": "#c2571a"}


def main() -> None:
    figure, (speed, error) = plt.subplots(1, 2, figsize=(8.5, 3.6))
    for side, (label, colour, marker) in SIDES.items():
        rows = [
            (row["rows"], row["cpu_s"])
            for row in results("quantile_regression")
            if row["side"] == side and row["columns"] == 20 and row["quantile"] == 0.5 and row["excess"] is not None
        ]
        if rows:
            speed.loglog(*zip(*sorted(rows), strict=True), color=colour, marker=marker, markersize=4, label=label)
    speed.set_xlabel("rows, 20 columns, median")
    speed.set_ylabel("CPU seconds")
    speed.set_ylim(top=3e3)  # room for the legend
    speed.grid(alpha=0.3)
    speed.legend(fontsize=8, frameon=False, loc="upper left")
    for kind, colour in CONDITIONINGS.items():
        rows = [
            (row["size"], row["worst_error"])
            for row in results("quantile_sampling")
            if row["conditioning"] == kind and row["quantile"] == 0.5 and row["worst_error"] is not None
        ]
        if rows:
            error.loglog(*zip(*sorted(rows), strict=True), color=colour, marker="o", markersize=4, label=kind)
    error.set_xlabel("rows of the sample, rare features, median")
    error.set_ylabel("error of the worst coefficient")
    error.set_xticks(sizes := sorted({row["size"] for row in results("quantile_sampling")}), [f"{n:,}" for n in sizes])
    error.minorticks_off()
    error.grid(alpha=0.3)
    error.legend(fontsize=8, frameon=False)
    write_plot(figure, "quantile-regression")


if __name__ == "__main__":
    main()
