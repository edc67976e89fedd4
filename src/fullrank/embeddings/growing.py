"""From the tables of a model to those of the same model with more ids."""

# Shapes: R rows of a part, D its width.

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.embeddings.collection import EmbeddingCollection
from fullrank.embeddings.table import Table
from fullrank.schema import OUT_OF_VOCABULARY_ID


@torch.no_grad()
def grown_state(small: EmbeddingCollection, large: EmbeddingCollection) -> dict[str, Tensor]:
    """The state of `large`, in which every id of `small` is what it is there, and every other one starts as the
    out-of-vocabulary id.

    Args:
        large: made like `small`, for a schema with more ids; its kinds of tables know it by `first_rows`.

    Raises:
        ValueError: if a table is of a kind that cannot grow.
    """
    state: dict[str, Tensor] = small.state_dict()
    for number, (name, table) in enumerate(large.kinds.items()):
        before = small.kinds[name]
        if table.rows == before.rows:
            continue
        if not table.grows:
            raise ValueError(f'table "{name}" is of the kind {table.config.kind}, which cannot grow: train anew')
        own = table.state_dict()
        for key, value in before.state_dict().items():
            if value.ndim and len(value) == before.rows and len(own[key]) == table.rows:
                state[f"kind_modules.{number}.{key}"] = _longer(value, table.rows, OUT_OF_VOCABULARY_ID)
    for name, places in large.layout.places.items():
        kind: Table | None = large.kinds.get(name)
        parts = [""] if kind is None else [f".{part.name}" for part in kind.parts]
        for index, (part, place) in enumerate(zip(parts, places, strict=True)):
            key = f"tables.{name}{part}.weight"
            rows = place.rows.stop - place.rows.start
            if len(state[key]) < rows:
                state[key] = _longer(state[key], rows, _out_of_vocabulary(small.kinds.get(name), index))
    return state


def _out_of_vocabulary(kind: Table | None, part: int) -> int:
    """The row of a part that the out-of-vocabulary id asks for."""
    if kind is None:
        return OUT_OF_VOCABULARY_ID
    asked = [ask.rows for ask in kind.asks(torch.tensor([OUT_OF_VOCABULARY_ID])) if ask.part == part]
    return int(torch.cat(asked)[0])


def _longer(value_RD: Tensor, rows: int, source: int) -> Tensor:
    """The same rows, and copies of one of them up to a number of rows."""
    more = rows - len(value_RD)
    return torch.cat([value_RD, value_RD[source : source + 1].expand(more, *value_RD.shape[1:])])
