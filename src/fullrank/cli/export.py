"""`fullrank export`: a ranker of a bundle as a program for another runtime."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from fullrank.cli.options import ImportOption


def export(
    bundle: Annotated[Path, typer.Argument(help="The bundle, of a ranker or a funnel.")],
    out: Annotated[Path, typer.Argument(help="The new directory.")],
    format: Annotated[str, typer.Option("--format", help="torch-export or onnx.")] = "torch-export",
    stage: Annotated[str, typer.Option("--stage", help="Which ranker of a funnel.")] = "final",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier directory OUT.")] = False,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a ranker as a program of plain tensors, with model.json, which says what goes in and what comes out.

    The program is compared with the ranker on random input first.

    Example: fullrank export runs/demo/bundle runs/demo/final --format torch-export
    """
    from fullrank.funnel.bundle import load_bundle
    from fullrank.funnel.exporting import FILES, Format, export_ranker
    from fullrank.registry import import_modules

    if format not in FILES:
        raise ValueError(f'--format is "{format}", expected {" or ".join(FILES)}')
    import_modules(imports or (), "--import")
    content = load_bundle(bundle)
    rankers = content.rankers
    if stage not in rankers:
        raise ValueError(f'{bundle} has no ranker "{stage}"; it has {", ".join(rankers)}')
    said = export_ranker(rankers[stage], out, cast(Format, format), overwrite=overwrite)
    if as_json:
        print(json.dumps({"out": str(out), **said}, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("input", "dtype", "shape", "columns"):
        table.add_column(name)
    for given in said["inputs"]:
        columns = given["columns"]
        shown = ", ".join(columns[:6]) + (f", ... {len(columns)} in all" if len(columns) > 6 else "")
        table.add_row(given["name"], given["dtype"], " x ".join(map(str, given["shape"])), shown)
    Console(markup=False, width=None if sys.stdout.isatty() else 120).print(table)
    print(f"logits of {', '.join(task['name'] for task in said['tasks'])}")
    print(
        f"written to {out / said['file']}; its logits and the model's differ by at most {said['max_difference']:.2g}",
        file=sys.stderr,
    )
