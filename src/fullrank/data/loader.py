"""From Parquet shards to batches: shuffled, prefetched, resumable at any batch."""

# Shapes: n rows of a block, F single-id features, N numeric columns, T labels, B rows of a batch.

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS, stable_hash
from fullrank.schema import Schema

Array = npt.NDArray[Any]
# A shuffled split that decodes to less than this is permuted as a whole and kept between epochs.
MEMORY_LIMIT = 1 << 30


@dataclass
class _Jagged:
    values: Array
    offsets: npt.NDArray[np.int64]

    def take(self, rows: npt.NDArray[np.int64]) -> tuple[Array, npt.NDArray[np.int64]]:
        starts, ends = self.offsets[rows], self.offsets[rows + 1]
        lengths = ends - starts
        total = int(lengths.sum())
        before = np.cumsum(lengths) - lengths
        places = np.arange(total) + np.repeat(starts - before, lengths)
        return self.values[places], lengths

    @staticmethod
    def joined(parts: list[_Jagged]) -> _Jagged:
        offsets, last = [np.zeros(1, np.int64)], 0
        for part in parts:
            offsets.append(part.offsets[1:] + last)
            last += int(part.offsets[-1])
        return _Jagged(np.concatenate([part.values for part in parts]), np.concatenate(offsets))


