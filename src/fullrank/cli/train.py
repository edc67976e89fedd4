"""`fullrank train`: one recipe, one model, one funnel or one retriever."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, or the name of a recipe of fullrank.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override: training.learning_rate=0.002")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<name of the recipe>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")] = False,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="BUNDLE", help="Go on training the ranker of a bundle.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train the model of a recipe, test it, and write a bundle and report.html.

    Example: fullrank train recipes/movielens-1m-dcn_v2.yaml --set training.epochs=2
    """
    from fullrank.funnel.report import run_page
    from fullrank.training.recipe import read_recipe
    from fullrank.training.run import run

    settings = read_recipe(recipe, set_)
    with _progress() as bar:
        task = bar.add_task("", total=None)

        def show(stage: str, step: int, steps: int, loss: float) -> None:
            detail = "" if math.isnan(loss) else f", loss {loss:.4f}"
            bar.update(task, completed=step, total=steps or None, description=f"{stage}{detail}")

        directory = out or Path("runs") / recipe.stem
        report = run(
            settings,
            directory,
            resume=resume,
            overwrite=overwrite,
            start=start,
            progress=show,
            source=str(recipe),
            page=run_page,
        )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    summary = report.summary()
    if as_json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    elif "retriever" in summary:
        _print_retriever(summary)
    else:
        _print(summary)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _number(metrics: dict[str, float | None], name: str) -> str:
    value = metrics.get(name, math.nan)
    return "undefined" if value is None else "" if math.isnan(value) else f"{value:.5f}"


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows: list[tuple[str, str, dict[str, float]]] = []
    if "model" in report:
        epochs = f"{report['epochs']} epoch{'' if report['epochs'] == 1 else 's'}"
        title = f"{report['model']}: {report['parameters']['total']:,} parameters, {epochs}"
        for split, values in report["tasks"].items():
            rows += [(split, label, metrics) for label, metrics in values.items()]
    else:
        title = "funnel"
        for split in ("valid", "test"):
            for stage, tasks in report.get(split, {}).get("stages", {}).items():
                rows += [(split, f"{stage}: {label}", metrics) for label, metrics in tasks.items()]
    columns = {"auc": "AUC", "gauc": "GAUC", "ne": "NE", "logloss": "logloss", "calibration": "calibration"}
    columns["mse"] = "MSE"
    shown = [name for name in columns if any(name in metrics for *_, metrics in rows)]
    console = Console(markup=False)
    console.print(title, highlight=False)
    table = Table()
    for heading in ("split", "label", *(columns[name] for name in shown)):
        table.add_column(heading, justify="left" if heading in ("split", "label") else "right")
    for split, label, metrics in rows:
        table.add_row(split, label, *(_number(metrics, name) for name in shown))
    if rows:
        console.print(table)
    else:
        print("the dataset has no validation and no test rows: nothing could be measured", file=sys.stderr)
    if "model" in report:
        speed = report["samples_per_second"]
        told = "nothing was left to train" if speed is None else f"{speed:,.0f} samples/s in training"
        print(f"{told}, {report['precision']}", file=sys.stderr)
    for split in ("valid", "test"):
        recall = report.get(split, {}).get("recall", {})
        if recall:
            stages = {stage: f"after the {stage} stage" for stage in report[split]["stages"] if stage != "final"}
            text = ", ".join(f"{name} {recall[key]:.3f}" for key, name in (_RECALLS | stages).items())
            print(f"{split}: share of {recall['requests']:,.0f} positive rows' items found: {text}", file=sys.stderr)
    print(f"report: {report['run']}/report.html", file=sys.stderr)
    print(f"run written to {report['run']}; serve it: fullrank serve {report['bundle']}", file=sys.stderr)


def _print_retriever(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)
    console.print(f"{report['retriever']}: {report['items']:,} items", highlight=False)
    table = Table()
    for heading in ("split", "users", "by", "recall@20", "NDCG@20", "recall@100", "NDCG@100"):
        table.add_column(heading, justify="left" if heading in ("split", "by") else "right")
    for split in ("valid", "test"):
        for name, values in report.get(split, {}).items():
            shown = (values[f"{metric}_at_{k}"] for k in (20, 100) for metric in ("recall", "ndcg"))
            table.add_row(split, f"{values['users']:,.0f}", name, *(f"{value:.4f}" for value in shown))
    if table.rows:
        console.print(table)
    else:
        print("the dataset has no validation and no test rows: nothing could be measured", file=sys.stderr)
    print(f"report: {report['run']}/report.html", file=sys.stderr)
    print(f"run written to {report['run']}; ask it: fullrank retrieve {report['run']} --user ID", file=sys.stderr)


_RECALLS = {
    "popularity_at_100": "100 most popular",
    "retrieval_at_100": "first 100 of retrieval",
    "retrieval": "all of retrieval",
}
