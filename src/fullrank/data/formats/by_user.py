"""Rows of a log brought together by user: in memory while the log is small, through files when it is large."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow.parquet

from fullrank.data import atomic
from fullrank.data.arrow import as_frame
from fullrank.data.hashing import hash_series, splitmix
from fullrank.data.scratch import Scratch

# About so many bytes of text come to one group.
GROUP_BYTES = 32 << 20
MOST_GROUPS = 512
# Rows wait in memory up to this size before they go to a file.
PENDING_BYTES = 96 << 20


def groups_for(files: list[Path]) -> int:
    """How many groups to divide the users of some text or Parquet files into."""
    size = sum(file.stat().st_size * (1 if file.suffix in (".csv", ".json", ".txt") else 4) for file in files)
    return int(min(max(size // GROUP_BYTES, 1), MOST_GROUPS))


class ByUser:
    """Frames in, a frame per group of users out, each user's rows together and in their order of arrival.

    A context manager: its temporary files (in TMPDIR, about as large as the columns kept) are gone at the end.

    Args:
        user: the column with the user, text or integers, without nulls.
        groups: with 1, everything stays in memory. Two collections with the same number have the same users in the
            same group.
    """

    def __init__(self, user: str, groups: int) -> None:
        self._user = user
        self.groups = groups
        self._pending: list[pl.DataFrame] = []
        self._pending_bytes = 0
        self._scratch: Scratch | None = None
        # Of each file, its footer, and the row group that holds each group of users.
        self._files: list[tuple[Path, Any, dict[int, int]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pending = []
        if self._scratch is not None:
            self._scratch.remove()

    def add(self, frame: pl.DataFrame) -> None:
        self._pending.append(frame)
        self._pending_bytes += int(frame.estimated_size())
        if self.groups > 1 and self._pending_bytes > PENDING_BYTES:
            self._write()

    def frame(self, group: int) -> pl.DataFrame | None:
        """The rows of a group, from 0 to `groups` - 1; None if it has none. Ask after the last `add`."""
        if self.groups > 1 and self._pending:
            self._write()
        pieces = self._pending or [
            as_frame(pyarrow.parquet.ParquetFile(path, metadata=footer).read_row_group(places[group]))
            for path, footer, places in self._files
            if group in places
        ]
        return pl.concat(pieces, rechunk=True) if pieces else None

    def _write(self) -> None:
        if self._scratch is None:
            self._scratch = Scratch()
        frame = pl.concat(self._pending)
        self._pending, self._pending_bytes = [], 0
        path = self._scratch.path / f"{len(self._files):05d}.parquet"
        places: dict[int, int] = {}
        schema = frame.head(0).to_arrow().schema
        with atomic.naming(path), pyarrow.parquet.ParquetWriter(path, schema, compression="lz4") as writer:
            for (group,), rows in frame.with_columns(__group=self._group_of(frame[self._user])).group_by(
                "__group", maintain_order=True
            ):
                places[int(str(group))] = len(places)
                writer.write_table(rows.drop("__group").to_arrow(), row_group_size=max(rows.height, 1))
        self._files.append((path, pyarrow.parquet.read_metadata(path), places))

    def _group_of(self, users: pl.Series) -> pl.Series:
        hashes = splitmix(users.to_numpy().astype(np.uint64)) if users.dtype.is_integer() else hash_series(users)
        return pl.Series((hashes % np.uint64(self.groups)).astype(np.int32))
