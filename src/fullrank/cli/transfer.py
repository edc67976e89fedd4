"""`fullrank transfer`: a teacher leaves labels and embeddings on a log, and its students learn from them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fullrank.training.recipe import Recipe
    from fullrank.transfer.config import TransferConfig

app = typer.Typer(help="One foundation model, many small served models.", no_args_is_help=True)

RecipeArgument = Annotated[Path, typer.Argument(help="YAML file with data and a section transfer.")]
OutOption = Annotated[Path, typer.Option(help="Directory of all that the teacher and the students leave.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override: transfer.teacher.delay=600")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("score")
def score(recipe: RecipeArgument, out: OutOption, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Let the teacher predict each window of the log, log labels and embeddings, and learn it.

    Example: fullrank transfer score recipes/cross-domain-transfer.yaml --out runs/transfer
    """
    from fullrank.transfer import run

    settings, config = _read(recipe, set_)
    found = run.score(settings, config, out, str(recipe), _tell)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    embedded = "" if found["embeddings"] is None else f", {found['embeddings']:,} embeddings"
    labelled = ", ".join(f"{events:,} labels of staleness {late}" for late, events in found["labelled"].items())
    print(f"{out}: {len(found['versions'])} versions of the teacher, {labelled}{embedded}")


@app.command("train")
def train(recipe: RecipeArgument, out: OutOption, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Let the students predict each window of the log, and learn it with what the teacher left in --out.

    Example: fullrank transfer train recipes/cross-domain-transfer.yaml --out runs/transfer
    """
    from fullrank.transfer import run

    settings, config = _read(recipe, set_)
    reports = run.train(settings, config, out, str(recipe), _tell)
    if as_json:
        print(json.dumps({name: found.summary()["counts"] for name, found in reports.items()}, indent=2))
        return
    for name, found in reports.items():
        print(f"{name}: {found.counts['trained']:,} events learnt; served from {out / run.SERVED / name}")


@app.command("report")
def report(recipe: RecipeArgument, out: OutOption, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Compare students and teacher on the same rows, each predicted before it was learnt; what share of the teacher's
    gain reached each student, and a chart of NE by the teacher's staleness if students differ in it.

    Example: fullrank transfer report recipes/cross-domain-transfer.yaml --out runs/transfer
    """
    from fullrank.data import atomic
    from fullrank.transfer import run

    settings, config = _read(recipe, set_)
    found = run.report(settings, config, out, str(recipe))
    chart = _chart(found, config)
    if chart:
        atomic.write_text(out / "staleness.svg", chart)
    if as_json:
        print((out / run.REPORT).read_text(encoding="utf-8").rstrip())
        return
    for label, part in found["labels"].items():
        _print(label, part)
    if chart:
        print(f"NE by staleness: {out / 'staleness.svg'}", file=sys.stderr)


@app.command("store")
def store(
    log: Annotated[Path, typer.Argument(help="A log of embeddings: what `score` left in OUT/embeddings.")],
    directory: Annotated[Path, typer.Argument(help="Where a server reads them: SQLite, made if it is not there.")],
    version: Annotated[
        str | None, typer.Option(help="Of the teacher. Default: the first, if there is but one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a version's embeddings from the log to a store of a few users at a time; once more, add what is new.

    Example: fullrank transfer store runs/transfer/embeddings runs/transfer/store
    """
    from fullrank.serving.embedding_store import EmbeddingStore
    from fullrank.transfer import EmbeddingLog

    codes = EmbeddingLog(log)
    known = list(codes.versions)
    if version not in (None, *known) or (version is None and len(known) != 1):
        raise ValueError(f"{log} has the versions {', '.join(known) or 'none'}: name one of them by --version")
    chosen = version or known[0]
    kept = EmbeddingStore.of(directory, codes, chosen)
    if as_json:
        print(json.dumps({"path": str(kept.path), "version": chosen, "events": len(kept)}))
    else:
        print(f"{kept.path}: {len(kept):,} events of {chosen}")


def _read(recipe: Path, set_: list[str] | None) -> tuple[Recipe, TransferConfig]:
    from fullrank.training.recipe import read_recipe
    from fullrank.transfer.config import read_transfer

    settings = read_recipe(recipe, set_)
    return settings, read_transfer(settings, str(recipe))


def _tell(who: str, windows: int, name: str) -> None:
    print(f"{who}: window {windows}, {name}", file=sys.stderr, flush=True)


def _print(label: str, part: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, base = Console(markup=False), part["baseline"]
    table = Table(title=f'"{label}": {part["rows"]:,} rows, each predicted before it was learnt')
    for heading in ("model", "NE", "AUC", "calibration", f"NE - NE of {base}", "transfer ratio"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in part["models"].items():
        numbers = [f"{row[metric].value:.4f}" for metric in ("ne", "auc", "calibration")]
        table.add_row(name, *numbers, _interval(row.get("ne_minus_baseline")), _interval(row.get("transfer_ratio"), 2))
    console.print(table)
    if part["gain"] is not None:
        table = Table(title="what a history of embeddings is worth")
        for heading in ("term", "nats", "NE"):
            table.add_column(heading, justify="left" if heading == "term" else "right")
        for term, found in part["gain"].items():
            table.add_row(term, _interval(found["nats"]), _interval(found["ne"]))
        console.print(table)
    for note in sorted({row["note"] for row in part["models"].values() if "note" in row}):
        print(note, file=sys.stderr)


def _interval(found: Any, digits: int = 4) -> str:
    return "" if found is None else f"{found.value:.{digits}f} ({found.low:.{digits}f}, {found.high:.{digits}f})"


def _chart(found: dict[str, Any], config: TransferConfig) -> str:
    """NE of students that differ in nothing but the teacher's staleness; of the first such group."""
    from fullrank.funnel import charts
    from fullrank.funnel.report_style import ALONE

    label, part = next(iter(found["labels"].items()))
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, row in part["models"].items():
        if "staleness" in row:
            same = config.students[name].model_dump_json(exclude={"staleness"})
            groups.setdefault(same, []).append((row["staleness"], row["ne"].value))
    points = max(groups.values(), key=len, default=[])
    if len(points) < 2:
        return ""
    title = f'NE of "{label}" by windows between what the teacher has learnt and what it labels'
    drawn = charts.curve(title, sorted(points), colour="final", unit="NE", lower_is_better=True, axis="staleness")
    return charts.alone(drawn, ALONE)
