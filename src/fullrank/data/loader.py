"""Encoded Parquet to batches: shuffled, prefetched by threads, resumable at any batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from fullrank.batch import Batch
from fullrank.data.building import encoded_columns
from fullrank.data.dataset import Dataset
from fullrank.data.decoding import DecodedRows, Decoder, Ints, bytes_of, columns_of
from fullrank.schema import Schema

MEMORY_LIMIT = 1 << 30
# Batches that each worker has ready, or in the making, before they are asked for.
AHEAD = 3


def batch_from_frame(frame: pl.DataFrame, schema: Schema, *, extra: Sequence[str] = ()) -> Batch:
    """An encoded frame as one batch, in the frame's order.

    Labels and keys may be absent: labels are then NaN (unobserved), keys None.

    Args:
        extra: further columns, for `Batch.extra`.

    Raises:
        ValueError: if a feature's or a further column is absent, has another type, or holds an impossible value.
    """
    columns = [name for name in dict.fromkeys((*columns_of(schema), *extra)) if name in frame.columns]
    decoder = Decoder(schema, frame.height, columns, "frame", extra=extra)
    decoder.add(frame.select(columns).to_arrow())
    return decoder.finish().batch(slice(0, frame.height), schema)


def partial_batch(frame: pl.DataFrame, schema: Schema) -> Batch:
    """A batch from an encoded frame that has only some of the schema's columns.

    What is absent is filled with the missing id, 0, no events and unobserved labels.
    """
    absent: list[pl.Expr] = []
    absent += [pl.lit(0.0, pl.Float32).alias(name) for name in schema.numeric_columns if name not in frame.columns]
    types = encoded_columns(schema)
    absent += [pl.lit(0, types[f.name]).alias(f.name) for f in schema.categorical if f.name not in frame.columns]
    for name in (*schema.jagged_keys, *schema.event_number_keys):
        if name not in frame.columns:
            absent.append(pl.lit([], types[name]).alias(name))
    return batch_from_frame(frame.with_columns(absent), schema)


class Loader:
    """One split of a dataset as batches.

    A split that fits in `memory_limit` is decoded once, held compactly and shuffled as a whole. A larger one is read
    anew in each epoch: row groups in random order, and rows shuffled inside windows of consecutive row groups that
    take a third of `memory_limit`. The order of rows depends on `seed` and the number of the epoch alone, never on
    the threads.

    Args:
        shuffle: a new order in each epoch; else stored order.
        workers: threads that put batches together ahead of their use; 0 works in the caller's thread. Row groups are
            decoded by one more thread.
        drop_last: leave out the last batch of an epoch if it is smaller than the others.
        schema: the columns to read; a part of the dataset's schema. Default: all of it.
        memory_limit: bytes of decoded rows to hold.
        extra: further columns of the dataset, for `Batch.extra`: whole numbers as int64, others as float32, lists of D
            numbers as (B, D).

    Attributes:
        epoch: number of the epoch that the next iteration gives, from 0.
        rows: of the split.

    Raises:
        ValueError: if the split or a column does not exist, or (while iterating) a column holds an impossible value.
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
        extra: Sequence[str] = (),
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        if workers < 0:
            raise ValueError(f"workers is {workers}, expected at least 0")
        self.schema = schema or dataset.schema
        self.split = split
        self._dataset = dataset  # which may be a temporary one that goes with its object
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.workers = workers
        self.drop_last = drop_last
        self._extra = tuple(dict.fromkeys(extra))
        own = columns_of(self.schema)
        self._columns = list(dict.fromkeys((*own, *self._extra)))
        self._groups: list[_RowGroup] = []
        size = 0
        for path in dataset.shards(split):
            metadata = pq.read_metadata(path)
            leaves = [metadata.schema.column(i).path.split(".list.")[0] for i in range(metadata.num_columns)]
            for name in self._columns:
                if name not in leaves:
                    kept = f"; further columns that were kept: {', '.join(dataset.extra) or 'none'}"
                    hint = kept if name in self._extra else ""
                    raise ValueError(f'{path}: column "{name}" is missing{hint}')
            for index in range(metadata.num_row_groups):
                group = metadata.row_group(index)
                self._groups.append(_RowGroup(path, index, group.num_rows))
                counts = {name: group.column(i).num_values for i, name in enumerate(leaves)}
                size += sum(bytes_of(name, self.schema) * counts[name] for name in own)
                size += sum(8 * counts[name] for name in self._extra)
                size += 4 * group.num_rows * len((*self.schema.jagged_keys, *self.schema.event_number_keys))
        self.rows = sum(group.rows for group in self._groups)
        self.in_memory = size <= memory_limit
        self._held: DecodedRows | None = None
        average = max(1, size // max(1, len(self._groups)))
        # Up to three windows live at a time: the one in use, the one being decoded, and the tail of the one before.
        self._groups_per_window = max(1, memory_limit // 3 // average) if shuffle else 1
        self.epoch = 0
        self._batch = 0
        self._start = 0

    @property
    def fingerprint(self) -> str:
        """That of the rows: see `Dataset.fingerprint`."""
        return self._dataset.fingerprint(self.split)

    def __len__(self) -> int:
        """Number of batches of a whole epoch."""
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def state(self) -> dict[str, int]:
        """Where the next batch is; give it to `restore` of a loader built alike to go on from there."""
        return {
            "epoch": self.epoch,
            "batch": self._batch,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "rows": self.rows,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Begin the next iteration where `state()` was taken, in the middle of its epoch.

        Raises:
            ValueError: if the state is of a loader with another seed, batch size or number of rows.
        """
        for name, own in (("seed", self.seed), ("batch_size", self.batch_size), ("rows", self.rows)):
            if state.get(name) != own:
                raise ValueError(f"loader state has {name} {state.get(name)}, this loader has {own}")
        if not 0 <= state["batch"] <= len(self) or state["epoch"] < 0:
            raise ValueError(f"loader state is at epoch {state['epoch']}, batch {state['batch']} of {len(self)}")
        self.epoch, self._batch = state["epoch"], state["batch"]
        self._start = self._batch

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch, or what is left of it after `restore`.

        An epoch counts when it is finished: an iteration that is abandoned is repeated by the next one.
        """
        self._batch, self._start = self._start, 0
        for batch in self._produce(self.epoch, self._batch):
            self._batch += 1
            yield batch
        self.epoch, self._batch = self.epoch + 1, 0

    def _windows(self, epoch: int) -> list[_Window]:
        if self.in_memory:
            chunks = [self._groups]
        else:
            groups = self._groups
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(groups))
                groups = [groups[place] for place in order]
            step = self._groups_per_window
            chunks = [groups[begin : begin + step] for begin in range(0, len(groups), step)]
        windows, begin = [], 0
        for index, chunk in enumerate(chunks):
            windows.append(_Window(index, begin, chunk))
            begin += windows[-1].rows
        return windows

    def _load(self, window: _Window, epoch: int) -> tuple[DecodedRows, Ints | None]:
        """Decoded rows of a window and the order to take them in."""
        rows = self._held
        if rows is None:
            rows = self._decode(window.groups)
            if self.in_memory:
                self._held = rows
        if not self.shuffle:
            return rows, None
        order = np.arange(window.rows, dtype=np.int32)
        np.random.default_rng([self.seed, epoch, window.index]).shuffle(order)
        return rows, order

    def _decode(self, groups: Sequence[_RowGroup]) -> DecodedRows:
        rows = sum(group.rows for group in groups)
        decoder = Decoder(self.schema, rows, self._columns, "", later=self._dataset.later, extra=self._extra)
        path, file = None, None
        for group in groups:
            if group.path != path:
                path, file = group.path, pq.ParquetFile(group.path, memory_map=True)
            assert file is not None
            table = pa.Table.from_batches(
                file.iter_batches(
                    batch_size=group.rows, row_groups=[group.place], columns=self._columns, use_threads=False
                )
            )
            decoder.place = str(group.path)
            decoder.add(table)
            del table
        pa.default_memory_pool().release_unused()  # Arrow would keep what it freed as resident memory
        return decoder.finish()

    def _produce(self, epoch: int, first: int) -> Iterator[Batch]:
        windows = self._windows(epoch)
        jobs = iter(self._jobs(windows, first))
        if self.workers == 0:
            yield from self._in_line(jobs, epoch)
            return
        decoding = ThreadPoolExecutor(1, thread_name_prefix="decode")
        assembling = ThreadPoolExecutor(self.workers, thread_name_prefix="batch")
        loaded: dict[int, Future[tuple[DecodedRows, Ints | None]]] = {}
        pending: deque[Future[Batch]] = deque()

        def submit() -> None:
            job = next(jobs, None)
            if job is None:
                return
            needed = [part.window.index for part in job]
            for index in [old for old in loaded if old < needed[0]]:
                del loaded[index]
            for window in windows[needed[0] : needed[-1] + 2]:
                if window.index not in loaded:
                    loaded[window.index] = decoding.submit(self._load, window, epoch)
            sources = [loaded[index] for index in needed]
            pending.append(assembling.submit(self._assemble, job, sources))

        try:
            for _ in range(self.workers * AHEAD):
                submit()
            while pending:
                batch = pending.popleft().result()
                submit()
                yield batch
        finally:
            decoding.shutdown(wait=False, cancel_futures=True)
            assembling.shutdown(wait=False, cancel_futures=True)

    def _in_line(self, jobs: Iterator[list[_Part]], epoch: int) -> Iterator[Batch]:
        loaded: dict[int, tuple[DecodedRows, Ints | None]] = {}
        for job in jobs:
            for index in [old for old in loaded if old < job[0].window.index]:
                del loaded[index]
            pieces = []
            for part in job:
                if part.window.index not in loaded:
                    loaded[part.window.index] = self._load(part.window, epoch)
                pieces.append(self._piece(part, *loaded[part.window.index]))
            yield Batch.cat(pieces)

    def _jobs(self, windows: list[_Window], first: int) -> Iterator[list[_Part]]:
        """The parts of each batch from number `first` on: a batch may reach over the end of a window."""
        current = 0
        for number in range(first, len(self)):
            begin, end = number * self.batch_size, min((number + 1) * self.batch_size, self.rows)
            parts = []
            while begin < end:
                window = windows[current]
                stop = min(end, window.begin + window.rows)
                if begin < stop:
                    parts.append(_Part(window, begin - window.begin, stop - window.begin))
                    begin = stop
                if begin < end:
                    current += 1
            yield parts

    def _assemble(self, job: list[_Part], sources: list[Future[tuple[DecodedRows, Ints | None]]]) -> Batch:
        return Batch.cat([self._piece(part, *source.result()) for part, source in zip(job, sources, strict=True)])

    def _piece(self, part: _Part, rows: DecodedRows, order: Ints | None) -> Batch:
        if order is None:
            return rows.batch(slice(part.begin, part.end), self.schema)
        return rows.batch(order[part.begin : part.end].astype(np.int64), self.schema)


class _RowGroup(NamedTuple):
    path: Path
    place: int
    rows: int


class _Window:
    """Row groups whose rows are shuffled together; `begin` is the place of its first row in the epoch."""

    def __init__(self, index: int, begin: int, groups: Sequence[_RowGroup]) -> None:
        self.index = index
        self.begin = begin
        self.groups = groups
        self.rows = sum(group.rows for group in groups)


class _Part(NamedTuple):
    window: _Window
    begin: int
    end: int
