"""`fullrank models`: the rankers there are."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the rankers, with parameters and FLOPs on a reference schema of 39 fields of 1,000 ids and a history of 50.

    Example: fullrank models
    """
    from rich.console import Console
    from rich.table import Table

    from fullrank.models import MODELS
    from fullrank.schema import Categorical, EventId, Label, Schema, Sequence

    schema = Schema(
        features=(
            *(Categorical(name=f"field{i}", num_embeddings=1000) for i in range(39)),
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
