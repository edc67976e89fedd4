"""What users did since a bundle was made, in their histories."""

# Shapes: one row; E events of it.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.encoders import Encoders
from fullrank.data.past import whole_seconds
from fullrank.data.transforms import transformed_events
from fullrank.funnel.catalogue import NO_ROW, SEEN, Catalogue, times_column
from fullrank.schema import EventId, EventNumber, Schema
from fullrank.schema import Sequence as History


@dataclass(frozen=True)
class Event:
    """Something that happened between a user and an item.

    Attributes:
        item_id: as in the log.
        time: seconds since 1970.
        labels: what happened, by label: 1, or another number.
        features: raw values of context features, and of the item's if the catalogue does not have it.
        number: in the store that it was read from.
    """

    item_id: int | str
    time: int
    labels: Mapping[str, float]
    features: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = field(default=None, compare=False)


class _Live(NamedTuple):
    """A history that events go into.

    Attributes:
        label: which events do, those of which it is 1; None for all.
        delay: seconds until the label is known.
        columns: by field: the feature of item, user or context that it takes its ids from.
    """

    history: History
    label: str | None
    delay: int
    columns: dict[str, str]


class RecentEvents:
    """Puts events into the histories of encoded requests, as an import of the longer log would have.

    A history that was derived from the log takes the events that it would be derived from: of its label, once that is
    known, strictly before the request, the last `max_length`. One that is a column of the log is taken to be the items
    of positive rows of the first binary label, if each of its ids shares its table with a feature of the item and it
    has no other number than an `age` in seconds; else events leave it as it is.

    What is in the log already does not count again: for a derived history events up to its last row, for a column of
    the log those before the user's last row, whose history is what is known of them.

    The ages of what was known before are those at the request if the bundle has the times, which that of a derived
    history has; else they stay as they were at the end of the log.

    Args:
        until: time of the log's last row; None if it is not known, and all events count.
    """

    def __init__(self, encoders: Encoders, items: Catalogue, until: int | None = None) -> None:
        self.encoders, self.until = encoders, until
        self.schema = encoders.schema
        self.items = items
        self._places = {feature.name: place for place, feature in enumerate(self.schema.categorical)}
        self._roles = {feature.name: feature.role for feature in self.schema.categorical}
        self.live = [live for history in self.schema.sequences if (live := _live(self.schema, history)) is not None]

    def later(self, events: Sequence[Event], seen: int | None) -> Sequence[Event]:
        """Those that count for some history or counter, of a user whose last row happened then, if that is known."""
        if self.until is None:
            return events
        first = self.until + 1 if seen is None else min(self.until + 1, seen)
        return [event for event in events if event.time >= first]

    def __call__(
        self,
        row: Batch,
        events: Sequence[Event],
        time: int | None,
        times: Mapping[str, list[int]],
        seen: int | None = None,
    ) -> Batch:
        """The row of a request with what its user did.

        Args:
            row: one encoded row.
            events: the latest of this user, oldest first.
            time: of the request; None, without events, for the end of the log, when all is known.
            times: by history, when the events happened that the row has already.
            seen: when the user's last row in the log happened, if that is known.
        """
        schema = self.schema
        now = 0 if time is None else time
        ids = dict(zip(row.jagged_keys, _split(row.jagged_values, row.jagged_lengths_KB), strict=True))
        numbers = dict(zip(row.event_keys, _split(row.event_values, row.event_lengths_EB), strict=True))
        for history, label, delay, columns in self.live:
            new = self.later(events, None if history.of else seen)
            new = [event for event in new if label is None or event.labels.get(label) == 1]
            new = [event for event in new if event.time + delay < now][-history.max_length :]
            places = self.items.find([event.item_id for event in new]).tolist()
            known = None if time is None else times.get(history.name)
            kept = slice(None) if known is None else slice(0, sum(then + delay < now for then in known))
            for part in history.fields:
                key = history.column(part)
                if isinstance(part, EventId):
                    pairs = zip(new, places, strict=True)
                    found = [self._id(columns[part.name], row, event, place) for event, place in pairs]
                    more = torch.tensor(found, dtype=torch.int64)
                    ids[key] = torch.cat([ids[key][kept], more])[-history.max_length :]
                    continue
                before = numbers[key][kept]
                if known is not None:
                    before = _ages(part, [now - then for then in known[kept]])
                more = _ages(part, [now - event.time for event in new])
                numbers[key] = torch.cat([before, more])[-history.max_length :]
        return replace(
            row,
            jagged_values=torch.cat([ids[key] for key in schema.jagged_keys]) if ids else row.jagged_values,
            jagged_lengths_KB=_lengths(ids, row.jagged_lengths_KB),
            event_values=torch.cat([numbers[key] for key in schema.event_number_keys]) if numbers else row.event_values,
            event_lengths_EB=_lengths(numbers, row.event_lengths_EB),
        )

    def _id(self, name: str, row: Batch, event: Event, place: int) -> int:
        """Encoded id of a feature of what happened to the item at a row of the catalogue, or at none."""
        if self._roles[name] == "user":
            return int(row.ids_BF[0, self._places[name]])
        if self._roles[name] == "item" and place != NO_ROW:
            return int(self.items.rows.batch.ids_BF[place, self._places[name]])
        value = event.features.get(name, event.item_id if name == self.schema.keys.item_id else None)
        column = pl.Series(name, [None if value is None else str(value)], dtype=pl.String)
        return int(self.encoders.transform(pl.DataFrame([column]), allow_missing=True)[name][0])


