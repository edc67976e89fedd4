"""`fullrank models`: the rankers there are, and the fields of one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from fullrank.cli.options import ImportOption

if TYPE_CHECKING:
    from fullrank.models import Ranker
    from fullrank.schema import Schema


def models(
    name: Annotated[str | None, typer.Argument(help="Of a ranker: list the fields of its configuration.")] = None,
    imports: ImportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the rankers, with parameters and FLOPs on a reference schema of 39 fields of 1,000 ids and a history of 50.

    Example: fullrank models dcn_v2
    """
    from fullrank.registry import import_modules

    import_modules(imports or (), "--import")
    if name is None:
        _all(as_json)
    else:
        _one(name, as_json)


def _all(as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from fullrank.models import RANKERS
    from fullrank.schema import Categorical, EventId, Label, Schema, Sequence

    schema = Schema(
        features=(
            Categorical(name="field0", role="item", num_embeddings=1000),
            *(Categorical(name=f"field{i}", num_embeddings=1000) for i in range(1, 39)),
            Sequence(name="history", fields=(EventId(name="id", table="field0", num_embeddings=1000),), max_length=50),
        ),
        labels=(Label(name="click"),),
    )
    rows = [{"name": name, **_figures(kind, schema), "source": _source(kind)} for name, kind in RANKERS.items()]
    if as_json:
        print(json.dumps({"models": rows}))
        return
    table = Table()
    for column in ("name", "dense", "embedding", "FLOPs/example", "source"):
        table.add_column(column, justify="left" if column in ("name", "source") else "right")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in row.values()))
    Console(markup=False).print(table)


def _figures(kind: type[Ranker], schema: Schema) -> dict[str, int | None]:
    try:
        model = kind.from_config(schema)
    except ValueError:  # a ranker of the user's, for logs of another shape
        return dict.fromkeys(("dense_parameters", "embedding_parameters", "flops_per_example"))
    count = model.num_parameters()
    return {
        "dense_parameters": count.dense,
        "embedding_parameters": count.embedding,
        "flops_per_example": model.flops_per_example(),
    }


def _source(kind: type[Ranker]) -> str:
    return getattr(kind, "source", "")


def _one(name: str, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from fullrank.fields import FieldRow, field_rows
    from fullrank.models import RANKERS

    kind = RANKERS.find(name)
    rows, source = field_rows(kind.Config), _source(kind)
    if as_json:
        print(json.dumps({"name": name, "source": source, "fields": [row._asdict() for row in rows]}))
        return
    table = Table(*FieldRow._fields)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False)
    console.print(f"{name}: {source}" if source else name, highlight=False)
    console.print(table)
