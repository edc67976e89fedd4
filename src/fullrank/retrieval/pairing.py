"""A few users against many items: rows for rankers without a table of pairs in between."""

# Shapes: P pairs, N numeric columns, F single-id features, K jagged keys, E event-number keys.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.batch import Batch, RowGather
from fullrank.schema import Schema


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

    def __call__(self, users: RowGather, user_rows_P: Tensor, items: RowGather, item_rows_P: Tensor) -> Batch:
        """One row for each pair: the user's and context's columns of a row of `users`, the item's of one of `items`.

        Labels are unobserved; further columns are the user's; weights, timestamps and user keys are left out.
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
            extra={name: column.index_select(0, user_rows_P) for name, column in user.extra.items()},
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
