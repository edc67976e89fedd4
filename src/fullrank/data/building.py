"""Putting a dataset directory together from checked rows: split, fit, encode, write."""

# Shapes: n rows of a chunk.

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data import atomic
from fullrank.data.chunk import Chunk
from fullrank.data.derived import Derived
from fullrank.data.encoders import KEY_COLUMNS, Encoders
from fullrank.data.hashing import stable_hash
from fullrank.data.lookahead import prefetched
from fullrank.data.raw import REJECTED_SCHEMA
from fullrank.data.splits import PARTS, TRAIN, Parts, TimestampCounts, by_time
from fullrank.data.spool import Spool
from fullrank.data.tallies import TALLIES, hashed_features, value_hashes
from fullrank.schema import Schema

FORMAT_VERSION = 1
# A file is held in memory until it is written, and a loader that shuffles holds a few row groups at a time: both end
# before so many rows where rows have long lists.
SHARD_ROWS, SHARD_BYTES = 262_144, 32 << 20
GROUP_ROWS, GROUP_BYTES = 65_536, 16 << 20


def encoded_columns(schema: Schema) -> dict[str, pl.DataType]:
    """Columns of an encoded shard and their types, in order; keys excepted `__user_id` and the like, whose type is
    the source's."""
    columns: dict[str, pl.DataType] = {name: pl.Float32() for name in schema.numeric_columns}
    for name, feature in schema.embedded().items():
        ids = pl.Int64() if feature.is_wide else pl.Int32()
        columns[name] = pl.List(ids) if name in schema.jagged_keys else ids
    columns.update({name: pl.List(pl.Float32()) for name in schema.event_number_keys})
    columns.update({label.name: pl.Float32() for label in schema.labels})
    fixed = {"timestamp": pl.Int64(), "weight": pl.Float32(), "bid": pl.Float32()}
    columns.update({KEY_COLUMNS[key]: dtype for key, dtype in fixed.items() if getattr(schema.keys, key) is not None})
    return columns


class Earlier(NamedTuple):
    """What a log takes over from an earlier one: its encoders, extended by this log's new values or as they are."""

    encoders: Encoders
    extend: bool = False

    @classmethod
    def of(cls, like: Path | str | None, extend: bool, **said: object) -> Self | None:
        """Of a bundle or a dataset; None without one.

        Args:
            said: what else an import was told of the log's columns; the earlier log has settled that.

        Raises:
            ValueError: if something else was said, there is nothing to extend, or the directory holds no encoders.
        """
        if like is None:
            if extend:
                raise ValueError("nothing to extend: name the bundle or the dataset whose encoders to take (like)")
            return None
        for name, value in said.items():
            if value is not None:
                raise ValueError(
                    f"a log that is imported like another one has its schema and is read like it: leave out {name}"
                )
        directory = Path(like) / "encoders"
        if not directory.is_dir():
            raise ValueError(f"{like} is neither a bundle nor a dataset: it has no encoders")
        return cls(Encoders.load(directory), extend)


