"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ImportOption = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import this module first: it registers rankers, retrievers, formats or table kinds of your own.",
    ),
]
