"""`fullrank prune`: a bundle without the rows of rare ids."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fullrank.cli.options import ImportOption
from fullrank.cli.smaller import write_smaller


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
    from fullrank.funnel.pruning import prune_content
    from fullrank.registry import import_modules

    import_modules(imports or (), "--import")
    settings = {"by": by, "min_count": min_count, "share": share, "tables": tables}
    about = {"pruned": {"from": str(bundle), "by": by, "min_count": min_count, "share": share}}
    change = partial(prune_content, **settings)
    write_smaller(bundle, out, change, about, _print, overwrite=overwrite, as_json=as_json)


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