class ShardWriter:
    """Encoded frames of one split into Parquet files of `SHARD_ROWS` rows, or of little more than `SHARD_BYTES`."""

    def __init__(self, directory: Path, split: str) -> None:
        self._directory = directory
        self._split = split
        self._pending: list[pl.DataFrame] = []
        self._pending_rows = self._pending_bytes = 0
        self.rows = 0
        self.shards: list[str] = []

    def add(self, frame: pl.DataFrame) -> None:
        while frame.height:
            room = SHARD_ROWS - self._pending_rows
            self._pending.append(frame.head(room))
            self._pending_rows += self._pending[-1].height
            self._pending_bytes += int(self._pending[-1].estimated_size())
            frame = frame.slice(room)
            if self._pending_rows == SHARD_ROWS or self._pending_bytes >= SHARD_BYTES:
                self._flush()

    def close(self) -> None:
        if self._pending_rows:
            self._flush()

    def _flush(self) -> None:
        name = f"{self._split}/part-{len(self.shards):05d}.parquet"
        path = self._directory / name
        path.parent.mkdir(exist_ok=True)
        group_rows = min(GROUP_ROWS, max(self._pending_rows * GROUP_BYTES // max(self._pending_bytes, 1), 1))
        frame = pl.concat(self._pending, rechunk=True)
        # The pieces go before the writer needs room of its own.
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0
        frame.write_parquet(path, compression="lz4", statistics=False, row_group_size=group_rows)
        self.rows += frame.height
        self.shards.append(name)


class RejectedRows:
    """Bad rows: counted by reason, the first few kept, all of them written to a file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.reasons: Counter[str] = Counter()
        self.first: list[tuple[int, str, str, str]] = []

    def add(self, table: pl.DataFrame) -> None:
        if not table.height:
            return
        with self.path.open("ab") as file:
            # Text with tabs or line ends in it is quoted, so that the file stays one row per line of a reader.
            table.select(REJECTED_SCHEMA.keys()).write_csv(
                file, separator="\t", include_header=self.count == 0, quote_style="necessary"
            )
        for reason, number in table["reason"].value_counts().iter_rows():
            self.reasons[reason] += number
        self.count += table.height
        self.first += table.head(3 - len(self.first)).rows()


class DatasetBuilder:
    """Collects checked rows, then writes the dataset.

    Args:
        directory: an empty directory to fill; the caller renames it when all is done.
        schema: unfitted.
    """

    def __init__(self, directory: Path, schema: Schema) -> None:
        self._directory = directory
        self._schema = schema
        self._spool = Spool(directory / "spool")
        self._parts: list[Parts | None] = []
        self._timestamps = TimestampCounts()
        self._last_timestamp: int | None = None
        self._request_hashes: list[npt.NDArray[np.uint64]] = []
        self._key_types: dict[str, set[pl.DataType]] = {}
        self._extra_types: dict[str, set[np.dtype[Any]]] = {}
        self._widths: dict[str, tuple[int, ...]] = {}
        self.rejected = RejectedRows(directory / "rejected.tsv")
        self.rows = 0
        self.out_of_order = 0

    def add(self, chunk: Chunk, parts: Parts | None) -> None:
        """Add rows, with the part of each (an index into `PARTS`), or None to split all by time in the end.

        Raises:
            ValueError: if a further column has lists of another length than before.
        """
        if not chunk.rows:
            return
        self.rows += chunk.rows
        if "timestamp" in chunk.keys:
            times = chunk.keys["timestamp"].to_numpy()
            last = times[0] if self._last_timestamp is None else self._last_timestamp
            self.out_of_order += int((np.diff(times, prepend=last) < 0).sum())
            self._last_timestamp = int(times[-1])
            if parts is None:
                self._timestamps.add(chunk.keys["timestamp"])
        if "request_id" in chunk.keys:
            self._request_hashes.append(stable_hash(chunk.keys["request_id"]).to_numpy())
        for key, values in chunk.keys.items():
            self._key_types.setdefault(key, set()).add(values.dtype)
        for name, column in chunk.extra.items():
            self._extra_types.setdefault(name, set()).add(column.dtype)
            width = self._widths.setdefault(name, column.shape[1:])
            if width != column.shape[1:]:
                line = int(chunk.line(np.zeros(1, dtype=np.int64))[0])
                found = [f"lists of {shape[0]}" if shape else "numbers" for shape in (width, column.shape[1:])]
                raise ValueError(f'column "{name}" holds {found[0]}, and {found[1]} from line {line} on')
        self._spool.add(chunk)
        self._parts.append(parts)

    def reject_duplicates(self) -> None:
        """Reject every row whose request id an earlier row has."""
        if not self._request_hashes:
            return
        hashes = np.concatenate(self._request_hashes)
        self._request_hashes = []
        order = np.argsort(hashes, kind="stable")
        repeated = np.zeros(len(hashes), dtype=bool)
        repeated[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
        if not repeated.any():
            return
        column = self._schema.keys.request_id
        start = 0
        for place, chunk in enumerate(self._spool):
            mine = repeated[start : start + chunk.rows]
            start += chunk.rows
            if not mine.any():
                continue
            rows = np.flatnonzero(mine)
            self.rejected.add(
                pl.DataFrame(
                    {
                        "line": chunk.line(rows),
                        "column": [column] * len(rows),
                        "reason": ["duplicate request id"] * len(rows),
                        "value": chunk.keys["request_id"].gather(rows).cast(pl.String),
                    }
                )
            )
            self.rows -= len(rows)
            parts = self._parts[place]
            if parts is None:
                parts = np.full(chunk.rows, _BY_TIME, dtype=np.int8)
            self._parts[place] = np.where(mine, _DROPPED, parts).astype(np.int8)

    def write(self, *, valid: float, test: float, about: dict[str, Any], earlier: Earlier | None = None) -> Encoders:
        """Split by time what has no part yet, fit the encoders on the training rows, and write everything.

        Args:
            earlier: the encoders of another log, to be used instead of fitting some.

        Raises:
            ValueError: if no row is left to train on.
        """
        cuts: tuple[int, int] | None = None
        if any(parts is None or (parts == _BY_TIME).any() for parts in self._parts):
            cuts = self._timestamps.cuts(valid, test)
        spool = self._directory / "spool"
        derived = self._derive(spool / "derived")
        if earlier is None:
            encoders = Encoders.fit_checked(self._schema, prefetched(self._training_rows(cuts, derived)), spool)
        elif earlier.extend:
            encoders = earlier.encoders.extended(prefetched(self._training_rows(cuts, derived)), spool)
        else:
            encoders = earlier.encoders
        if derived is not None:
            derived.read_ids(encoders, self._spool)
        writers = [ShardWriter(self._directory, split) for split in PARTS]
        for encoded, parts in prefetched(self._encoded(encoders, cuts, derived)):
            for part, writer in enumerate(writers):
                rows = parts == part
                if rows.all():
                    writer.add(encoded)
                elif rows.any():
                    writer.add(encoded.filter(pl.Series(rows)))
        for writer in writers:
            writer.close()
        about_derived = None if derived is None else derived.about()
        shutil.rmtree(spool, ignore_errors=True)
        used = {split: writer for split, writer in zip(PARTS, writers, strict=True) if writer.rows}
        if PARTS[TRAIN] not in used:
            raise ValueError("no row is left to train on")
        details: dict[str, Any] = {"out_of_order": self.out_of_order} if "timestamp" in self._key_types else {}
        if earlier is not None and earlier.extend:
            before = earlier.encoders.schema.tables()
            details["new_ids"] = {
                table: rows - before[table] for table, rows in encoders.schema.tables().items() if rows > before[table]
            }
        if about_derived is not None:
            details["derived"] = about_derived
        if cuts is not None:
            details["split_at"] = {"valid": cuts[0], "test": cuts[1]}
        write_manifest(self._directory, encoders, used, dict(self.rejected.reasons), {**about, **details})
        return encoders

    def _derive(self, directory: Path) -> Derived | None:
        """What the schema derives from earlier rows, if anything."""
        if not self._schema.counters and not self._schema.histories:
            return None
        derived = Derived(self._schema, directory, self._directory / TALLIES)
        derived.read(
            (chunk, np.ones(chunk.rows, dtype=bool) if parts is None else parts != _DROPPED)
            for chunk, parts in zip(self._spool, self._parts, strict=True)
        )
        return derived

    def _training_rows(self, cuts: tuple[int, int] | None, derived: Derived | None) -> Iterator[Chunk]:
        for place, (chunk, parts) in enumerate(zip(self._spool, self._parts, strict=True)):
            if derived is not None:
                chunk = derived.with_counters(chunk, place)
            train = self._parts_of(chunk, parts, cuts) == TRAIN
            if train.all():
                yield chunk
            elif train.any():
                yield chunk.take(np.flatnonzero(train))

    def _encoded(
        self, encoders: Encoders, cuts: tuple[int, int] | None, derived: Derived | None
    ) -> Iterator[tuple[pl.DataFrame, Parts]]:
        stored = encoders.without({sequence.name for sequence in self._schema.histories})
        hashed = hashed_features(self._schema)
        for place, (chunk, parts) in enumerate(zip(self._spool.drain(), self._parts, strict=True)):
            if derived is not None:
                chunk = derived.with_counters(chunk, place)
            frame, parts = self._unified(stored.encode(chunk)), self._parts_of(chunk, parts, cuts)
            if derived is None:
                yield frame, parts
                continue
            frame = frame.with_columns(value_hashes(chunk, hashed))
            for rows, piece in derived.with_histories(frame, place):
                yield piece, parts[rows]

    def _parts_of(self, chunk: Chunk, parts: Parts | None, cuts: tuple[int, int] | None) -> Parts:
        if cuts is None:
            assert parts is not None
            return parts
        timed = by_time(chunk.keys["timestamp"].to_numpy(), *cuts)
        return timed if parts is None else np.where(parts == _BY_TIME, timed, parts).astype(np.int8)

    def _unified(self, frame: pl.DataFrame) -> pl.DataFrame:
        """A key that is an integer in one chunk and text in another is text in all; a further column that is integers
        in one and real numbers in another is real numbers in all."""
        mixed: dict[str, pl.DataType] = {
            KEY_COLUMNS[key]: pl.String() for key, types in self._key_types.items() if len(types) > 1
        }
        for name, found in self._extra_types.items():
            if len(found) > 1:
                width = self._widths[name]
                mixed[name] = pl.Array(pl.Float32, width) if width else pl.Float32()
        return frame.cast(mixed) if mixed else frame  # type: ignore[arg-type]


_BY_TIME, _DROPPED = -1, -2


def write_manifest(
    directory: Path,
    encoders: Encoders,
    writers: dict[str, ShardWriter],
    rejected: dict[str, int],
    about: dict[str, Any],
) -> None:
    """Write `encoders/`, `schema.json` and, last of all, `dataset.json`."""
    encoders.save(directory / "encoders")
    atomic.write_text(directory / "schema.json", encoders.schema.to_json())
    manifest = {
        "format_version": FORMAT_VERSION,
        **about,
        "rows": {split: writer.rows for split, writer in writers.items()},
        "shards": {split: writer.shards for split, writer in writers.items()},
        "rejected": rejected,
    }
    atomic.write_text(directory / "dataset.json", json.dumps(manifest, indent=1) + "\n")
