"""`fullrank quantize`: a bundle with its tables in fewer bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fullrank.cli.options import ImportOption


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
    from fullrank.funnel.bundle import load_bundle, save_bundle
    from fullrank.funnel.quantizing import quantize_content
    from fullrank.registry import import_modules
    from fullrank.training.manifest import read_manifest

    import_modules(imports or (), "--import")
    content = load_bundle(bundle)
    settings = {"bits": bits, "method": method, "tables": tables, "max_error": max_error}
    try:
        smaller, report = quantize_content(content, **settings)
    except ValueError as error:
        raise ValueError(f"{bundle}: {error}") from None
    about = {**read_manifest(bundle).about, "quantized": {"from": str(bundle), "bits": bits, "method": method}}
    save_bundle(smaller, out, about=about, overwrite=overwrite)
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
    for name in ("stage", "table", "rows", "width", "bytes", "now", "error", ""):
        table.add_column(name, justify="left" if name in ("stage", "table", "") else "right")
    for part in report["parts"]:
        sizes = [f"{part[name]:,}" for name in ("rows", "width", "before", "after")]
        error = "" if part["left"] else f"{part['normalized_l2']:.4f}"
        table.add_row(part["stage"], part["name"].removesuffix(".weight"), *sizes, error, part["left"] or "")
    share = report["after"] / report["before"]
    table.caption = f"tables: {report['before']:,} bytes, now {report['after']:,} ({share:.1%})"
    Console(markup=False, width=None if sys.stdout.isatty() else 140).print(table)
