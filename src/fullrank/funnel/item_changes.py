"""Items that come, change and go while a funnel is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

import polars as pl
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fullrank.data.tallies import hash_column
from fullrank.funnel.catalogue import ACTIVE, BID, NO_ROW, Catalogue
from fullrank.funnel.counters import raw_hashes
from fullrank.funnel.funnel import Funnel
from fullrank.retrieval.base import Items, Retriever, item_keys
from fullrank.schema import Numeric
from fullrank.schema import Sequence as Events


class ItemState(BaseModel):
    """What is known of an item beside the bundle.

    Attributes:
        features: raw values by column of the log.
        whole: whether a feature that is not given is missing; else it is what the bundle says.
        bid: None for that of the bundle.
        hidden: whether the item is never recommended; None for what the bundle says.
        expires_at: seconds since 1970 from which it is hidden.
        removed: the item is not there any more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: dict[str, Any] = {}
    whole: bool = True
    bid: float | None = None
    hidden: bool | None = None
    expires_at: float | None = None
    removed: bool = False

    def patched(self, given: Mapping[str, Any]) -> Self:
        """With some fields replaced, and of the features only those that are given."""
        features = {**self.features, **given.get("features", {})}
        return self.model_copy(update={**given, "features": features})


class ItemEncoder:
    """Makes rows of a funnel's catalogue from raw values."""

    def __init__(self, funnel: Funnel) -> None:
        schema = funnel.schema
        self.encoders, self.item_id, self.bid = funnel.encoders, schema.keys.item_id, schema.keys.bid
        self.types = dict(funnel.items.frame.schema)
        self.types.setdefault(ACTIVE, pl.Boolean())
        self.id_column = funnel.items.frame.columns[0]
        self.columns: dict[str, Callable[[Sequence[Any]], pl.Series]] = {}
        # What a raw column is encoded to.
        self._encoded: dict[str, list[str]] = {}
        features = schema.select({"item"})
        for feature in features.features:
            if isinstance(feature, Events):
                names = {feature.column(part): [feature.column(part)] for part in feature.fields}
            elif isinstance(feature, Numeric):
                missing = [] if feature.missing_column is None else [feature.missing_column]
                names = {feature.name: [*feature.columns, *missing]}
            else:
                hashed = hash_column(feature.name)
                names = {feature.name: [feature.name, *([hashed] if hashed in self.types else [])]}
            for name, columns in names.items():
                self.columns[name], self._encoded[name] = funnel.scorer.columns[name], columns
        self._events = [[each.column(part) for part in each.fields] for each in features.sequences]
        self._knows_id = self.item_id in self.columns

    def fault(self, name: str, state: ItemState) -> str | None:
        """What is wrong with an id or a bid."""
        kind = self.types[self.id_column]
        as_id = pl.Series([name]).cast(kind, strict=False).cast(pl.String)[0]
        if as_id != name:
            return f"item_id is {name[:40]!r}, and the ids of this bundle are {kind}"
        if self.bid is None and state.bid is not None:
            return "bid: the items of this bundle have no bids"
        if self.bid is not None and state.bid is None and state.whole and not state.removed:
            return "bid: the items of this bundle have bids, expected a number >= 0"
        return None

    def faults(self, states: Mapping[str, ItemState]) -> dict[str, str]:
        """What is wrong with ids, bids and features, of those with something wrong, in their order."""
        found = {name: fault for name, state in states.items() if (fault := self.fault(name, state)) is not None}
        good = {name: state for name, state in states.items() if name not in found}
        try:
            self.encode(good)
        except ValueError:
            # One by one, to tell whose fault it is.
            for name, state in good.items():
                try:
                    self.encode({name: state})
                except ValueError as error:
                    found[name] = str(error)
        return {name: found[name] for name in states if name in found}

    def check(self, name: str, state: ItemState) -> None:
        """Raises:
        ValueError: if the id, a feature or the bid is none that this catalogue can have; names it.
        """
        if fault := self.faults({name: state}).get(name):
            raise ValueError(fault)

    def encode(self, states: Mapping[str, ItemState]) -> pl.DataFrame:
        """Rows of the catalogue, one for each state; what a state does not give is missing.

        Raises:
            ValueError: if a feature is unknown or has a value of the wrong type; names it.
        """
        if not states:
            return pl.DataFrame(schema=self.types)
        rows = [self._raw(name, state) for name, state in states.items()]
        given = dict.fromkeys(column for row in rows for column in row)
        for name in given:
            if name not in self.columns or (name == self.item_id and not self._knows_id):
                raise ValueError(f'features: unknown column "{name}"; items have {", ".join(self.columns)}')
        for fields in self._events:
            absent = [name for name in fields if name not in given]
            if absent and len(absent) < len(fields):
                raise ValueError(f"features: all of {', '.join(fields)} have to be given, or none of them")
        raw = [self.columns[name]([row.get(name) for row in rows]) for name in given]
        try:
            frame = pl.DataFrame([pl.Series("__row", range(len(rows))), *raw])
            encoded = self.encoders.transform(frame, allow_missing=True)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("row 1: ").splitlines()[0]) from None
        ids = pl.Series(self.id_column, list(states)).cast(self.types[self.id_column], strict=True)
        own = {
            self.id_column: ids,
            BID: pl.Series(BID, [state.bid for state in states.values()], pl.Float64),
            ACTIVE: pl.Series(ACTIVE, [not state.hidden for state in states.values()]),
        }
        hashed = [name for name in given if hash_column(name) in self.types]
        own |= {each.name: each for each in raw_hashes(self.encoders.schema, frame, hashed)}
        return pl.DataFrame(
            [
                own[name].cast(kind)
                if name in own
                else encoded[name].cast(kind)
                if name in encoded.columns
                else pl.Series(name, [None] * len(rows), kind)
                for name, kind in self.types.items()
            ]
        )

    def replaced(self, state: ItemState) -> list[str]:
        """The columns of the catalogue that the state of an item which is there gives."""
        if state.whole:
            return [name for name in self.types if name != self.id_column]
        raw = self._raw("", state)
        return [*(column for name in raw if name != self.item_id for column in self._encoded[name])] + (
            [BID] if state.bid is not None else []
        )

    def _raw(self, name: str, state: ItemState) -> dict[str, Any]:
        raw = dict(state.features)
        if self.item_id in raw:
            raise ValueError(f'features: "{self.item_id}" is the id; it is given as item_id')
        if self.bid in self.columns and state.bid is not None:
            raw.setdefault(self.bid, state.bid)
        if self._knows_id and self.item_id is not None:
            raw[self.item_id] = name
        return raw


