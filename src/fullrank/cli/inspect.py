"""`fullrank inspect`: what is in a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fullrank.cli.options import ImportOption


def inspect(
    bundle: Annotated[Path, typer.Argument(help="The bundle directory.")],
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Bytes and kinds of the tables of a ranker or a funnel, its parameters and its vocabularies.

    Example: fullrank inspect runs/demo/bundle
    """
    from fullrank.funnel.contents import bundle_contents
    from fullrank.registry import import_modules

    import_modules(imports or (), "--import")
    contents = bundle_contents(bundle)
    if as_json:
        print(json.dumps({"bundle": str(bundle), **contents}, allow_nan=False))
    else:
        _print(bundle, contents)


def _print(bundle: Path, contents: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fullrank.schema import RAW_IDS

    console = Console(markup=False, width=None if sys.stdout.isatty() else 120)
    console.print(f"{bundle}: {contents['bytes']:,} bytes", highlight=False, soft_wrap=True)
    stages = Table()
    for name in ("stage", "kind", "parameters in tables", "others", "bytes of tables", "of others", "of files"):
        stages.add_column(name, justify="left" if name in ("stage", "kind") else "right")
    tables = Table()
    for name in ("stage", "table", "kind", "ids", "values known", "width", "bytes", "of a plain one"):
        tables.add_column(name, justify="left" if name in ("stage", "table", "kind") else "right")
    for stage in contents["stages"]:
        numbers = (*stage["parameters"].values(), stage["table_bytes"], stage["dense_bytes"], stage["files"])
        stages.add_row(stage["stage"], stage["kind"], *(f"{number:,}" for number in numbers))
        for table in stage["tables"]:
            known = contents["vocabularies"].get(table["table"])
            tables.add_row(
                stage["stage"],
                table["table"],
                table["kind"] if table["store"] == "float32" else f"{table['kind']}, {table['store']}",
                f"{table['rows']:,}" if table["rows"] < RAW_IDS else "raw",
                "" if known is None else f"{known:,}",
                f"{table['width']:,}",
                f"{table['bytes']:,}",
                f"{table['bytes'] / table['plain_bytes']:.1%}" if table["rows"] < RAW_IDS else "",
            )
    console.print(stages)
    console.print(tables)