@dataclass
class Block:
    """Decoded rows, as compact as they are on disk: ids stay int32 until they are in a batch."""

    numeric_nN: npt.NDArray[np.float32]
    ids_nF: npt.NDArray[np.int32]
    bags: list[_Jagged]
    events: list[_Jagged]
    labels_nT: npt.NDArray[np.float32]
    weights_n: npt.NDArray[np.float32] | None
    timestamp_n: npt.NDArray[np.int64] | None
    user_n: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.labels_nT)

    @classmethod
    def from_arrow(cls, table: pa.Table, schema: Schema) -> Block:
        n = table.num_rows

        def matrix(names: list[str], dtype: Any) -> Array:
            out = np.empty((n, len(names)), dtype)
            for place, name in enumerate(names):
                out[:, place] = _plain(table[name])
            return out

        def jagged(name: str) -> _Jagged:
            column = table[name].combine_chunks()
            if isinstance(column, pa.ChunkedArray):
                column = column.chunk(0) if column.num_chunks else pa.array([], type=column.type)
            lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            offsets = np.zeros(n + 1, np.int64)
            np.cumsum(lengths, out=offsets[1:])
            return _Jagged(column.flatten().to_numpy(zero_copy_only=False), offsets)

        def key(name: str) -> Any:
            return table[KEY_COLUMNS[name]] if KEY_COLUMNS[name] in table.column_names else None

        weight, timestamp, user = key("weight"), key("timestamp"), key("user_id")
        return cls(
            numeric_nN=matrix(list(schema.numeric_columns), np.float32),
            ids_nF=matrix([feature.name for feature in schema.categorical], np.int32),
            bags=[jagged(name) for name in schema.jagged_keys],
            events=[jagged(name) for name in schema.event_number_keys],
            labels_nT=matrix([label.name for label in schema.labels], np.float32),
            weights_n=None if weight is None else _plain(weight).astype(np.float32),
            timestamp_n=None if timestamp is None else _plain(timestamp).astype(np.int64),
            user_n=None if user is None else _user_keys(user),
        )

    @classmethod
    def joined(cls, parts: list[Block]) -> Block:
        if len(parts) == 1:
            return parts[0]

        def keys(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else np.concatenate(values)

        return cls(
            numeric_nN=np.concatenate([part.numeric_nN for part in parts]),
            ids_nF=np.concatenate([part.ids_nF for part in parts]),
            bags=[_Jagged.joined(list(group)) for group in zip(*(part.bags for part in parts), strict=True)],
            events=[_Jagged.joined(list(group)) for group in zip(*(part.events for part in parts), strict=True)],
            labels_nT=np.concatenate([part.labels_nT for part in parts]),
            weights_n=keys("weights_n"),
            timestamp_n=keys("timestamp_n"),
            user_n=keys("user_n"),
        )

    def take(self, rows: npt.NDArray[np.int64], schema: Schema) -> Batch:
        """The given rows, in the given order."""
        values, lengths = _taken(self.bags, rows, np.int64)
        event_values, event_lengths = _taken(self.events, rows, np.float32)

        def optional(array: Array | None) -> torch.Tensor | None:
            return None if array is None else torch.from_numpy(array[rows])

        return Batch(
            numeric_BN=torch.from_numpy(self.numeric_nN[rows]),
            ids_BF=torch.from_numpy(self.ids_nF[rows].astype(np.int64)),
            jagged_keys=schema.jagged_keys,
            jagged_values=torch.from_numpy(values),
            jagged_lengths_KB=torch.from_numpy(lengths),
            event_keys=schema.event_number_keys,
            event_values=torch.from_numpy(event_values),
            event_lengths_EB=torch.from_numpy(event_lengths),
            labels_BT=torch.from_numpy(self.labels_nT[rows]),
            weights_B=optional(self.weights_n),
            timestamp_B=optional(self.timestamp_n),
            user_B=optional(self.user_n),
        )


def _plain(column: pa.ChunkedArray) -> Array:
    values: Array = column.to_numpy()
    return values


def _user_keys(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    if pa.types.is_integer(column.type) and not column.null_count:
        return _plain(column).astype(np.int64)
    series = pl.Series(pl.from_arrow(column))
    return stable_hash(series).fill_null(0).reinterpret(signed=True).to_numpy()


def _taken(columns: list[_Jagged], rows: npt.NDArray[np.int64], dtype: Any) -> tuple[Array, Array]:
    taken = [column.take(rows) for column in columns]
    values = np.concatenate([values for values, _ in taken]) if taken else np.zeros(0)
    lengths = np.stack([lengths for _, lengths in taken]) if taken else np.zeros((0, len(rows)), np.int64)
    return values.astype(dtype), lengths


def batch_from_frame(frame: pl.DataFrame, schema: Schema) -> Batch:
    """An encoded frame as one batch; labels that the frame lacks are NaN (unobserved)."""
    missing = [pl.lit(None, pl.Float32).alias(t.name) for t in schema.labels if t.name not in frame.columns]
    table = frame.with_columns(missing).with_columns(pl.col([t.name for t in schema.labels]).fill_null(float("nan")))
    columns = [
        *schema.numeric_columns,
        *schema.embedded(),
        *schema.event_number_keys,
        *(label.name for label in schema.labels),
        *(key for key in KEY_COLUMNS.values() if key in frame.columns),
    ]
    block = Block.from_arrow(table.select(columns).to_arrow(compat_level=pl.CompatLevel.oldest()), schema)
    return block.take(np.arange(len(block)), schema)


class Loader:
    """Batches of one split of a dataset, one epoch per iteration.

    Order depends on `seed` and the epoch only, not on threads. With `shuffle`, row groups are drawn in random order
    into windows of at most `memory_limit` bytes and rows are permuted within a window; a split that fits in one
    window is decoded once, kept, and permuted as a whole.

    Args:
        workers: threads that assemble batches ahead of the consumer.
        schema: columns to read; default the dataset's own.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 1,
        drop_last: bool = False,
        schema: Schema | None = None,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        if batch_size < 1 or workers < 1:
            raise ValueError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}")
        self.schema = schema or dataset.schema
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.workers = workers
        self.drop_last = drop_last
        self.epoch = 0
        self._next_batch = 0
        self._groups: list[tuple[Path, int, int, int]] = []
        for shard in dataset.shards(split):
            metadata = pq.read_metadata(shard)
            for group in range(metadata.num_row_groups):
                part = metadata.row_group(group)
                self._groups.append((shard, group, part.num_rows, part.total_byte_size))
        self.rows = sum(rows for _, _, rows, _ in self._groups)
        self._memory_limit = memory_limit
        self._whole: Block | None = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        full, rest = divmod(self.rows, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def state(self) -> dict[str, int]:
        """Where the consumer is: the epoch and the batches it has taken of it."""
        return {"epoch": self.epoch, "batch": self._next_batch}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from `state()`: the next iteration yields the batches that were still to come."""
        self.epoch, self._next_batch = state["epoch"], state["batch"]

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(self.workers, thread_name_prefix="loader") as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for block, rows in self._row_blocks(self._next_batch):
                    ahead.append(pool.submit(block.take, rows, self.schema))
                    if len(ahead) > 2 * self.workers:
                        self._next_batch += 1
                        yield ahead.popleft().result()
                while ahead:
                    self._next_batch += 1
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()
        self.epoch += 1
        self._next_batch = 0

    def _row_blocks(self, skip: int) -> Iterator[tuple[Block, npt.NDArray[np.int64]]]:
        """The rows of each batch from batch number `skip` on, and the block that holds them."""
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self._groups)) if self.shuffle else np.arange(len(self._groups))
        behind = skip * self.batch_size
        limit = len(self) * self.batch_size if self.drop_last else self.rows
        emitted = behind
        rest: Block | None = None
        for window in self._windows(order):
            window_rows = sum(self._groups[i][2] for i in window)
            permutation = generator.permutation(window_rows) if self.shuffle else np.arange(window_rows)
            if behind >= window_rows:
                behind -= window_rows
                continue
            block = self._read(window)
            rows, behind = permutation[behind:], 0
            if rest is not None:  # a batch may end in the next window
                kept = len(rest)
                block = Block.joined([rest, block])
                rows = np.concatenate([np.arange(kept), rows + kept])
                rest = None
            full = len(rows) // self.batch_size * self.batch_size
            for begin in range(0, full, self.batch_size):
                emitted += self.batch_size
                yield block, rows[begin : begin + self.batch_size]
            if full < len(rows):
                rest = _subset(block, rows[full:])
        if rest is not None and emitted < limit:
            yield rest, np.arange(len(rest))

    def _windows(self, order: npt.NDArray[np.int64]) -> Iterator[list[int]]:
        total = sum(size for *_, size in self._groups)
        if not self.shuffle and total > self._memory_limit:
            yield from ([int(i)] for i in order)
            return
        window: list[int] = []
        size = 0
        for i in order:
            if window and size + self._groups[i][3] > self._memory_limit:
                yield window
                window, size = [], 0
            window.append(int(i))
            size += self._groups[i][3]
        if window:
            yield window

    def _read(self, window: list[int]) -> Block:
        everything = len(window) == len(self._groups)
        if everything and self._whole is not None:
            return self._whole
        columns = [
            *self.schema.numeric_columns,
            *self.schema.embedded(),
            *self.schema.event_number_keys,
            *(label.name for label in self.schema.labels),
        ]
        blocks = []
        # A kept split is read in stored order, so that the permutation alone decides the order of rows.
        for i in sorted(window) if everything else window:
            shard, group, *_ = self._groups[i]
            with pq.ParquetFile(shard) as file:
                keys = [KEY_COLUMNS[k] for k in ("weight", "timestamp", "user_id")]
                present = [key for key in keys if key in file.schema_arrow.names]
                table = file.read_row_group(group, columns=[*columns, *present], use_threads=False)
                blocks.append(Block.from_arrow(table, self.schema))
        block = Block.joined(blocks)
        if everything:
            self._whole = block
        return block


def _subset(block: Block, rows: npt.NDArray[np.int64]) -> Block:
    def jagged(column: _Jagged) -> _Jagged:
        values, lengths = column.take(rows)
        return _Jagged(values, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))

    def optional(array: Any) -> Any:
        return None if array is None else array[rows]

    return Block(
        block.numeric_nN[rows],
        block.ids_nF[rows],
        [jagged(column) for column in block.bags],
        [jagged(column) for column in block.events],
        block.labels_nT[rows],
        optional(block.weights_n),
        optional(block.timestamp_n),
        optional(block.user_n),
    )
