"""Rows of batches, gathered and paired: a few users against many items without a table in between."""

# Shapes: B rows of the source, P rows of the result, U users, I items, K jagged keys, E event-number keys.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.loader import batch_from_frame
from fullrank.schema import Schema


class Rows:
    """A batch to take rows from again and again: where each row's ids begin is computed once."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.jagged_starts_KB = _starts(batch.jagged_lengths_KB)
        self.event_starts_EB = _starts(batch.event_lengths_EB)

    def __len__(self) -> int:
        return len(self.batch)

    def take(self, rows_P: Tensor) -> Batch:
        """The given rows, in the given order; rows may repeat."""
        batch = self.batch
        jagged_values, jagged_lengths_KP = self.jagged(rows_P, 0, len(batch.jagged_keys))
        event_values, event_lengths_EP = self.events(rows_P, 0, len(batch.event_keys))
        return Batch(
            numeric_BN=batch.numeric_BN.index_select(0, rows_P),
            ids_BF=batch.ids_BF.index_select(0, rows_P),
            jagged_keys=batch.jagged_keys,
            jagged_values=jagged_values,
            jagged_lengths_KB=jagged_lengths_KP,
            event_keys=batch.event_keys,
            event_values=event_values,
            event_lengths_EB=event_lengths_EP,
            labels_BT=batch.labels_BT.index_select(0, rows_P),
            weights_B=None if batch.weights_B is None else batch.weights_B.index_select(0, rows_P),
            timestamp_B=None if batch.timestamp_B is None else batch.timestamp_B.index_select(0, rows_P),
            user_B=None if batch.user_B is None else batch.user_B.index_select(0, rows_P),
        )

    def jagged(self, rows_P: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Ids and lengths of the given rows for keys `first` to `last`, the latter left out."""
        lengths_KB, starts_KB = self.batch.jagged_lengths_KB[first:last], self.jagged_starts_KB[first:last]
        return _gather(self.batch.jagged_values, starts_KB, lengths_KB, rows_P)

    def events(self, rows_P: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Numbers of events, likewise."""
        lengths_KB, starts_KB = self.batch.event_lengths_EB[first:last], self.event_starts_EB[first:last]
        return _gather(self.batch.event_values, starts_KB, lengths_KB, rows_P)


def _starts(lengths_KB: Tensor) -> Tensor:
    flat = lengths_KB.reshape(-1)
    return (flat.cumsum(0) - flat).view_as(lengths_KB)


def _gather(values: Tensor, starts_KB: Tensor, lengths_KB: Tensor, rows_P: Tensor) -> tuple[Tensor, Tensor]:
    lengths_KP = lengths_KB.index_select(1, rows_P)
    if not lengths_KB.numel():
        return values[:0], lengths_KP
    if lengths_KB.shape[1] == 1:
        # One row against many: its values repeat as they are.
        bounds = zip(starts_KB[:, 0].tolist(), lengths_KB[:, 0].tolist(), strict=True)
        return torch.cat([values[start : start + n].repeat(rows_P.numel()) for start, n in bounds]), lengths_KP
    wanted = lengths_KP.reshape(-1)
    # Value j of the result, in the row that begins at result place b and at source place s, is source value s + j - b.
    shift = starts_KB.index_select(1, rows_P).reshape(-1) - (wanted.cumsum(0) - wanted)
    places = torch.repeat_interleave(shift, wanted)
    return values.index_select(0, places + torch.arange(places.numel())), lengths_KP


def concatenate(batches: list[Batch]) -> Batch:
    """Batches of the same columns, one below the other."""
    first = batches[0]

    def joined(name: str) -> Tensor | None:
        parts = [getattr(batch, name) for batch in batches]
        return None if any(part is None for part in parts) else torch.cat(parts)

    def jagged(values: str, lengths: str, keys: int) -> tuple[Tensor, Tensor]:
        lengths_KB = torch.cat([getattr(batch, lengths) for batch in batches], 1)
        if keys == 0:
            return getattr(first, values)[:0], lengths_KB
        pieces = [getattr(b, values).split(getattr(b, lengths).sum(1).tolist()) for b in batches]
        return torch.cat([piece[key] for key in range(keys) for piece in pieces]), lengths_KB

    jagged_values, jagged_lengths_KB = jagged("jagged_values", "jagged_lengths_KB", len(first.jagged_keys))
    event_values, event_lengths_EB = jagged("event_values", "event_lengths_EB", len(first.event_keys))
    return Batch(
        numeric_BN=torch.cat([batch.numeric_BN for batch in batches]),
        ids_BF=torch.cat([batch.ids_BF for batch in batches]),
        jagged_keys=first.jagged_keys,
        jagged_values=jagged_values,
        jagged_lengths_KB=jagged_lengths_KB,
        event_keys=first.event_keys,
        event_values=event_values,
        event_lengths_EB=event_lengths_EB,
        labels_BT=torch.cat([batch.labels_BT for batch in batches]),
        weights_B=joined("weights_B"),
        timestamp_B=joined("timestamp_B"),
        user_B=joined("user_B"),
    )


def partial_batch(frame: pl.DataFrame, schema: Schema) -> Batch:
    """A batch from an encoded frame that has only some of the schema's columns.

    What is absent is filled with the missing id, 0, no events and unobserved labels.
    """
    absent: list[pl.Expr] = []
    absent += [pl.lit(0.0, pl.Float32).alias(name) for name in schema.numeric_columns if name not in frame.columns]
    absent += [pl.lit(0, pl.Int32).alias(f.name) for f in schema.categorical if f.name not in frame.columns]
    for names, dtype in ((schema.jagged_keys, pl.List(pl.Int32)), (schema.event_number_keys, pl.List(pl.Float32))):
        absent += [pl.lit([], dtype).alias(name) for name in names if name not in frame.columns]
    return batch_from_frame(frame.with_columns(absent), schema)


@dataclass(frozen=True)
class Pairing:
    """Which columns of a batch come from the item, all others coming from the user and the context."""

    schema: Schema
    numeric_N: Tensor
    ids_F: Tensor
    jagged_K: tuple[bool, ...]
    events_E: tuple[bool, ...]

    @classmethod
    def of(cls, schema: Schema) -> Pairing:
        role_of = schema.roles()

        def from_item(columns: Iterable[str]) -> tuple[bool, ...]:
            return tuple(role_of[column] == "item" for column in columns)

        return cls(
            schema,
            torch.tensor(from_item(schema.numeric_columns), dtype=torch.bool),
            torch.tensor(from_item(feature.name for feature in schema.categorical), dtype=torch.bool),
            from_item(schema.jagged_keys),
            from_item(schema.event_number_keys),
        )

    def __call__(self, users: Rows, user_rows_P: Tensor, items: Rows, item_rows_P: Tensor) -> Batch:
        """One row for each pair: the user's and context's columns of a row of `users`, the item's of one of `items`.

        Labels are unobserved; weights, timestamps and user keys are left out.
        """
        size = user_rows_P.numel()
        user, item = users.batch, items.batch
        jagged = [
            (items if from_item else users).jagged(item_rows_P if from_item else user_rows_P, first, last)
            for from_item, first, last in _runs(self.jagged_K)
        ]
        events = [
            (items if from_item else users).events(item_rows_P if from_item else user_rows_P, first, last)
            for from_item, first, last in _runs(self.events_E)
        ]
        jagged_values, jagged_lengths_KP = _joined(jagged, user.jagged_values, size)
        event_values, event_lengths_EP = _joined(events, user.event_values, size)
        return Batch(
            numeric_BN=torch.where(
                self.numeric_N,
                item.numeric_BN.index_select(0, item_rows_P),
                user.numeric_BN.index_select(0, user_rows_P),
            ),
            ids_BF=torch.where(
                self.ids_F, item.ids_BF.index_select(0, item_rows_P), user.ids_BF.index_select(0, user_rows_P)
            ),
            jagged_keys=self.schema.jagged_keys,
            jagged_values=jagged_values,
            jagged_lengths_KB=jagged_lengths_KP,
            event_keys=self.schema.event_number_keys,
            event_values=event_values,
            event_lengths_EB=event_lengths_EP,
            labels_BT=torch.full((size, len(self.schema.labels)), torch.nan),
        )


def _runs(from_item: tuple[bool, ...]) -> list[tuple[bool, int, int]]:
    """Neighbouring keys of one side, which are gathered together: (side, first key, key after the last)."""
    runs: list[tuple[bool, int, int]] = []
    for key, side in enumerate(from_item):
        if runs and runs[-1][0] == side:
            runs[-1] = (side, runs[-1][1], key + 1)
        else:
            runs.append((side, key, key + 1))
    return runs


def _joined(parts: list[tuple[Tensor, Tensor]], like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    if not parts:
        return like[:0], torch.zeros((0, size), dtype=torch.int64)
    if len(parts) == 1:
        return parts[0]
    return torch.cat([values for values, _ in parts]), torch.cat([lengths_KP for _, lengths_KP in parts])
