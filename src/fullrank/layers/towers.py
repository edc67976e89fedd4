"""A user vector and an item vector from one table per vocabulary."""

# Shapes: B rows, F tokens, N numeric columns, I width of a side's inputs, D output width.

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, Tables
from fullrank.layers.numbers import NumberCodes
from fullrank.schema import Role, Schema


class SideInputs(nn.Module):
    """What the features of each side say, side by side in one flat vector: vectors of ids, codes of numbers.

    Sides are the user's with the context, and the item's. Both look up the same tables, so an item in a history and
    the candidate item share their vector where the schema gives them one table. Sequences are mean-pooled.

    Attributes:
        side_widths: width of either side's vector.

    Raises:
        ValueError: if a side has no feature.
    """

    def __init__(self, schema: Schema, tables: Tables) -> None:
        super().__init__()
        self.ids = EmbeddingCollection(schema, tables, pool_sequences=True)
        self.numbers = NumberCodes(schema)
        self.side_widths: dict[str, int] = {}
        for side, roles in SIDES.items():
            places, numbers = _columns(schema, self.ids, self.numbers.columns_C, roles)
            if not places and not numbers:
                raise ValueError(f"the schema has no feature with role {' or '.join(sorted(roles))}: a tower needs one")
            self.side_widths[side] = len(places) + len(numbers)
            self.register_buffer(f"_{side}_places", torch.tensor(places, dtype=torch.int64), persistent=False)
            self.register_buffer(f"_{side}_numbers", torch.tensor(numbers, dtype=torch.int64), persistent=False)

    def side(self, side: str, batch: Batch) -> Tensor:
        """The vector of one side of each row; the columns of the other may hold anything valid."""
        return self._inputs(side, self.ids(batch).flat, batch)

    def both(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The vectors of user and item of each row."""
        flat = self.ids(batch).flat
        return self._inputs("user", flat, batch), self._inputs("item", flat, batch)

    def _inputs(self, side: str, flat: Tensor, batch: Batch) -> Tensor:
        places: Tensor = getattr(self, f"_{side}_places")
        numbers: Tensor = getattr(self, f"_{side}_numbers")
        vectors = flat.index_select(1, places)
        if not numbers.numel():
            return vectors
        return torch.cat([vectors, self.numbers(batch).index_select(1, numbers)], 1)


class Towers(SideInputs):
    """Two networks, one on the features of the user and of the context, one on those of the item.

    Neither sees the other's columns, so the vectors of all items can be computed before any request comes.

    Args:
        network: makes either of them from the width of its input.
    """

    def __init__(self, schema: Schema, tables: Tables, network: Callable[[int], nn.Module]) -> None:
        super().__init__(schema, tables)
        self.user_mlp = network(self.side_widths["user"])
        self.item_mlp = network(self.side_widths["item"])

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Vectors of each row's user and item, user_BD and item_BD."""
        user_BI, item_BI = self.both(batch)
        return self.user_mlp(user_BI), self.item_mlp(item_BI)

    def users(self, batch: Batch) -> Tensor:
        """user_BD; the item columns of the batch may hold anything valid."""
        vectors: Tensor = self.user_mlp(self.side("user", batch))
        return vectors

    def items(self, batch: Batch) -> Tensor:
        """item_BD; the user and context columns of the batch may hold anything valid."""
        vectors: Tensor = self.item_mlp(self.side("item", batch))
        return vectors


SIDES: dict[str, set[Role]] = {"user": {"user", "context"}, "item": {"item"}}


def _columns(
    schema: Schema, ids: EmbeddingCollection, columns_C: Sequence[int], roles: set[Role]
) -> tuple[list[int], list[int]]:
    """Places in `Embedded.flat` and in the codes of numbers of the features that have one of `roles`."""
    role_of = schema.roles()
    places: list[int] = []
    begin = 0
    for column, width in zip(ids.token_columns, ids.widths, strict=True):
        if role_of[column] in roles:
            places.extend(range(begin, begin + width))
        begin += width
    names = schema.numeric_columns
    return places, [place for place, column in enumerate(columns_C) if role_of[names[column]] in roles]
