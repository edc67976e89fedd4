"""`fullrank prune`: a bundle without the rows of rare ids."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fullrank.cli.options import ImportOption


def prune(
    bundle: Annotated[Path, typer.Argument(help="The bundle, of a ranker or a funnel; it stays as it is.")],
    out: Annotated[Path, typer.Argument(help="The new bundle.")],
    min_count: Annotated[
        int | None, typer.Option(help="Drop the rows of ids that training saw less often than this.")
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Or drop this share of the ids of each table, from the least on.")
    ] = None,
    by: Annotated[str, typer.Option(help="What is least: the count in training, or the norm of the row.")] = "count",
    tables: Annotated[
        list[str] | None, typer.Option("--tables", help="Prune this table; may be repeated. Default all plain ones.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier bundle in OUT.")] = False,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a bundle whose plain tables store the rows of some ids only; the others have the zero vector.

    Example: fullrank prune runs/demo/bundle runs/demo/bundle-pruned --min-count 5
    """
    from fullrank.funnel.bundle import load_bundle, save_bundle
    from fullrank.funnel.pruning import prune_content
    from fullrank.registry import import_modules
    from fullrank.training.manifest import read_manifest

    import_modules(imports or (), "--import")
    content = load_bundle(bundle)
    settings = {"by": by, "min_count": min_count, "share": share, "tables": tables}
    try:
        smaller, report = prune_content(content, **settings)
    except ValueError as error:
        raise ValueError(f"{bundle}: {error}") from None
    pruned = {"from": str(bundle), "by": by, "min_count": min_count, "share": share}
    save_bundle(smaller, out, about={**read_manifest(bundle).about, "pruned": pruned}, overwrite=overwrite)
    if as_json:
        print(json.dumps({"bundle": str(out), **report}, allow_nan=False))
        return
    _print(report)
    for stage in report["left"]:
        print(f"stage {stage} stays as it is", file=sys.stderr)
    print(f"written to {out}; what it costs in quality: fullrank compare {bundle} {out} DATA", file=sys.stderr)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("stage", "table", "rows", "kept", "bytes", "now", ""):
        table.add_column(name, justify="left" if name in ("stage", "table", "") else "right")
    for part in report["parts"]:
        sizes = [f"{part[name]:,}" for name in ("rows", "kept", "before", "after")]
        table.add_row(part["stage"], part["table"], *sizes, part["left"] or "")
    table.caption = f"tables: {report['before']:,} bytes, now {report['after']:,}"
    Console(markup=False, width=None if sys.stdout.isatty() else 140).print(table)
