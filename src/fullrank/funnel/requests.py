"""From what a request says of a user and a context to a row of features."""

# Shapes: one row, N numeric columns, F single-id features.

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, Self

import polars as pl
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.encoders import Encoders
from fullrank.data.loader import partial_batch
from fullrank.data.spelling import is_plain
from fullrank.funnel.catalogue import NO_ROW, Catalogue
from fullrank.funnel.counters import Counters
from fullrank.funnel.raw_values import check_alike, list_column, scalar_column
from fullrank.funnel.recent_events import Event, RecentEvents, known_times, last_seen, rows_with_pending
from fullrank.retrieval.filters import ItemFilter
from fullrank.schema import Categorical, EventNumber, Numeric

# Distinct raw values whose codes are remembered; context values repeat from request to request. Long ones are not
# remembered: a client could fill the memory with them.
REMEMBERED = 65_536
LONGEST_REMEMBERED = 64


class Shown(NamedTuple):
    """An impression that a user has had.

    Attributes:
        item_id: as in the log; one that the catalogue does not have is ignored.
        seconds_ago: how long before the request; negative, by a clock that is behind, is now.
    """

    item_id: int | str
    seconds_ago: float = 0.0


@dataclass(frozen=True)
class Request:
    """Who asks, and where.

    Attributes:
        user_id: as in the log; unknown ones are served with the out-of-vocabulary id.
        features: raw values of user and context features by column name; events of a sequence are lists named
            `<sequence>.<field>`, oldest first. What is given replaces what is known of the user, what is not given
            stays as it was last seen, or is missing for an unknown user.
        events: what the user did, oldest first; what is later than the log goes into the histories and counters that
            are not given.
        time: of the request, in seconds since 1970: only events strictly before it count, and ages are those at it.
            Default: just after the last event that is later than the log.
        shown: impressions of the user, for frequency caps; in any order.
        exclude: items that are not recommended, whatever they are worth.
        filter: what recommended items have to be.
        extra: one row of further columns for rankers that read `Batch.extra`; requests that are answered together have
            the same.
    """

    user_id: int | str | None = None
    features: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Event] = ()
    time: int | None = None
    shown: Sequence[Shown] = ()
    exclude: Collection[int | str] = ()
    filter: ItemFilter | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class RequestEncoder:
    """Encodes requests with the encoders of training.

    Known users who say nothing new cost one gather together; a scalar feature that was seen before costs one lookup.
    No data frame is built for either.

    Args:
        until: time of the log's last row; None if it is not known.
        counters: what goes on after the log's end; without, counters are as the catalogue of users has them.
    """

    def __init__(
        self,
        encoders: Encoders,
        users: Catalogue | None,
        context: pl.DataFrame,
        items: Catalogue,
        until: int | None = None,
        counters: Counters | None = None,
    ) -> None:
        self.until, self.counters = until, counters
        self.schema = schema = encoders.schema
        self.encoders = encoders
        self.users = users
        self.stranger = partial_batch(context if context.width else pl.DataFrame({"_": [0]}), schema)
        if users is not None:
            row = users.rows.batch
            number = [schema.numeric_columns.index(name) for name in context.columns if name in schema.numeric_columns]
            names = [feature.name for feature in schema.categorical]
            ids = [names.index(name) for name in context.columns if name in names]
            for column_U, value in (
                *((row.numeric_BN[:, place], self.stranger.numeric_BN[0, place]) for place in number),
                *((row.ids_BF[:, place], self.stranger.ids_BF[0, place]) for place in ids),
            ):
                # Pages that other processes share stay shared if nothing is written to them.
                if bool((column_U != value).any()):
                    column_U.fill_(value)
        self.pending = set() if users is None else rows_with_pending(users, schema)
        given = schema.select({"user", "context"})
        self.scalars: dict[str, Numeric | Categorical] = {f.name: f for f in given.numeric}
        self.scalars.update({f.name: f for f in given.categorical})
        self._places = {feature.name: place for place, feature in enumerate(schema.categorical)}
        self.lists = {bag.name: bag for bag in given.bags}
        self.events = {
            sequence.column(part): (sequence, isinstance(part, EventNumber))
            for sequence in given.sequences
            for part in sequence.fields
        }
        key = schema.keys.user_id
        self.user_feature = key if key is not None and isinstance(self.scalars.get(key), Categorical) else None
        self.recent = RecentEvents(encoders, items, until)
        self._scalar = lru_cache(REMEMBERED)(self._encode_scalar)

    def with_items(self, items: Catalogue) -> Self:
        """An encoder that knows other items."""
        other = copy.copy(self)
        other.recent = RecentEvents(self.encoders, items, self.until)
        other.counters = None if self.counters is None else self.counters.with_items(items)
        return other

    def __call__(self, requests: Sequence[Request]) -> Batch:
        """One row per request, user and context columns filled.

        Raises:
            ValueError: if a feature is unknown, belongs to the item, or has a value of the wrong type; names it.
        """
        rows, extra = self._rows(requests), requests[0].extra
        if not extra:
            return rows
        return replace(rows, extra={name: torch.cat([request.extra[name] for request in requests]) for name in extra})

    def _rows(self, requests: Sequence[Request]) -> Batch:
        names = [request.user_id for request in requests if request.user_id is not None and not _says_more(request)]
        if self.users is not None and len(names) == len(requests) > 1:
            known_U = self.users.find(names)
            known = known_U.tolist()
            if NO_ROW in known and self.counters is None and self.pending.isdisjoint(known):
                return self._some_known(self.users, requests, known_U)
            if NO_ROW not in known and self.pending.isdisjoint(known):
                batch = self.users.rows.take(known_U)
                if self.counters is None or not self.counters.is_followed:
                    return batch
                # Counters of those who say nothing change with what others do.
                return self.counters.on_users(batch, names, known)
        rows = [self._row(request) for request in requests]
        return rows[0] if len(rows) == 1 else Batch.cat(rows)

    def _some_known(self, users: Catalogue, requests: Sequence[Request], known_U: Tensor) -> Batch:
        """Rows of users of whom some are known, and who say nothing but who they are."""
        is_new_U = known_U == NO_ROW
        new, known = is_new_U.nonzero().squeeze(1), (~is_new_U).nonzero().squeeze(1)
        strangers = self.stranger.take(torch.zeros_like(new))
        if (name := self.user_feature) is not None:
            ids = [self._coded(name, requests[place].user_id)[0][0] for place in new.tolist()]
            strangers.ids_BF[:, self._places[name]] = torch.tensor(ids, dtype=torch.int64)
        return Batch.cat([users.rows.take(known_U[known]), strangers]).take(torch.cat([known, new]).argsort())

    def _row(self, request: Request) -> Batch:
        known = None
        if request.user_id is not None and self.users is not None:
            known = self.users.row(request.user_id)
        scalars = {name: value for name, value in request.features.items() if name in self.scalars}
        others = {name: value for name, value in request.features.items() if name not in self.scalars}
        if known is not None and self.users is not None:
            row = self.users.rows.take(torch.tensor([known]))
        else:
            row = self.stranger
            if request.user_id is not None and self.user_feature is not None:
                scalars.setdefault(self.user_feature, request.user_id)
        if scalars:
            row = self._with_scalars(row, scalars)
        seen = None if known is None or self.users is None or not request.events else last_seen(self.users, known)
        events, time = self.recent.later(request.events, seen), request.time
        if time is None and events:
            time = max(events[-1].time, self.until or 0) + 1
        if events or time is not None or known in self.pending:
            times = {} if known is None or self.users is None else known_times(self.users, known)
            row = self.recent(row, events, time, times, seen)
        if self.counters is not None and (time is not None or known is None or scalars or self.counters.is_followed):
            values = self.counters.values_of_request(request.user_id, known, request.features)
            row = self.counters.on_request(row, values, events, time, request.features)
        return self._with_lists(row, others) if others else row

    def _with_scalars(self, row: Batch, values: Mapping[str, Any]) -> Batch:
        numeric_BN, ids_BF = row.numeric_BN.clone(), row.ids_BF.clone()
        for name, value in values.items():
            numbers, place = self._coded(name, value)
            if isinstance(self.scalars[name], Numeric):
                numeric_BN[0, place : place + len(numbers)] = torch.tensor(numbers)
            else:
                ids_BF[0, place] = int(numbers[0])
        return replace(row, numeric_BN=numeric_BN, ids_BF=ids_BF)

    def _coded(self, name: str, value: Any) -> tuple[tuple[float, ...], int]:
        encode = self._scalar if _is_short(value) else self._encode_scalar
        return encode(name, type(value).__name__, value)

    def _encode_scalar(self, name: str, kind: str, value: Any) -> tuple[tuple[float, ...], int]:
        """Codes of one value, and their first column. `kind` keeps 1, 1.0 and "1" apart in the memory."""
        feature = self.scalars[name]
        if isinstance(feature, Categorical) and (plain := self._plain_id(feature, value)) is not None:
            return (float(plain),), self._places[name]
        encoded = self._encoded([scalar_column(name, [value], numeric=isinstance(feature, Numeric))])
        if isinstance(feature, Numeric):
            numbers = tuple(float(encoded[column][0]) for column in feature.columns)
            return numbers, self.schema.numeric_columns.index(name)
        return (float(encoded[name][0]),), self._places[name]

    def _plain_id(self, feature: Categorical, value: Any) -> int | None:
        """Id of a value of a vocabulary whose text is surely that of the log; None where that takes a closer look."""
        text = str(value)
        if feature.encoding != "vocabulary" or isinstance(value, bool) or not isinstance(value, (int, str)):
            return None
        if text in self.schema.missing or not is_plain(text):
            return None
        return self.encoders.vocabularies[feature.table_name].id_of(text)

    def _with_lists(self, row: Batch, values: Mapping[str, Any]) -> Batch:
        columns = []
        for name, value in values.items():
            if name not in self.lists and name not in self.events:
                raise ValueError(self._unknown(name))
            feature, numeric = self.events[name] if name in self.events else (self.lists[name], False)
            columns.append(list_column(name, [value], feature, numeric=numeric))
        for name in values:
            if name in self.events:
                sequence = self.events[name][0]
                fields = [sequence.column(part) for part in sequence.fields]
                absent = [column for column in fields if column not in values]
                if absent:
                    raise ValueError(f'"{name}" is given without "{absent[0]}": give all fields of {sequence.name}')
                if name == fields[0]:
                    check_alike(sequence, {column: [values[column]] for column in fields})
        encoded = partial_batch(self._encoded(columns), self.schema)

        def merged(old: Tensor, old_KB: Tensor, new: Tensor, new_KB: Tensor, keys: Sequence[str]) -> Any:
            if not keys:
                return old, old_KB
            given = torch.tensor([key in values for key in keys])
            olds, news = torch.split(old, old_KB[:, 0].tolist()), torch.split(new, new_KB[:, 0].tolist())
            pieces = [news[i] if given[i] else olds[i] for i in range(len(keys))]
            return torch.cat(pieces), torch.where(given[:, None], new_KB, old_KB)

        ids, lengths_KB = merged(
            row.jagged_values, row.jagged_lengths_KB, encoded.jagged_values, encoded.jagged_lengths_KB, row.jagged_keys
        )
        numbers, lengths_EB = merged(
            row.event_values, row.event_lengths_EB, encoded.event_values, encoded.event_lengths_EB, row.event_keys
        )
        return replace(
            row, jagged_values=ids, jagged_lengths_KB=lengths_KB, event_values=numbers, event_lengths_EB=lengths_EB
        )

    def _encoded(self, columns: Sequence[pl.Series]) -> pl.DataFrame:
        try:
            return self.encoders.transform(pl.DataFrame(columns), allow_missing=True)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("row 1: ").splitlines()[0]) from None

    def _unknown(self, name: str) -> str:
        if name in {feature.name for feature in self.schema.select({"item"}).features}:
            return f'"{name}" is a feature of items; a request gives features of the user and the context'
        return f'unknown feature "{name}"; expected one of {", ".join((*self.scalars, *self.lists, *self.events))}'


def _says_more(request: Request) -> bool:
    """Than who asks."""
    return bool(request.features or request.events) or request.time is not None


def _is_short(value: Any) -> bool:
    """Whether a value may be remembered; one of a wrong type is not, and may not even be hashable."""
    if isinstance(value, str):
        return len(value) <= LONGEST_REMEMBERED
    return value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64)
