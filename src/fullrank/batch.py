"""The one tensor container that flows through every model."""

# Shapes: B rows, P rows of a result, N numeric columns, F single-id features, K jagged keys, E event-number keys,
# T tasks.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fullrank.extras import needs

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

# What a field holds, said once for all that works on rows: an entry per row, or None; such tensors by name; the values
# of lists (of key 0 for all rows, then of key 1, ...), and which field has their lengths. Others never change.
_ROW, _ROWS_BY_NAME = {"holds": "row"}, {"holds": "rows by name"}
_IDS, _NUMBERS = {"holds": "values", "lengths": "jagged_lengths_KB"}, {"holds": "values", "lengths": "event_lengths_EB"}
_LENGTHS = {"holds": "lengths"}


@dataclass(frozen=True)
class Batch:
    """Rows of a log as tensors. Columns follow the schema's order (`Schema.numeric_columns`, `.categorical`,
    `.jagged_keys`, `.event_number_keys`, `.labels`).

    Each field says once whether it goes by row or holds lists; what works on rows follows from that.

    Attributes:
        numeric_BN: float32, transformed numbers.
        ids_BF: int64, one row id per single-id feature.
        jagged_values: int64, shape (sum of jagged_lengths_KB,): the ids of key 0 for all rows, then of key 1, ...;
            within a row oldest first for sequences. The layout of TorchRec's `KeyedJaggedTensor`.
        jagged_lengths_KB: int64, number of ids of each key in each row.
        event_values: float32, shape (sum of event_lengths_EB,): numbers carried by sequence events, laid out alike.
        event_lengths_EB: int64.
        labels_BT: float32; NaN where a label was not observed.
        weights_B: float32 importance of the rows, or None for equal weights.
        timestamp_B: int64 seconds since 1970, or None.
        user_B: int64 key that groups the rows of one user (GAUC), or None.
        extra: further columns of the dataset by name, first dimension B: teacher labels, embeddings, propensities.
    """

    numeric_BN: Tensor = field(metadata=_ROW)
    ids_BF: Tensor = field(metadata=_ROW)
    jagged_keys: tuple[str, ...]
    jagged_values: Tensor = field(metadata=_IDS)
    jagged_lengths_KB: Tensor = field(metadata=_LENGTHS)
    event_keys: tuple[str, ...]
    event_values: Tensor = field(metadata=_NUMBERS)
    event_lengths_EB: Tensor = field(metadata=_LENGTHS)
    labels_BT: Tensor = field(metadata=_ROW)
    weights_B: Tensor | None = field(default=None, metadata=_ROW)
    timestamp_B: Tensor | None = field(default=None, metadata=_ROW)
    user_B: Tensor | None = field(default=None, metadata=_ROW)
    extra: dict[str, Tensor] = field(default_factory=dict, metadata=_ROWS_BY_NAME)

    def __len__(self) -> int:
        return self.ids_BF.shape[0]

    @property
    def device(self) -> torch.device:
        return self.ids_BF.device

    def jagged(self, key: str) -> tuple[Tensor, Tensor]:
        """Values and lengths_B of one jagged key.

        Raises:
            KeyError: if the batch has no such key.
        """
        return _jagged(self.jagged_keys, self.jagged_values, self.jagged_lengths_KB, key)

    def events(self, key: str) -> tuple[Tensor, Tensor]:
        """Numbers and lengths_B of one event-number key.

        Raises:
            KeyError: if the batch has no such key.
        """
        return _jagged(self.event_keys, self.event_values, self.event_lengths_EB, key)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the batch."""
        for name in _ALL:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, dict):
                yield from value.values()

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory from being used anew before what `stream` was given so far is done; a CPU has no streams."""
        for tensor in self.tensors():
            if tensor.device.type != "cpu":
                tensor.record_stream(stream)

    def __getitem__(self, rows: slice) -> Batch:
        """A contiguous slice of rows (step 1)."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"a Batch can be sliced with step 1 only, got {step}")
        stop = max(start, stop)

        def cut(_: str, values: Tensor, lengths_KB: Tensor) -> tuple[Tensor, Tensor]:
            if lengths_KB.shape[0] == 0:
                return values, lengths_KB[:, start:stop]
            ends = lengths_KB.reshape(-1).cumsum(0)
            offsets = torch.cat([ends.new_zeros(1), ends])
            size = lengths_KB.shape[1]
            pieces = [
                values[offsets[key * size + start] : offsets[key * size + stop]] for key in range(lengths_KB.shape[0])
            ]
            return torch.cat(pieces), lengths_KB[:, start:stop].contiguous()

        return self._changed(lambda column: column[start:stop], cut)

    def take(self, rows_P: Tensor) -> Batch:
        """The given rows, in the given order; rows may repeat. See `RowGather` for taking again and again."""
        return RowGather(self).take(rows_P)

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """Batches of the same columns, one below the other. Weights, timestamps and users stay if all have them.

        Raises:
            ValueError: if there is no batch, or they differ in their keys or further columns.
        """
        if not batches:
            raise ValueError("there is no batch to join")
        first = batches[0]
        if len(batches) == 1:
            return first
        for name in _CONSTANT:
            if any(getattr(batch, name) != getattr(first, name) for batch in batches):
                raise ValueError(f"the batches to join differ in their {name}")
        joined: dict[str, Any] = {name: getattr(first, name) for name in _CONSTANT}
        for name in _BY_ROW:
            columns = [getattr(batch, name) for batch in batches]
            joined[name] = None if any(column is None for column in columns) else torch.cat(columns)
        for name in _NAMED:
            if any(getattr(batch, name).keys() != getattr(first, name).keys() for batch in batches):
                raise ValueError(f"the batches to join differ in their {name} columns")
            joined[name] = {key: torch.cat([getattr(b, name)[key] for b in batches]) for key in getattr(first, name)}
        for values, lengths in _LISTS:
            split = [getattr(b, values).split(getattr(b, lengths).sum(1).tolist()) for b in batches]
            by_key = [pieces[key] for key in range(getattr(first, lengths).shape[0]) for pieces in split]
            joined[values] = torch.cat(by_key) if by_key else getattr(first, values)[:0]
            joined[lengths] = torch.cat([getattr(batch, lengths) for batch in batches], 1)
        return Batch(**joined)

    def keyed_jagged_tensor(self) -> KeyedJaggedTensor:
        """The jagged part as TorchRec's container, sharing memory with this batch (needs torchrec)."""
        with needs("distributed", "a KeyedJaggedTensor"):
            from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

        return KeyedJaggedTensor(
            keys=list(self.jagged_keys), values=self.jagged_values, lengths=self.jagged_lengths_KB.reshape(-1)
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return self._changed(change, lambda _, values, lengths_KB: (change(values), change(lengths_KB)))

    def _changed(
        self,
        column: Callable[[Tensor], Tensor],
        lists: Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Batch:
        """A batch of changed tensors.

        Args:
            column: of a tensor with an entry per row.
            lists: of the name of a field of lists, its values and their lengths, which it returns both.
        """
        changed: dict[str, Any] = {name: getattr(self, name) for name in _CONSTANT}
        for name in _BY_ROW:
            value = getattr(self, name)
            changed[name] = None if value is None else column(value)
        for name in _NAMED:
            changed[name] = {key: column(value) for key, value in getattr(self, name).items()}
        for values, lengths in _LISTS:
            changed[values], changed[lengths] = lists(values, getattr(self, values), getattr(self, lengths))
        return Batch(**changed)


def _names(holds: str | None) -> tuple[str, ...]:
    return tuple(each.name for each in fields(Batch) if each.metadata.get("holds") == holds)


_ALL = tuple(each.name for each in fields(Batch))
_CONSTANT, _BY_ROW, _NAMED = _names(None), _names("row"), _names("rows by name")
_LISTS = tuple((each.name, each.metadata["lengths"]) for each in fields(Batch) if "lengths" in each.metadata)


class RowGather:
    """A batch to take rows from again and again: where each row's ids begin is computed once.

    Whole numbers may be held as int32, in half the memory; what is taken has them as int64.

    Attributes:
        starts: by field of lists, where in it the values of each key and row begin.
    """

    def __init__(self, batch: Batch, starts: dict[str, Tensor] | None = None) -> None:
        self.batch = batch
        self.starts = starts or {values: _starts(getattr(batch, lengths)) for values, lengths in _LISTS}

    def __len__(self) -> int:
        return len(self.batch)

    def take(self, rows_P: Tensor) -> Batch:
        """The given rows, in the given order; rows may repeat."""
        return self.batch._changed(
            lambda column: _wide(column.index_select(0, rows_P)),
            lambda name, values, lengths_KB: _gather(values, self.starts[name], lengths_KB, rows_P),
        )

    def jagged(self, rows_P: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Ids and lengths of the given rows for keys `first` to `last`, the latter left out."""
        lengths_KB, starts_KB = self.batch.jagged_lengths_KB[first:last], self.starts["jagged_values"][first:last]
        return _gather(self.batch.jagged_values, starts_KB, lengths_KB, rows_P)

    def events(self, rows_P: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Numbers of events, likewise."""
        lengths_KB, starts_KB = self.batch.event_lengths_EB[first:last], self.starts["event_values"][first:last]
        return _gather(self.batch.event_values, starts_KB, lengths_KB, rows_P)


def _starts(lengths_KB: Tensor) -> Tensor:
    flat = lengths_KB.reshape(-1)
    return (flat.cumsum(0) - flat).view_as(lengths_KB)


def _gather(values: Tensor, starts_KB: Tensor, lengths_KB: Tensor, rows_P: Tensor) -> tuple[Tensor, Tensor]:
    lengths_KP = _wide(lengths_KB.index_select(1, rows_P))
    if not lengths_KB.numel():
        return _wide(values[:0]), lengths_KP
    if lengths_KB.shape[1] == 1:
        # One row against many: its values repeat as they are.
        bounds = zip(starts_KB[:, 0].tolist(), lengths_KB[:, 0].tolist(), strict=True)
        return _wide(torch.cat([values[start : start + n].repeat(rows_P.numel()) for start, n in bounds])), lengths_KP
    wanted = lengths_KP.reshape(-1)
    # Value j of the result, in the row that begins at result place b and at source place s, is source value s + j - b.
    shift = starts_KB.index_select(1, rows_P).reshape(-1) - (wanted.cumsum(0) - wanted)
    places = torch.repeat_interleave(shift, wanted)
    return _wide(values.index_select(0, places + torch.arange(places.numel(), device=places.device))), lengths_KP


def _wide(values: Tensor) -> Tensor:
    return values.long() if values.dtype == torch.int32 else values


def _jagged(keys: tuple[str, ...], values: Tensor, lengths_KB: Tensor, key: str) -> tuple[Tensor, Tensor]:
    if key not in keys:
        raise KeyError(f'no jagged key "{key}"; this batch has {", ".join(keys) or "none"}')
    index = keys.index(key)
    if len(keys) == 1:
        return values, lengths_KB[0]
    begin = int(lengths_KB[:index].sum())
    return values[begin : begin + int(lengths_KB[index].sum())], lengths_KB[index]