def _live(schema: Schema, history: History) -> _Live | None:
    if history.role != "user" or not history.id_fields:
        return None
    delays = {label.name: whole_seconds(label.delay_seconds) for label in schema.labels}
    if history.of:
        delay = 0 if history.where is None else delays[history.where]
        return _Live(history, history.where, delay, {part.name: part.name for part in history.id_fields})
    label = next((label.name for label in schema.labels if label.kind == "binary"), None)
    of_table = {feature.table_name: feature.name for feature in schema.categorical if feature.role == "item"}
    if label is None or any(part.table_name not in of_table for part in history.id_fields):
        return None
    if any(part.name != "age" for part in history.number_fields):
        return None
    return _Live(history, label, delays[label], {part.name: of_table[part.table_name] for part in history.id_fields})


def rows_with_pending(users: Catalogue, schema: Schema) -> set[int]:
    """Rows of users with more than the last `max_length` events of a history, some of them not known yet at its end."""
    found: set[int] = set()
    for history in schema.sequences:
        column = times_column(history.name)
        if column in users.frame.columns:
            long = users.frame[column].list.len() > history.max_length
            found.update(long.arg_true().to_list())
    return found


def known_times(users: Catalogue, row: int) -> dict[str, list[int]]:
    """When the events of a user's histories happened, by history, where the catalogue says so."""
    columns = (name for name in users.frame.columns if name.startswith(times_column("")))
    return {name.removeprefix(times_column("")): users.frame[name][row].to_list() for name in columns}


def last_seen(users: Catalogue, row: int) -> int | None:
    """When the last row of a user happened, where the catalogue says so."""
    seen: int | None = users.frame[SEEN][row] if SEEN in users.frame.columns else None
    return seen


def _split(values: Tensor, lengths_K1: Tensor) -> list[Tensor]:
    return list(torch.split(values, lengths_K1[:, 0].tolist()))


def _lengths(by_key: Mapping[str, Tensor], lengths_K1: Tensor) -> Tensor:
    if not by_key:
        return lengths_K1
    return torch.tensor([[len(values)] for values in by_key.values()], dtype=torch.int64)


def _ages(part: EventNumber, seconds: Sequence[int]) -> Tensor:
    return torch.from_numpy(transformed_events(part, np.asarray(seconds, dtype=np.float64)))
