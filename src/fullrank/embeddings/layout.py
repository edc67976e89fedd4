"""Which buffer the parts of each table lie in, and which columns of a batch are looked up there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.embeddings.table import Part, Store


class Place(NamedTuple):
    """Where a part of a table lies."""

    buffer: int
    rows: slice


class Buffer:
    """Parts of one width and store, one behind the other.

    Attributes:
        single, jagged: the columns of plain tables that are looked up here, as indices among the collection's; their
            ids are rows of the buffer but for the table's first row.
    """

    def __init__(self, width: int, store: Store) -> None:
        self.width, self.store = width, store
        self.parts: list[Part] = []
        self.rows = 0
        self.single: list[int] = []
        self.jagged: list[int] = []

    def start(self) -> Tensor:
        """Weights (rows, width) that all parts start from."""
        weight_RD = torch.randn(self.rows, self.width)
        if len({part.init_std for part in self.parts}) == 1:
            # Not in place: freeing the draw teaches the C library to keep blocks of a gradient's size.
            return weight_RD * self.parts[0].init_std
        return weight_RD * torch.cat([torch.full((part.rows, 1), part.init_std) for part in self.parts])


class Layout:
    """All buffers of a collection.

    Attributes:
        buffers: in the order in which their first part was placed.
        places: by table, one for each of its parts.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.places: dict[str, list[Place]] = {}

    def place(self, table: str, parts: Sequence[Part]) -> None:
        """Give the parts of a table their rows."""
        self.places[table] = [self._place(part) for part in parts]

    def _place(self, part: Part) -> Place:
        index = next((i for i, b in enumerate(self.buffers) if (b.width, b.store) == (part.width, part.store)), None)
        if index is None:
            index = len(self.buffers)
            self.buffers.append(Buffer(part.width, part.store))
        buffer = self.buffers[index]
        buffer.parts.append(part)
        buffer.rows += part.rows
        return Place(index, slice(buffer.rows - part.rows, buffer.rows))
