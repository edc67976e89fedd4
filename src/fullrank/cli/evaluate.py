"""`fullrank evaluate`: a bundle on a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fullrank.cli.options import ImportOption


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="The bundle directory.")],
    data: Annotated[Path, typer.Argument(help="The dataset that the bundle was trained on.")],
    split: Annotated[str, typer.Option("--split", help="train, valid or test.")] = "test",
    requests: Annotated[int, typer.Option("--requests", min=1, help="Clicked rows to take recalls over.")] = 2000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of requests.")] = 0,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Metrics of every stage: NE, AUC, calibration, recall; on simulated data also against the oracle.

    Example: fullrank evaluate runs/demo/bundle runs/demo/data
    """
    from rich.console import Console
    from rich.table import Table

    from fullrank.data.dataset import Dataset
    from fullrank.data.simulate import World
    from fullrank.funnel.bundle import load_bundle
    from fullrank.funnel.evaluation import evaluate_funnel
    from fullrank.funnel.funnel import Funnel
    from fullrank.funnel.true_value import true_value
    from fullrank.registry import import_modules
    from fullrank.training.run import defined

    import_modules(imports or (), "--import")
    funnel, dataset = load_bundle(bundle), Dataset.open(data)
    console = Console(stderr=True, markup=False)
    with console.status(f"evaluating {split}"):
        report = evaluate_funnel(funnel, dataset, split, requests=requests, seed=seed)
        world = dataset.path / "world.npz"
        if isinstance(funnel, Funnel) and world.is_file():
            report["true_value"] = true_value(funnel, dataset, World.load(world), split, seed=seed)
    if as_json:
        print(json.dumps(defined(report), allow_nan=False))
        return
    output = Console(markup=False)
    output.print(f"{bundle} on {data}, {split}: {report['rows']:,} rows", highlight=False)
    table = Table()
    oracle = any("oracle_ne" in values for values in report["stages"]["final"].values())
    for name in ("stage", "task", "NE", *(("oracle NE", "gap closed") if oracle else ()), "AUC", "calibration"):
        table.add_column(name, justify="left" if name in ("stage", "task") else "right")
    for stage, tasks in report["stages"].items():
        for task, m in tasks.items():
            extra = (f"{m['oracle_ne']:.4f}", f"{m['gap_closed']:.1%}") if "oracle_ne" in m else ("", "")
            row = (f"{m['ne']:.4f}", *(extra if oracle else ()), f"{m['auc']:.4f}", f"{m['calibration']:.3f}")
            table.add_row(stage, task, *row)
    output.print(table)
    recalls = Table(show_header=False)
    for name, recall in report.get("recall", {}).items():
        recalls.add_row(name.replace("_", " "), f"{recall:,.0f}" if name == "requests" else f"{recall:.3f}")
    for name, recall in report.get("early_recall", {}).items():
        if name != "requests":
            recalls.add_row(f"kept by the early stages of the final stage's {name.replace('_', ' ')}", f"{recall:.3f}")
    for name in ("random", "log", "funnel", "best"):
        if "true_value" in report:
            recalls.add_row(f"true value per request: {name}", f"{report['true_value'][name]:.3f}")
    if recalls.rows:
        output.print("share of the items of positive rows that are found", highlight=False)
        output.print(recalls)
