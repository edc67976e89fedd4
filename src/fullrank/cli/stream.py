"""`fullrank stream`: a log window by window, predicted, learnt and published."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def stream(
    recipe: Annotated[Path, typer.Argument(help="YAML file with a model or a funnel, and a section stream.")],
    out: Annotated[Path, typer.Option(help="Directory of the stream: bundles, deltas, current.json.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override: stream.window=3600")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="BUNDLE", help="Go on from a bundle, in the first call.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for further files, for ever.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict, learn and publish a log window by window, from where the last call in --out ended.

    Example: fullrank stream recipe.yaml --out runs/stream --set stream.window=86400
    """
    from fullrank.funnel.stream_report import stream_page
    from fullrank.training.recipe import read_recipe
    from fullrank.training.stream import stream as run_stream

    settings = read_recipe(recipe, set_)

    def show(windows: int, name: str) -> None:
        print(f"window {windows} published: {name}", file=sys.stderr, flush=True)

    report = run_stream(settings, out, start=start, follow=follow, progress=show, source=str(recipe), page=stream_page)
    summary = report.summary()
    if as_json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        _print(summary, report.judge)


def _print(report: dict[str, Any], judge: str) -> None:
    from rich.console import Console
    from rich.table import Table

    counts, windows = report["counts"], report["windows"]
    console = Console(markup=False)
    table = Table(title=f'last windows, label "{judge}"')
    names = {"ne": "NE", "auc": "AUC", "calibration": "calibration", "mse": "MSE"}
    shown = [name for name in names if any(name in window["metrics"].get(judge, {}) for window in windows)]
    for heading in ("window", "rows", "late", *(names[name] for name in shown), "older", "back"):
        table.add_column(heading, justify="left" if heading == "window" else "right", no_wrap=heading == "window")
    for window in windows[-10:]:
        metrics = window["metrics"].get(judge, {})
        older = (window["older"] or {"metrics": {}})["metrics"].get(judge, {})
        numbers = [metrics.get(name) for name in shown] + [older.get(shown[0]) if shown else None]
        cells = ["" if number is None else f"{number:.5f}" for number in numbers]
        back = "yes" if window["rolled_back"] else ""
        table.add_row(window["window"], f"{window['rows']:,}", f"{window['late']:,}", *cells, back)
    if windows:
        console.print(table)
    else:
        print("no window has ended since the last call", file=sys.stderr)
    waiting = counts["rows"] - counts["trained"] - counts["left_aside"] - counts["rolled_back"]
    print(
        f"{counts['windows']:,} windows so far: {counts['trained']:,} events learnt, {counts['late']:,} of them late, "
        f"{counts['refused']:,} refused, {counts['rolled_back']:,} rolled back, "
        f"{counts['forgotten']:,} left out of forgotten users; "
        f"{waiting:,} wait for the end of a window",
        file=sys.stderr,
    )
    current = report["current"]
    if current is not None:
        print(
            f"served: {report['directory']}/{current['bundle']}, {len(current['deltas'])} deltas ({current['reason']})",
            file=sys.stderr,
        )
