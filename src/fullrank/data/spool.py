"""Checked rows on their way from the source to the shards: in memory while few, in files when many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fullrank.data.arrow import as_array, as_numpy, as_one_array, as_series
from fullrank.data.chunk import Chunk, Coded, Jagged, JaggedNumbers

# Checked rows stay in memory up to this size.
MEMORY_BYTES = 64 << 20


class Spool:
    """Chunks in order of arrival; iterating does not use them up."""

    def __init__(self, directory: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._used = 0
        self._entries: list[Chunk | Path] = []

    def add(self, chunk: Chunk) -> None:
        arrays = _arrays(chunk)
        size = sum(array.nbytes for array in arrays.values())
        if self._used + size <= self._memory_bytes:
            self._used += size
            self._entries.append(chunk)
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{len(self._entries):06d}.arrow"
        with pa.OSFile(str(path), "wb") as file:
            # The arrays differ in length, so each is a stream of its own, one after the other.
            for name, array in arrays.items():
                batch = pa.record_batch([array], names=[name])
                with pa.ipc.new_stream(file, batch.schema) as stream:
                    stream.write_batch(batch)
        self._entries.append(path)

    def __iter__(self) -> Iterator[Chunk]:
        for entry in self._entries:
            yield entry if isinstance(entry, Chunk) else _read(entry)

    def drain(self) -> Iterator[Chunk]:
        """Iterate once more and let go of each chunk, and of its file, after its turn."""
        while self._entries:
            entry = self._entries.pop(0)
            if isinstance(entry, Chunk):
                yield entry
            else:
                yield _read(entry)
                entry.unlink()


def _arrays(chunk: Chunk) -> dict[str, pa.Array]:
    """Every array of a chunk under a name `kind/piece/column`."""
    arrays: dict[str, Any] = {"rows//": np.array([chunk.rows, chunk.first_line])}
    if chunk.lines is not None:
        arrays["lines//"] = chunk.lines
    for name, numbers in chunk.numbers.items():
        arrays[f"numbers//{name}"] = numbers
    for name, coded in chunk.ids.items():
        arrays[f"ids/codes/{name}"] = coded.codes
        arrays[f"ids/values/{name}"] = coded.values
    for name, bag in chunk.bags.items():
        arrays[f"bags/lists/{name}"] = bag.lists
        arrays[f"bags/offsets/{name}"] = bag.offsets
        arrays[f"bags/codes/{name}"] = bag.elements.codes
        arrays[f"bags/values/{name}"] = bag.elements.values
    for name, events in chunk.event_numbers.items():
        arrays[f"events/lists/{name}"] = events.lists
        arrays[f"events/offsets/{name}"] = events.offsets
        arrays[f"events/numbers/{name}"] = events.numbers
    for kind, columns in (("labels", chunk.labels), ("keys", chunk.keys), ("extra", chunk.extra)):
        for name, values in columns.items():
            arrays[f"{kind}//{name}"] = values
    return {name: as_array(values) for name, values in arrays.items()}


def _read(path: Path) -> Chunk:
    found: dict[str, dict[str, dict[str, pa.Array]]] = {}
    with pa.OSFile(str(path), "rb") as file:
        size = file.size()
        while file.tell() < size:
            table = pa.ipc.open_stream(file).read_all()
            kind, piece, name = table.column_names[0].split("/", 2)
            found.setdefault(kind, {}).setdefault(name, {})[piece] = as_one_array(table.column(0))

    def numpy(kind: str, name: str, piece: str = "") -> Any:
        return as_numpy(found[kind][name][piece])

    def coded(kind: str, name: str) -> Coded:
        return Coded(numpy(kind, name, "codes"), as_series(found[kind][name]["values"], name))

    rows, first_line = (int(number) for number in numpy("rows", ""))
    return Chunk(
        rows=rows,
        first_line=first_line,
        lines=numpy("lines", "") if "lines" in found else None,
        numbers={name: numpy("numbers", name) for name in found.get("numbers", {})},
        ids={name: coded("ids", name) for name in found.get("ids", {})},
        bags={
            name: Jagged(numpy("bags", name, "lists"), numpy("bags", name, "offsets"), coded("bags", name))
            for name in found.get("bags", {})
        },
        event_numbers={
            name: JaggedNumbers(*(numpy("events", name, piece) for piece in ("lists", "offsets", "numbers")))
            for name in found.get("events", {})
        },
        labels={name: numpy("labels", name) for name in found.get("labels", {})},
        keys={name: as_series(pieces[""], name) for name, pieces in found.get("keys", {}).items()},
        extra={name: numpy("extra", name) for name in found.get("extra", {})},
    )
