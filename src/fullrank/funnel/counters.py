"""Counters of users and items after the end of a log, as an import of the longer log would compute them."""

# Shapes: B rows of a batch, N numbers, I rows of the catalogue of items, L keys that events were added to.

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.checks import check
from fullrank.data.encoders import Encoders
from fullrank.data.hashing import splitmix, splitmix_one, stable_hash, stable_hash_one
from fullrank.data.raw import RawChunk
from fullrank.data.tallies import (
    Floats,
    Tally,
    hash_column,
    hashed_features,
    rate_towards,
    value_hashes,
)
from fullrank.data.transforms import transformed
from fullrank.funnel.catalogue import Catalogue
from fullrank.funnel.raw_values import scalar_column
from fullrank.funnel.recent_events import Event
from fullrank.funnel.totals import FOREVER, CounterState, Hashes, Totals
from fullrank.schema import Numeric, Role, Schema

# Hash of the value of each column that counters are of; None where it is missing.
Values = Mapping[str, int | None]
# In place of a hash, of an id that a catalogue does not have.
NOT_THERE = -1
# Distinct ids and values whose hashes are remembered.
REMEMBERED, LONGEST_REMEMBERED = 65_536, 64


class _Counter(NamedTuple):
    """A counter that is kept up to date.

    Attributes:
        place, prior: of its tally, and of that of all rows.
        first: its first column among the numbers of a batch.
    """

    feature: Numeric
    place: int
    prior: int | None
    first: int