class ChangedItems:
    """A funnel whose items change. Every change makes another funnel, which shares with the one before what is not
    changed: requests that it is answering are not disturbed.

    Attributes:
        funnel: with all changes so far.
    """

    def __init__(self, funnel: Funnel) -> None:
        self.funnel = funnel
        self.encoder = ItemEncoder(funnel)
        self._active_in_bundle: dict[str, bool] = {}

    def prepare(self, states: Mapping[str, ItemState], now: float) -> Change:
        """What the last states of some items make of the catalogue. The funnel is as it was until that is applied.

        Raises:
            ValueError: if one cannot be encoded.
        """
        items = self.funnel.items
        names = list(states)
        rows = dict(zip(names, items.find(names).tolist(), strict=True))
        # Of what this bundle has not, a part is not enough.
        there = {
            name: state for name, state in states.items() if not state.removed and (state.whole or rows[name] != NO_ROW)
        }
        removed = [rows[name] for name, state in states.items() if state.removed and rows[name] != NO_ROW]
        if ACTIVE not in items.frame.columns:
            items = replace(items, frame=items.frame.with_columns(pl.lit(True).alias(ACTIVE)))
        fresh = self._rows(items.frame, there, rows, now)
        before = items.frame[[*(rows[name] for name in there if rows[name] != NO_ROW), *removed]]
        if len(removed) == len(items) and not len(fresh):
            # A catalogue has at least one row.
            last, *removed = removed
            fresh = items.frame[[last]].with_columns(pl.lit(False).alias(ACTIVE))
        changed, was_I = items.changed(fresh, torch.tensor(removed, dtype=torch.int64), self.funnel.schema)
        return Change(self.funnel, changed, was_I, before, fresh)

    def _rows(
        self, frame: pl.DataFrame, states: Mapping[str, ItemState], rows: Mapping[str, int], now: float
    ) -> pl.DataFrame:
        """Rows of the catalogue; where a state does not say all, the rest is as it was."""
        if not states:
            return frame.clear()
        fresh = self.encoder.encode(states).select(frame.columns)
        partial = {
            name: set(self.encoder.replaced(state))
            for name, state in states.items()
            if not state.whole and rows[name] != NO_ROW
        }
        if partial:
            before = frame[[max(0, rows[name]) for name in states]]
            kept = {
                column: pl.Series([name in partial and column not in partial[name] for name in states])
                for column in frame.columns[1:]
            }
            fresh = fresh.with_columns(
                before[column].zip_with(mask, fresh[column]) for column, mask in kept.items() if mask.any()
            )
        active = [self._is_active(name, state, rows[name], now) for name, state in states.items()]
        return fresh.with_columns(pl.Series(ACTIVE, active, pl.Boolean))

    def _is_active(self, name: str, state: ItemState, row: int, now: float) -> bool:
        if row != NO_ROW and name not in self._active_in_bundle:
            frame = self.funnel.items.frame
            self._active_in_bundle[name] = bool(frame[ACTIVE][row]) if ACTIVE in frame.columns else True
        if state.expires_at is not None and state.expires_at <= now:
            return False
        return self._active_in_bundle.get(name, True) if state.hidden is None else not state.hidden


