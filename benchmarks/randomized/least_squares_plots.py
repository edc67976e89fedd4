"""Plot of the page on least squares, from the results of its benchmark.

python -m benchmarks.randomized.least_squares_plots
"""

from __future__ import annotations

from benchmarks.randomized.pages import plt, results, write_plot

METHODS = {
    "fullrank auto": "fullrank, auto",
    "fullrank gram": "fullrank, gram",
    "fullrank low precision": "fullrank, low precision",
    "fullrank auto, Parquet": "fullrank, auto, Parquet",
    "fullrank gram, Parquet": "fullrank, gram, Parquet",
    "normal equations": "plain normal equations",
    "LAPACK gelsd": "LAPACK gelsd",
    "scikit-learn": "scikit-learn",
}
STYLES = (("#00796b", "o"), ("#c2571a", "s"), ("#7b4fa3", "^"), ("#888888", "D"))
SMALLEST = 1e-16  # what a double can tell from the optimum


def main() -> None:
    rows = [row for row in results("least_squares") if row["method"] in METHODS]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    conditions = sorted({row["condition"] for row in rows}, key=float)
    figure, (time, excess) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for i, (condition, (colour, marker)) in enumerate(zip(conditions, STYLES, strict=False)):
        style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "none"}
        solved = []
        for row in (row for row in rows if row["condition"] == condition):
            # One above the other, so that no condition hides another.
            place = methods.index(row["method"]) + 0.3 * (i - (len(conditions) - 1) / 2)
            if row["excess"] is None:
                excess.annotate("   no answer", (SMALLEST, place), va="center", fontsize=8, color=colour)
            else:
                solved.append((row["cpu_s"], max(row["excess"], SMALLEST), place))
        seconds, above, places = zip(*solved, strict=True)
        time.plot(seconds, places, label=f"condition 1e{int(condition.split('e')[1])}", **style)
        excess.plot(above, places, **style)
    time.set_yticks(range(len(methods)), [METHODS[method] for method in methods])
    time.invert_yaxis()
    time.set_xscale("log")
    time.set_xlabel("CPU seconds, 1,000,000 x 100")
    excess.set_xscale("log")
    excess.set_xlabel("objective above the best")
    excess.set_xticks([1e-16, 1e-12, 1e-8, 1e-4, 1], ["≤ 1e-16", "1e-12", "1e-8", "1e-4", "1"])
    excess.minorticks_off()
    for axis in (time, excess):
        axis.grid(alpha=0.3)
    time.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    excess.legend(*time.get_legend_handles_labels(), fontsize=8, frameon=False, loc="center")
    write_plot(figure, "least-squares")


if __name__ == "__main__":
    main()
