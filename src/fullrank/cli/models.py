"""`fullrank models`: the rankers there are, and the fields of one."""

from __future__ import annotations

import difflib
import json
from typing import Annotated

import typer


def models(
    name: Annotated[str | None, typer.Argument(help="Of a ranker: list the fields of its configuration.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the rankers, with parameters and FLOPs on a reference schema of 39 fields of 1,000 ids and a history of 50.

    Example: fullrank models dcn_v2
    """
    if name is None:
        _all(as_json)
    else:
        _one(name, as_json)


def _all(as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from fullrank.models import MODELS
    from fullrank.schema import Categorical, EventId, Label, Schema, Sequence

    schema = Schema(
        features=(
            Categorical(name="field0", role="item", num_embeddings=1000),
            *(Categorical(name=f"field{i}", num_embeddings=1000) for i in range(1, 39)),
            Sequence(name="history", fields=(EventId(name="id", table="field0", num_embeddings=1000),), max_length=50),
        ),
        labels=(Label(name="click"),),
    )
    rows = []
    for name, kind in MODELS.items():
        model = kind.from_config(schema)
        count = model.num_parameters()
        rows.append(
            {
                "name": name,
                "dense_parameters": count.dense,
                "embedding_parameters": count.embedding,
                "flops_per_example": model.flops_per_example(),
                "source": kind.source,
            }
        )
    if as_json:
        print(json.dumps({"models": rows}))
        return
    table = Table()
    for column in ("name", "dense", "embedding", "FLOPs/example", "source"):
        table.add_column(column, justify="left" if column in ("name", "source") else "right")
    for row in rows:
        numbers = (row["dense_parameters"], row["embedding_parameters"], row["flops_per_example"])
        table.add_row(str(row["name"]), *(f"{number:,}" for number in numbers), str(row["source"]))
    Console(markup=False).print(table)


def _one(name: str, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from fullrank.fields import FieldRow, field_rows
    from fullrank.models import MODELS

    if name not in MODELS:
        close = difflib.get_close_matches(name, list(MODELS), n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise ValueError(f"expected the name of a ranker among {', '.join(MODELS)}, got {name!r}{hint}")
    kind = MODELS[name]
    rows = field_rows(kind.Config)
    if as_json:
        print(json.dumps({"name": name, "source": kind.source, "fields": [row._asdict() for row in rows]}))
        return
    table = Table(*FieldRow._fields)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False)
    console.print(f"{name}: {kind.source}" if kind.source else name, highlight=False)
    console.print(table)
