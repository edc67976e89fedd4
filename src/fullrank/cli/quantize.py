"""`fullrank quantize`: a bundle with its tables in fewer bits."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fullrank.cli.options import ImportOption
from fullrank.cli.smaller import write_smaller


def quantize(
    bundle: Annotated[Path, typer.Argument(help="The bundle, of a ranker or a funnel; it stays as it is.")],
    out: Annotated[Path, typer.Argument(help="The new bundle.")],
    bits: Annotated[int, typer.Option(help="Of a number: 2, 4 or 8.")] = 4,
    method: Annotated[
        str,
        typer.Option(help="How a row's range is found: greedy, least_squares (smaller error), minmax (fastest), ..."),
    ] = "greedy",
    tables: Annotated[
        list[str] | None, typer.Option("--tables", help="Quantise this table; may be repeated. Default all.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(min=0, help="Leave tables whose normalised L2 error would be larger.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier bundle in OUT.")] = False,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a bundle whose tables are stored, served and held in memory as codes of a few bits.

    Example: fullrank quantize runs/demo/bundle runs/demo/bundle-4bit
    """
    from fullrank.funnel.quantizing import quantize_content
    from fullrank.registry import import_modules

    import_modules(imports or (), "--import")
    settings = {"bits": bits, "method": method, "tables": tables, "max_error": max_error}
    about = {"quantized": {"from": str(bundle), "bits": bits, "method": method}}
    change = partial(quantize_content, **settings)
    write_smaller(bundle, out, change, about, _print, overwrite=overwrite, as_json=as_json)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("stage", "table", "rows", "width", "bytes", "now", "error", ""):
        table.add_column(name, justify="left" if name in ("stage", "table", "") else "right")
    for part in report["parts"]:
        sizes = [f"{part[name]:,}" for name in ("rows", "width", "before", "after")]
        error = "" if part["left"] else f"{part['normalized_l2']:.4f}"
        table.add_row(part["stage"], part["name"].removesuffix(".weight"), *sizes, error, part["left"] or "")
    share = report["after"] / report["before"]
    table.caption = f"tables: {report['before']:,} bytes, now {report['after']:,} ({share:.1%})"
    Console(markup=False, width=None if sys.stdout.isatty() else 140).print(table)
