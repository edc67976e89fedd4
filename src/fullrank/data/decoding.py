"""Encoded columns to compact rows, every value checked on the way, and compact rows to batches."""

# Shapes: R decoded rows, B rows of a batch, N numeric columns, F single-id features, K jagged keys, E event-number
# keys, T tasks.

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import torch

from fullrank.batch import Batch
from fullrank.data.arrow import as_numpy, as_one_array
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.hashing import stable_hash
from fullrank.schema import OUT_OF_VOCABULARY_ID, Schema

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)


class DecodedLists(NamedTuple):
    """Lists of K keys: row r of key k is `values[offsets_KR1[k, r] : offsets_KR1[k, r + 1]]`."""

    values: npt.NDArray[Any]
    offsets_KR1: npt.NDArray[Any]

    def gather(self, rows: Longs | slice, dtype: npt.DTypeLike) -> tuple[npt.NDArray[Any], Longs]:
        """Values and lengths_KB of some rows, laid out as `Batch` wants them, without a loop over rows."""
        if isinstance(rows, slice):
            starts_KB = self.offsets_KR1[:, rows]
            ends_KB = self.offsets_KR1[:, rows.start + 1 : rows.stop + 1]
        else:
            starts_KB = self.offsets_KR1.take(rows, axis=1)
            ends_KB = self.offsets_KR1.take(rows + 1, axis=1)
        lengths_KB = (ends_KB - starts_KB).astype(np.int64)
        lengths = lengths_KB.ravel()
        # Place of each value: where its list begins in the store, plus how far it is into the list.
        shift = starts_KB.ravel() - (lengths.cumsum() - lengths)
        places = np.repeat(shift, lengths)
        places += np.arange(len(places))
        return self.values.take(places).astype(dtype, copy=False), lengths_KB