class Change:
    """A catalogue that is ready to take the place of a funnel's own.

    Args:
        was_I: see `Funnel.with_items`.
        before: the rows that are replaced or removed.
        fresh: those that are there instead.

    Attributes:
        in_place: whether `apply` disturbs searches of the funnel, because its retriever knows no other way.
    """

    def __init__(
        self, funnel: Funnel, items: Catalogue, was_I: Tensor, before: pl.DataFrame, fresh: pl.DataFrame
    ) -> None:
        self._funnel, self._items, self._was_I = funnel, items, was_I
        self._retriever: Retriever = funnel.retriever.fork()
        self.in_place = self._retriever is funnel.retriever
        # A bid is no matter of retrieval.
        was, now = (rows.filter(ACTIVE).drop(BID, ACTIVE, strict=False) for rows in (before, fresh))
        texts = [repr(row) for row in was.iter_rows()], [repr(row) for row in now.iter_rows()]
        same = set(texts[0]) & set(texts[1])
        gone, come = (pl.Series([text not in same for text in each], dtype=pl.Boolean) for each in texts)
        self._out, self._in = (item_keys(rows.filter(mask).to_series(0)) for rows, mask in ((was, gone), (now, come)))

    @torch.inference_mode()
    def apply(self) -> Funnel:
        """The funnel with the change."""
        retriever = self._retriever
        _forget(retriever, self._out)
        if self.in_place:
            # It may have been changed already, on behalf of a funnel that was given up.
            _forget(retriever, self._in)
        if len(self._in):
            retriever.add(Items(self._in, self._items.rows.take(self._items.places(self._in))))
        return self._funnel.with_items(self._items, self._was_I, retriever)


def _forget(retriever: Retriever, keys: Tensor) -> None:
    """Remove items, of those that there are: not all that is active need be in an index."""
    try:
        if len(keys):
            retriever.remove(keys)
    except KeyError:
        for key in keys:
            with suppress(KeyError):
                retriever.remove(key[None])
