"""`fullrank compare`: two bundles on a dataset."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from fullrank.cli.options import ImportOption

# What is left after a stage of what the bundle's own final stage would find in the whole catalogue.
_CASCADE = {"recall": "best items left", "value": "their value left", "true_value": "true value"}
_NAMES = {"ne": "NE", "auc": "AUC", "calibration_error": "calibration error", "rmse": "RMSE", "mae": "MAE"}


def compare(
    a: Annotated[Path, typer.Argument(help="A bundle directory.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Another one.", metavar="B")],
    data: Annotated[Path, typer.Argument(help="A dataset that both understand.")],
    split: Annotated[str, typer.Option("--split", help="train, valid or test.")] = "test",
    requests: Annotated[int, typer.Option("--requests", min=1, help="Clicked rows to take recalls over.")] = 2000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of requests, and of the resamples.")] = 0,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Differences B - A of two rankers, or funnels, on the same rows, with 95 % intervals and a verdict.

    Example: fullrank compare runs/day1/model runs/day2/model data/day2
    """
    from rich.console import Console
    from rich.table import Table

    from fullrank.data.dataset import Dataset
    from fullrank.funnel.bundle import load_bundle
    from fullrank.funnel.compare import compare_funnels
    from fullrank.funnel.true_value import world_of
    from fullrank.registry import import_modules
    from fullrank.training.run import defined

    import_modules(imports or (), "--import")
    first, second, dataset = load_bundle(a), load_bundle(b), Dataset.open(data)
    with Console(stderr=True, markup=False).status(f"comparing on {split}"):
        report = compare_funnels(first, second, dataset, split, requests=requests, seed=seed, world=world_of(dataset))
    if as_json:
        print(json.dumps(defined(report), allow_nan=False))
        return
    output = Console(markup=False, width=None if sys.stdout.isatty() else 120)
    output.print(f"A {a}, B {b}, on {data}, {split}: {report['rows']:,} rows", highlight=False, soft_wrap=True)
    asked = report.get("recall", {}).get("requests")
    caption = f"95 % intervals; {report['resampled']} resampled, the same for both"
    if asked is not None:
        caption += f"; recall over {asked:,} requests"
    if "cascade" in report:
        caption += f"; best items, their value and true value over {report['cascade']['requests']:,}"
    table = Table(caption=caption, caption_justify="left")
    for name in ("", "", "A", "B", "B - A", "interval", "verdict"):
        table.add_column(name, justify="left" if name in ("", "verdict") else "right")
    recalls = {place: found for place, found in report.get("recall", {}).items() if place != "requests"}
    whole = [(_CASCADE[name], rows) for name, rows in report.get("cascade", {}).items() if name != "requests"]
    for what, rows in (*report["tasks"].items(), ("recall", recalls), *whole):
        for metric, found in rows.items():
            low, high = found["interval"]
            table.add_row(
                what,
                _NAMES.get(metric, metric.replace("_", " ")),
                *(_number(found[side], ".4f") for side in ("a", "b")),
                _number(found["difference"], "+.4f"),
                "" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}",
                found["verdict"],
            )
    output.print(table)
    task, metrics = next(iter(report["tasks"].items()))
    output.print(f"{report['verdict']} ({task}, {_NAMES[next(iter(metrics))]})", highlight=False)


def _number(value: float, form: str) -> str:
    return "undefined" if math.isnan(value) else f"{value:{form}}"