@dataclass(frozen=True)
class DecodedRows:
    """Decoded rows in a compact form: 4 bytes a number or id, 8 an id where some are wide, row after row."""

    numeric_RN: Floats
    ids_RF: Ints | Longs
    labels_RT: Floats
    jagged: DecodedLists
    events: DecodedLists
    weights_R: Floats | None
    timestamp_R: Longs | None
    user_R: Longs | None
    extra: dict[str, npt.NDArray[Any]]

    def batch(self, rows: Longs | slice, schema: Schema) -> Batch:
        """Some rows, in the given order, as a batch."""
        jagged_values, jagged_lengths_KB = self.jagged.gather(rows, np.int64)
        event_values, event_lengths_EB = self.events.gather(rows, np.float32)

        def of(store: npt.NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(store[rows].copy() if isinstance(rows, slice) else store.take(rows, axis=0))

        ids = self.ids_RF[rows] if isinstance(rows, slice) else self.ids_RF.take(rows, axis=0)
        return Batch(
            numeric_BN=of(self.numeric_RN),
            ids_BF=torch.from_numpy(ids.astype(np.int64)),
            jagged_keys=schema.jagged_keys,
            jagged_values=torch.from_numpy(jagged_values),
            jagged_lengths_KB=torch.from_numpy(jagged_lengths_KB),
            event_keys=schema.event_number_keys,
            event_values=torch.from_numpy(event_values),
            event_lengths_EB=torch.from_numpy(event_lengths_EB),
            labels_BT=of(self.labels_RT),
            weights_B=None if self.weights_R is None else of(self.weights_R),
            timestamp_B=None if self.timestamp_R is None else of(self.timestamp_R),
            user_B=None if self.user_R is None else of(self.user_R),
            extra={name: of(store) for name, store in self.extra.items()},
        )


def columns_of(schema: Schema) -> list[str]:
    """Columns of a shard that a batch of this schema is made of."""
    names = [*schema.numeric_columns, *schema.embedded(), *schema.event_number_keys]
    names += [label.name for label in schema.labels]
    keys = ("user_id", "timestamp", "weight")
    return names + [KEY_COLUMNS[key] for key in keys if getattr(schema.keys, key) is not None]


def bytes_of(column: str, schema: Schema) -> int:
    """What a value of a column of this schema takes, decoded."""
    if column in (KEY_COLUMNS["user_id"], KEY_COLUMNS["timestamp"]):
        return 8
    return np.dtype(id_type(schema)).itemsize if column in schema.embedded() else 4


def id_type(schema: Schema) -> type[np.int32] | type[np.int64]:
    """Of the decoded ids of a schema."""
    return np.int64 if any(feature.is_wide for feature in schema.embedded().values()) else np.int32


class Decoder:
    """Fills the compact store of a known number of rows from Arrow tables, and checks every value on the way.

    Args:
        columns: those that the tables have.
        place: of the next table, for messages.
        later: ids of a column that are out of vocabulary, though the tables have them; see `Dataset.later`.
        extra: further columns for `Batch.extra`: numbers, or lists of equally many numbers. Whole ones become int64,
            others float32, in which a missing one is NaN.
    """

    def __init__(
        self,
        schema: Schema,
        rows: int,
        columns: Sequence[str],
        place: str,
        *,
        later: Mapping[str, range] | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.schema = schema
        self.place = place
        self._present = set(columns)
        self._done = 0
        self._numeric_RN = np.empty((rows, len(schema.numeric_columns)), dtype=np.float32)
        self._id_type = id_type(schema)
        self._ids_RF: npt.NDArray[Any] = np.empty((rows, len(schema.categorical)), dtype=self._id_type)
        self._labels_RT = np.full((rows, len(schema.labels)), np.nan, dtype=np.float32)
        self._weights_R = np.empty(rows, dtype=np.float32) if KEY_COLUMNS["weight"] in columns else None
        self._timestamp_R = np.empty(rows, dtype=np.int64) if KEY_COLUMNS["timestamp"] in columns else None
        self._user_R = np.empty(rows, dtype=np.int64) if KEY_COLUMNS["user_id"] in columns else None
        self._lists: dict[str, list[npt.NDArray[Any]]] = {
            name: [] for name in (*schema.jagged_keys, *schema.event_number_keys)
        }
        self._lengths = {name: np.zeros(rows, dtype=np.int32) for name in self._lists}
        self._extra: dict[str, npt.NDArray[Any]] = {name: np.empty(0, dtype=np.float32) for name in extra}
        self._later = later or {}
        self._features = schema.embedded()

    def add(self, table: pa.Table) -> None:
        begin, end = self._done, self._done + table.num_rows
        self._done = end
        for place, name in enumerate(self.schema.numeric_columns):
            values = self._flat(table, name, np.float32)
            if not np.isfinite(values).all():
                raise ValueError(f'{self.place}: column "{name}" has NaN or infinity, expected finite numbers')
            self._numeric_RN[begin:end, place] = values
        for place, feature in enumerate(self.schema.categorical):
            ids = self._flat(table, feature.name, np.int64 if feature.is_wide else np.int32)
            self._ids_RF[begin:end, place] = self._known(feature.name, ids)
        for place, label in enumerate(self.schema.labels):
            if label.name not in self._present:
                continue
            values = self._flat(table, label.name, np.float32, nulls=True)
            if label.kind == "binary" and ((values < 0) | (values > 1)).any():
                raise ValueError(f'{self.place}: label "{label.name}" has values outside [0, 1]')
            self._labels_RT[begin:end, place] = values
        for name in self._lists:
            event = name in self.schema.event_number_keys
            dtype = np.float32 if event else np.int64 if self._features[name].is_wide else np.int32
            offsets, values = self._list(table, name, dtype)
            if event and not np.isfinite(values).all():
                raise ValueError(f'{self.place}: column "{name}" has NaN or infinity, expected finite numbers')
            if not event:
                values = self._known(name, values)
            self._lengths[name][begin:end] = np.diff(offsets)
            self._lists[name].append(values.copy())  # not a view, so that Arrow's memory can go
        if self._weights_R is not None:
            weights = self._weights_R[begin:end] = self._flat(table, KEY_COLUMNS["weight"], np.float32)
            if not (np.isfinite(weights) & (weights >= 0)).all():
                raise ValueError(f'{self.place}: column "__weight" has values that are not finite and >= 0')
        if self._timestamp_R is not None:
            self._timestamp_R[begin:end] = self._flat(table, KEY_COLUMNS["timestamp"], np.int64)
        if self._user_R is not None:
            self._user_R[begin:end] = _user_keys(self._column(table, KEY_COLUMNS["user_id"]))
        for name in self._extra if table.num_rows else ():
            numbers = self._numbers(table, name)
            if begin == 0:
                self._extra[name] = np.empty((self._ids_RF.shape[0], *numbers.shape[1:]), dtype=numbers.dtype)
            store = self._extra[name]
            if numbers.shape[1:] != store.shape[1:] or numbers.dtype != store.dtype:
                found, before = (f"{array.dtype} of shape {array.shape[1:]}" for array in (numbers, store))
                raise ValueError(f'{self.place}: column "{name}" is {found}, and {before} before')
            store[begin:end] = numbers

    def finish(self) -> DecodedRows:
        for sequence in self.schema.sequences:
            first, *others = (sequence.column(field) for field in sequence.fields)
            for other in others:
                if not np.array_equal(self._lengths[first], self._lengths[other]):
                    raise ValueError(
                        f'{self.place}: columns "{first}" and "{other}" of one sequence have lists of unequal length'
                    )
        return DecodedRows(
            self._numeric_RN,
            self._ids_RF,
            self._labels_RT,
            self._join(self.schema.jagged_keys, self._id_type),
            self._join(self.schema.event_number_keys, np.float32),
            self._weights_R,
            self._timestamp_R,
            self._user_R,
            self._extra,
        )

    def _join(self, keys: tuple[str, ...], dtype: npt.DTypeLike) -> DecodedLists:
        rows = self._ids_RF.shape[0]
        total = sum(len(piece) for name in keys for piece in self._lists[name])
        values = np.empty(total, dtype=dtype)
        offsets_KR1 = np.zeros((len(keys), rows + 1), dtype=np.int32 if total < 2**31 else np.int64)
        begin = 0
        for place, name in enumerate(keys):
            np.cumsum(self._lengths.pop(name), out=offsets_KR1[place, 1:])
            offsets_KR1[place] += begin
            pieces = deque(self._lists.pop(name))
            while pieces:  # each piece is let go once copied, so that the lists are never in memory twice
                piece = pieces.popleft()
                values[begin : begin + len(piece)] = piece
                begin += len(piece)
        return DecodedLists(values, offsets_KR1)

    def _column(self, table: pa.Table, name: str) -> Any:
        if name not in self._present:
            raise ValueError(f'{self.place}: column "{name}" is missing')
        return as_one_array(table.column(name))

    def _flat(self, table: pa.Table, name: str, dtype: type[Number], *, nulls: bool = False) -> npt.NDArray[Number]:
        column = self._column(table, name)
        if column.null_count and not nulls:
            raise ValueError(f'{self.place}: column "{name}" has nulls')
        values: npt.NDArray[Number] = as_numpy(column)
        if values.dtype != dtype:
            raise ValueError(f'{self.place}: column "{name}" is {column.type}, expected {np.dtype(dtype).name}')
        return values

    def _list(self, table: pa.Table, name: str, dtype: type[np.generic]) -> tuple[Longs, npt.NDArray[Any]]:
        column = self._column(table, name)
        expected = np.dtype(dtype).name
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise ValueError(f'{self.place}: column "{name}" is {column.type}, expected lists of {expected}')
        if column.null_count:
            raise ValueError(f'{self.place}: column "{name}" has nulls, expected lists (an empty one for no value)')
        flat = column.flatten()
        if flat.null_count or flat.type != pa.from_numpy_dtype(dtype):
            found = "nulls in its lists" if flat.null_count else f"lists of {flat.type}"
            raise ValueError(f'{self.place}: column "{name}" has {found}, expected lists of {expected}')
        return as_numpy(column.offsets), as_numpy(flat)

    def _numbers(self, table: pa.Table, name: str) -> npt.NDArray[Any]:
        """A further column: shape (rows,), or (rows, D) for lists of D."""
        column = self._column(table, name)
        flat = column
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            lengths = np.diff(as_numpy(column.offsets))
            if column.null_count or (lengths != lengths[0]).any():
                raise ValueError(f'{self.place}: column "{name}" has lists of unequal length, expected equal ones')
            flat = column.flatten()
            column = pa.FixedSizeListArray.from_arrays(flat, int(lengths[0]))
        elif pa.types.is_fixed_size_list(column.type):
            flat = column.flatten()
        whole = pa.types.is_integer(flat.type) or pa.types.is_boolean(flat.type)
        if not whole and not pa.types.is_floating(flat.type):
            raise ValueError(f'{self.place}: column "{name}" is {column.type}, expected numbers, or lists of them')
        if column.null_count and (whole or flat is not column):
            raise ValueError(f'{self.place}: column "{name}" has nulls')
        if whole and flat.null_count:
            raise ValueError(f'{self.place}: column "{name}" has nulls among whole numbers')
        return np.asarray(as_numpy(column), dtype=np.int64 if whole else np.float32)

    def _known(self, name: str, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The ids once they are checked, later ones out of vocabulary."""
        later = self._later.get(name)
        size = self._features[name].num_embeddings if later is None else later.stop
        if size is not None and len(ids) and (ids.min() < 0 or ids.max() >= size):
            bad = ids[(ids < 0) | (ids >= size)][0]
            raise ValueError(f'{self.place}: column "{name}" has id {bad}, expected 0 to {size - 1}')
        return ids if later is None else np.where(ids < later.start, ids, np.int32(OUT_OF_VOCABULARY_ID))


def _user_keys(column: pa.Array) -> Longs:
    """One number per user; 0 for rows without one."""
    if pa.types.is_integer(column.type):
        return np.asarray(as_numpy(column.fill_null(0)).astype(np.int64))
    hashes = stable_hash(pl.Series("user", pl.from_arrow(column))).fill_null(0)
    return np.asarray(hashes.to_numpy().view(np.int64))