class Counters:
    """The counters of users and of items, at the log's end and as events come after it.

    A row at a time knows the events, and the rows of the log, of a time strictly before; an outcome once its label's
    delay is over; of the log at least what is known after its end. Sums are those of an import, bit for bit, where
    float64 holds them exactly, as it does of labels of 0 and 1. A label that an event does not give is 0 of it, as
    `fullrank data export` writes it.

    Counters of a context alone, or of a user in a context, are computed where a request says the context. Those of
    users and items together, and of items in a context, stay as they are.

    Args:
        state: of the log's end.
        totals: of the events that came after it, which whoever follows a store adds to; shared with copies.
    """

    def __init__(
        self,
        encoders: Encoders,
        state: CounterState,
        users: Catalogue | None,
        items: Catalogue,
        totals: Totals | None = None,
    ) -> None:
        self.state, self.users, self.items = state, users, items
        self.totals = totals or Totals(state.delays)
        self._encoders, self.schema = encoders, encoders.schema
        self._roles = self.schema.counted_roles()
        self._names = {name for tally in state.tallies for name in tally.of}
        hashed = hashed_features(self.schema)
        self._of_item_names = [name for name, role in hashed.items() if role == "item"]
        self._of_user = _looked_up(users, [name for name, role in hashed.items() if role == "user"])
        self._of_item = _looked_up(items, self._of_item_names)
        self._context = [name for name in self._names if self._roles[name] == "context"]
        sides = [(counter, {self._roles[name] for name in counter.of}) for counter in self.schema.counters]
        self.of_users = [
            self._counter(counter) for counter, roles in sides if "item" not in roles and counter.role != "item"
        ]
        self.of_items = [self._counter(counter) for counter, roles in sides if roles == {"item"} == {counter.role}]
        live = {tally for each in (*self.of_users, *self.of_items) for tally in _tallies(each.feature)}
        self._live = [(place, tally) for place, tally in enumerate(state.tallies) if tally in live]
        self._hash = lru_cache(REMEMBERED)(partial(_value_hash, self.schema))
        self._of_id = lru_cache(REMEMBERED)(stable_hash_one)
        features = {counter.name: counter for counter in self.schema.counters}
        self._codes = lru_cache(REMEMBERED)(partial(_code, encoders, features))
        # The keys of the items, by what counters are of, with the log's sums.
        self._keys_of_items: dict[tuple[str, ...], tuple[Hashes, npt.NDArray[np.int64], npt.NDArray[np.bool_]]] = {}

    @property
    def is_followed(self) -> bool:
        """Whether somebody adds what happens, so that counters of users change without them."""
        return self.totals.time is not None and bool(self.of_users)

    def anew(self) -> Self:
        """The same without events."""
        other = copy.copy(self)
        other.totals = Totals(self.state.delays)
        return other

    def with_items(self, items: Catalogue) -> Self:
        """The same, and the same events, with another catalogue of items."""
        other = copy.copy(self)
        other.items, other._keys_of_items = items, {}
        other._of_item = _looked_up(items, self._of_item_names)
        return other

    def _counter(self, feature: Numeric) -> _Counter:
        tally, tallies = Tally.of_counter(feature), self.state.tallies
        prior = None if tally.prior is None else tallies.index(tally.prior)
        return _Counter(feature, tallies.index(tally), prior, self.schema.numeric_columns.index(feature.name))

    def add(self, user: int | str, event: Event) -> None:
        """Add what happened after the log's end to the totals; it counts for everyone. What is not later is in them."""
        if event.time <= self.state.end:
            return
        values = self._values_of(user, event, {})
        for place, tally in self._live:
            key, value = _key(tally.of, values), _part(tally, event)
            if key is not None and value is not None:
                self.totals.add(place, key, event.time, value)

    def values_of_request(
        self, user: int | str | None, row: int | None, features: Mapping[str, Any]
    ) -> dict[str, int | None]:
        """Hashes of the columns that a request says, or that the catalogue has at a row, by name."""
        values: dict[str, int | None] = {}
        for name in self._names:
            if name == self.schema.keys.user_id:
                values[name] = None if user is None else self._of_id(str(user))
            elif self._roles[name] != "item" and name in features:
                values[name] = self._hash_of(name, features[name])
            elif self._roles[name] == "user":
                values[name] = None if row is None or self.users is None else _known(self.users, row, name)
        return values

    def on_request(
        self,
        batch: Batch,
        values: Values,
        events: Sequence[Event] = (),
        now: int | None = None,
        given: Collection[str] = (),
    ) -> Batch:
        """The row of a request with its counters.

        Args:
            batch: one encoded row.
            values: see `values_of_request`.
            events: of its user; those that are in the totals already do not count twice.
            now: its time; None for that of the totals or, without one, for the end of the log, when all is known.
            given: columns that the request says itself.
        """
        places, numbers = self._columns(values, events, now, given)
        if not places:
            return batch
        numeric_BN = batch.numeric_BN.clone()
        numeric_BN[0, places] = torch.tensor(numbers)
        return replace(batch, numeric_BN=numeric_BN)

    def on_users(self, batch: Batch, users: Sequence[int | str], rows: Sequence[int]) -> Batch:
        """Rows of the catalogue of users, of whom nothing more is said, with their counters; changed in place."""
        for place, (user, row) in enumerate(zip(users, rows, strict=True)):
            places, numbers = self._columns(self.values_of_request(user, row, {}), (), None, ())
            batch.numeric_BN[place, places] = torch.tensor(numbers)
        return batch

    def _columns(
        self, values: Values, events: Sequence[Event], now: int | None, given: Collection[str]
    ) -> tuple[list[int], list[float]]:
        """Columns of a batch, and the numbers in them."""
        wanted = [
            each
            for each in self.of_users
            if each.feature.name not in given and all(name in values for name in each.feature.of)
        ]
        found: dict[int, tuple[int, float]] = {}
        with self.totals.lock:
            if now is None:
                now = FOREVER if self.totals.time is None else self.totals.time
            own = [event for event in events if event.number is None or event.number > self.totals.number]
            said = [(self._values_of("", event, values), event) for event in own if event.time > self.state.end]
            for each in wanted:
                for place in (each.place, each.prior):
                    if place is not None and place not in found:
                        found[place] = self._sums(place, values, said, now)
        places, numbers = list[int](), list[float]()
        for each in wanted:
            raw = _raw(each.feature, found[each.place], None if each.prior is None else found[each.prior])
            codes = self._codes(each.feature.name, raw)
            places += range(each.first, each.first + len(codes))
            numbers += codes
        return places, numbers

    def _sums(self, place: int, values: Values, said: Sequence[tuple[Values, Event]], now: int) -> tuple[int, float]:
        """Rows with these values and their sum, with those of events that are not in the totals."""
        tally = self.state.tallies[place]
        key = _key(tally.of, values)
        if key is None:
            return 0, 0.0
        rows, total = self.state.at_end[place].of(key, now)
        more_rows, more = self.totals.of(place, key, now)
        rows, total = rows + more_rows, total + more
        for about, event in said:
            value = _part(tally, event)
            if value is not None and event.time + self.state.delays[place] < now and _key(tally.of, about) == key:
                rows, total = rows + 1, total + value
        return rows, total

    @torch.inference_mode()
    def refresh(self) -> None:
        """Write the counters of all items, at the time of the totals, into the catalogue, under whoever reads it."""
        for each in self.of_items:
            with self.totals.lock:
                now = FOREVER if self.totals.time is None else self.totals.time
                prior = None if each.prior is None else self._prior(each.prior, now)
                live, rows_L, totals_L = self.totals.of_all(each.place)
            keys, place_I, there_I = self._item_keys(each.feature.of)
            rows, totals = self.state.at_end[each.place].of_all(keys, now)
            if len(live):
                at = np.minimum(live.searchsorted(keys), len(live) - 1)
                same = live[at] == keys
                rows[same] += rows_L[at[same]]
                totals[same] += totals_L[at[same]]
            rows_I, total_I = (np.where(there_I, sums[place_I], 0.0) for sums in (rows, totals))
            self._write(self.items.rows.batch.numeric_BN, each, _number(each.feature, rows_I, total_I, prior))

    @torch.inference_mode()
    def on_unknown_items(self, batch: Batch, item_ids: Sequence[int | str]) -> Batch:
        """Rows of items of which the catalogue knows nothing, with what events say of their ids."""
        numeric_BN = batch.numeric_BN.clone()
        for each in self.of_items:
            with self.totals.lock:
                now = FOREVER if self.totals.time is None else self.totals.time
                prior = None if each.prior is None else self._prior(each.prior, now)
                found = [self._sums(each.place, self._only_id(item), (), now) for item in item_ids]
            rows, totals = np.array(found, dtype=np.float64).T
            self._write(numeric_BN, each, _number(each.feature, rows, totals, prior))
        return replace(batch, numeric_BN=numeric_BN)

    def _only_id(self, item: int | str) -> Values:
        key = self.schema.keys.item_id
        return {name: self._of_id(str(item)) if name == key else None for name in self._names}

    def _prior(self, place: int, now: int) -> Sequence[npt.NDArray[Any]]:
        return [np.array([number]) for number in self._sums(place, {}, (), now)]

    def _item_keys(self, of: tuple[str, ...]) -> tuple[Hashes, npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Distinct keys of the items, the place of each item's among them, and where no value is missing."""
        if of not in self._keys_of_items:
            keys_I, there_I = keys_of(self.items.frame, of, self.schema.keys.item_id)
            keys, place_I = np.unique(keys_I, return_inverse=True)
            self._keys_of_items[of] = keys, place_I, there_I
        return self._keys_of_items[of]

    def _write(self, numeric_BN: Tensor, counter: _Counter, raw: Floats) -> None:
        for place, column in enumerate(_encoded(self._encoders, counter.feature, raw)):
            numeric_BN[:, counter.first + place] = torch.from_numpy(column)

    def _values_of(self, user: int | str, event: Event, known: Values) -> dict[str, int | None]:
        """Hashes of what an event is about: of a user as they are known, else of the catalogue, else as it says."""
        keys, item = self.schema.keys, str(event.item_id)
        values = {name: self._hash_of(name, event.features.get(name)) for name in self._context}
        for catalogued, whose in ((self._of_user, user), (self._of_item, item)):
            for name, hashed in catalogued(str(whose)):
                values[name] = self._hash_of(name, event.features.get(name)) if hashed == NOT_THERE else hashed
        for key, text in ((keys.user_id, str(user)), (keys.item_id, item)):
            if key is not None and key in self._names:
                values[key] = self._of_id(text)
        # Of a request what it says of the context is no matter of its user's earlier events.
        values.update((name, value) for name, value in known.items() if self._roles[name] == "user")
        return values

    def _hash_of(self, name: str, value: Any) -> int | None:
        if not isinstance(value, (str, int, float)):
            return None
        is_short = not isinstance(value, str) or len(value) <= LONGEST_REMEMBERED
        return self._hash(name, type(value).__name__, value) if is_short else _value_hash(self.schema, name, "", value)


def _looked_up(catalogue: Catalogue | None, names: Sequence[str]) -> Callable[[str], list[tuple[str, int | None]]]:
    """What hashes a catalogue has of an id's features, by name."""

    @lru_cache(REMEMBERED)
    def found(text: str) -> list[tuple[str, int | None]]:
        row = catalogue.row(text) if catalogue is not None and names else None
        if catalogue is None or row is None:
            return [(name, NOT_THERE) for name in names]
        return [(name, _known(catalogue, row, name)) for name in names]

    return found


def _known(catalogue: Catalogue, row: int, name: str) -> int | None:
    found: int | None = catalogue.frame[hash_column(name)][row]
    return found


def _value_hash(schema: Schema, name: str, kind: str, value: Any) -> int | None:
    """None also of what an import would refuse. `kind` keeps 1, 1.0 and "1" apart where they are remembered."""
    try:
        found = raw_hashes(schema, pl.DataFrame([scalar_column(name, [value], numeric=False)]), [name])[0]
    except ValueError:
        return None
    hashed: int | None = found[0] if len(found) else None
    return hashed


def _code(encoders: Encoders, counters: Mapping[str, Numeric], name: str, raw: float) -> tuple[float, ...]:
    """One number as it is in a batch."""
    return tuple(float(column[0]) for column in _encoded(encoders, counters[name], np.array([raw])))


def raw_hashes(schema: Schema, frame: pl.DataFrame, names: Sequence[str]) -> list[pl.Series]:
    """Hash columns of raw columns, without rows that an import would refuse."""
    alone = schema.model_copy(update={"features": tuple(f for f in schema.categorical if f.name in names)})
    return value_hashes(check(alone, RawChunk(frame), allow_missing=True)[0], names)


def keys_of(frame: pl.DataFrame, of: Sequence[str], id_name: str | None) -> tuple[Hashes, npt.NDArray[np.bool_]]:
    """The key of each row of a catalogue, of which the first column is the id, and where no value is missing."""
    keys, there = np.zeros(frame.height, dtype=np.uint64), np.ones(frame.height, dtype=bool)
    for name in of:
        hashes = stable_hash(frame.to_series(0)) if name == id_name else frame[hash_column(name)]
        keys = splitmix(keys ^ hashes.fill_null(0).to_numpy())
        there &= hashes.is_not_null().to_numpy()
    return keys, there


def at_end(frame: pl.DataFrame, role: Role, state: CounterState, encoders: Encoders) -> pl.DataFrame:
    """The rows of a catalogue with their counters as they are at the end of the log, when all is known."""
    schema = encoders.schema
    roles, id_name = schema.counted_roles(), getattr(schema.keys, f"{role}_id")
    for counter in schema.counters:
        if {roles[name] for name in counter.of} != {role} or counter.role != role:
            continue
        tally = Tally.of_counter(counter)
        keys, there = keys_of(frame, counter.of, id_name)
        sums = state.at_end[state.tallies.index(tally)].of_all(keys, FOREVER)
        prior = None
        if tally.prior is not None:
            prior = [np.array([number]) for number in state.at_end[state.tallies.index(tally.prior)].of(0, FOREVER)]
        rows, totals = (np.where(there, each, 0.0) for each in sums)
        numbers = _encoded(encoders, counter, _number(counter, rows, totals, prior))
        frame = frame.with_columns(pl.Series(name, each) for name, each in zip(counter.columns, numbers, strict=True))
    return frame


def _raw(counter: Numeric, known: tuple[int, float], prior: tuple[int, float] | None) -> float:
    """What `_number` computes, of one key."""
    rows, total = known
    if prior is None:
        return float(rows)
    mean = prior[1] / prior[0] if prior[0] else math.nan
    return (total + counter.smoothing * mean) / (rows + counter.smoothing) if rows else mean


def _number(counter: Numeric, rows: Floats, totals: Floats, prior: Sequence[npt.NDArray[Any]] | None) -> Floats:
    """The counter of each key by rows and sum, and by those of all rows if it is a rate."""
    if prior is None:
        return rows
    with np.errstate(invalid="ignore"):
        mean = prior[1] / prior[0]
    return rate_towards(mean, rows, totals, counter.smoothing)


def _encoded(encoders: Encoders, counter: Numeric, raw: Floats) -> list[npt.NDArray[np.float32]]:
    """The columns of a batch."""
    found = [transformed(counter, encoders.numbers[counter.name], raw)]
    return found if counter.missing_column is None else [*found, np.isnan(raw).astype(np.float32)]


def _tallies(counter: Numeric) -> list[Tally]:
    tally = Tally.of_counter(counter)
    return [tally] if tally.prior is None else [tally, tally.prior]


def _key(of: Sequence[str], values: Values) -> int | None:
    """What these values are together, None if one is missing."""
    key = 0
    for name in of:
        value = values.get(name)
        if value is None:
            return None
        key = splitmix_one(key ^ value)
    return key


def _part(tally: Tally, event: Event) -> float | None:
    """What an event adds to a sum, None if it does not count."""
    value = 0.0 if tally.label is None else float(event.labels.get(tally.label, 0.0))
    if value not in (0.0, 1.0):
        with np.errstate(over="ignore"):
            value = float(np.float32(value))
    if tally.statistic == "rate":
        # An import refuses what float32 cannot hold.
        return value if math.isfinite(value) else None
    return 0.0 if tally.label is None or value == 1 else None
