"""Plots of the pages on kernel features and tensor machines, from the results of their benchmarks.

python -m benchmarks.randomized.kernel_plots
"""

from __future__ import annotations

from benchmarks.randomized.pages import plt, results, write_plot

STYLES = {
    "mc": ("drawn", "#888888", "o"),
    "orthogonal": ("orthogonal", "#c2571a", "s"),
    "halton": ("Halton", "#7b4fa3", "v"),
    "sobol": ("Sobol", "#00796b", "^"),
}


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
    write_plot(figure, "qmc-features")


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
    write_plot(figure, "tensor-machines", bbox_inches="tight")


if __name__ == "__main__":
    kernel_features()
    tensor_machines()
