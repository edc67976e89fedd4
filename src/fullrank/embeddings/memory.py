"""How many bytes tables take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fullrank.embeddings.collection import EmbeddingCollection
from fullrank.embeddings.full import FullTable
from fullrank.embeddings.table import TABLE_KINDS, Table, TableConfig


@dataclass
class TableMemory:
    """What a collection stores of one table.

    Attributes:
        store: how the rows of its first part lie in memory: `float32`, or codes of some bits.
        rows: ids.
        width: of their vectors.
        bytes: of all parts, and of what its kind has beside them, such as projections; without optimiser state.
        plain_bytes: of a row of float32 for each id.
    """

    kind: str
    store: str
    rows: int
    width: int
    parameters: int
    bytes: int
    plain_bytes: int


def table_memory(collection: EmbeddingCollection) -> dict[str, TableMemory]:
    """Each table of a collection, measured from its tensors; they may be on the meta device."""
    found: dict[str, TableMemory] = {}
    rows_of = {feature.table_name: feature.num_embeddings for feature in collection.columns.values()}
    for table, width in collection.table_widths().items():
        kind = collection.kinds.get(table)
        rows = rows_of[table] or 0
        store = collection.layout.buffers[collection.layout.places[table][0].buffer].store
        name = "full" if kind is None else kind.config.kind
        memory = TableMemory(name, store, rows, width, 0, 0, 4 * rows * width)
        for place in collection.layout.places[table]:
            stored = collection.stored(place)
            memory.parameters += len(stored) * collection.layout.buffers[place.buffer].width
            memory.bytes += stored.nbytes
        if kind is not None:
            memory.parameters += sum(parameter.numel() for parameter in kind.parameters())
            memory.bytes += _own_bytes(kind)
        found[table] = memory
    return found


def table_bytes(config: TableConfig, rows: int, width: int) -> int:
    """What a table of these settings takes, without making it.

    Raises:
        ValueError: if there can be no such table.
    """
    kind = TABLE_KINDS.find(config.kind)
    if issubclass(kind, FullTable):
        return 4 * rows * width
    with torch.device("meta"):
        table = kind(rows, width, 0.0, config)
    parts = sum(part.rows * part.width * int(getattr(torch, part.store).itemsize) for part in table.parts)
    return parts + _own_bytes(table)


def _own_bytes(table: Table) -> int:
    """Of projections, codes and the like."""
    return sum(tensor.nbytes for tensor in (*table.parameters(), *table.buffers()))
