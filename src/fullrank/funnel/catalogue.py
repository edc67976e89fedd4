"""The items, or the users, that a funnel knows: their keys and encoded features."""

# Shapes: I rows.

from __future__ import annotations

import re
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fullrank.batch import Batch, RowGather
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS, Encoders
from fullrank.data.hashing import hash_text
from fullrank.data.loader import partial_batch
from fullrank.data.past import whole_seconds
from fullrank.retrieval.base import NO_ITEM, item_keys
from fullrank.schema import EventNumber, Schema, Sequence

BID = KEY_COLUMNS["bid"]
# Whether an item may be retrieved; the others can still be scored by name.
ACTIVE = "__active"
# When an item of a stream was last shown, and when the last row of a user happened that has histories of its own: what
# is not earlier is not in these.
SEEN = "__seen"
# Row of no item.
NO_ROW = -1
# Ids up to which each is read by itself.
ONE_BY_ONE = 1000
# An integer as it is written.
_INTEGER = re.compile("-?[1-9][0-9]{0,18}|0")


@dataclass(frozen=True)
class Catalogue:
    """Rows in order of `keys_I`.

    Attributes:
        frame: the id column as in the log, encoded feature columns of the role, for items also bid and activity.
        keys_I: int64, see `item_keys`.
        rows: the features of all rows, ready to be gathered.
    """

    frame: pl.DataFrame
    keys_I: Tensor
    rows: RowGather

    @classmethod
    def of(cls, frame: pl.DataFrame, schema: Schema) -> Catalogue:
        """Raises:
        ValueError: if there is no row, an id is missing, is neither integer nor text, or occurs twice, or a bid is
            missing, negative or infinite.
        """
        if not frame.height:
            raise ValueError(f'a catalogue needs at least one row: no "{frame.columns[0]}" was given')
        ids = frame[frame.columns[0]]
        if ids.null_count() or not (ids.dtype.is_integer() or ids.dtype == pl.String):
            raise ValueError(f'a catalogue needs an integer or text in each row of column "{ids.name}"')
        keys_I = item_keys(ids)
        order = torch.argsort(keys_I)
        frame, keys_I = frame[order.numpy()], keys_I[order]
        if bool((keys_I[1:] == keys_I[:-1]).any()):
            raise ValueError(f'a catalogue has an id twice in column "{frame.columns[0]}"')
        if BID in frame.columns:
            check_bids(frame)
        return cls(frame, keys_I, RowGather(partial_batch(frame, schema)))

    def __len__(self) -> int:
        return self.frame.height

    @cached_property
    def ids(self) -> list[int | str]:
        """The id of each row, as in the log."""
        return self._ids.to_list()

    def ids_of(self, rows: Tensor) -> list[int | str]:
        """The ids of some rows."""
        ids = self._ids
        if len(rows) > ONE_BY_ONE:
            return ids.gather(rows.numpy()).to_list()
        # A gather goes by the threads of polars, which have to be woken while those of other requests compute.
        return [ids[row] for row in rows.tolist()]

    @cached_property
    def _ids(self) -> pl.Series:
        return self.frame.to_series(0)

    def row(self, name: int | str) -> int | None:
        """Row of an id, None if it is not here: a request may say 7 or "7"."""
        row = int(self.find([name])[0])
        return None if row == NO_ROW else row

    def find(self, names: Listed[int | str]) -> Tensor:
        """Row of each id, `NO_ROW` for one that is not here. Ids are found by their keys: a table of them would take
        more memory than all else."""
        texts = [str(name) for name in names]
        rows = self.places(torch.tensor([self._key(text) for text in texts], dtype=torch.int64))
        there = (rows != NO_ROW).nonzero().squeeze(1)
        found = self.ids_of(rows[there])
        others = [place for place, name in zip(there.tolist(), found, strict=True) if str(name) != texts[place]]
        rows[others] = NO_ROW
        return rows

    def _key(self, text: str) -> int:
        """What `item_keys` makes of an id, `NO_ITEM` if it cannot be one here."""
        low, high = -(2**63), 2**63 - 1
        if self.frame.dtypes[0] == pl.String:
            number = hash_text(text)
            number -= 2**64 if number > high else 0
        elif _INTEGER.fullmatch(text) and low <= int(text) <= high:
            number = int(text)
        else:
            return NO_ITEM
        return low if number == NO_ITEM else number

    def changed(self, rows: pl.DataFrame, removed: Tensor, schema: Schema) -> tuple[Catalogue, Tensor]:
        """A catalogue in which some rows are new or others than before.

        Args:
            rows: columns as in `frame`; none of them twice.
            removed: rows to leave out.

        Returns:
            it, and for each of its rows the one that it was here, `NO_ROW` for those of `rows`.
        """
        keys_N = item_keys(rows[rows.columns[0]])
        before_N = self.places(keys_N)
        kept_I = torch.ones(len(self), dtype=torch.bool)
        kept_I[removed] = False
        kept_I[before_N[before_N != NO_ROW]] = False
        kept_I = kept_I.nonzero().squeeze(1)
        old_keys_I = self.keys_I[kept_I]
        keys_N, order_N = keys_N.sort()
        at = torch.searchsorted(old_keys_I, keys_N).numpy()
        keys_I = torch.from_numpy(np.insert(old_keys_I.numpy(), at, keys_N.numpy()))
        old_I = torch.from_numpy(np.insert(kept_I.numpy(), at, (len(self) + order_N).numpy()))
        frame = pl.concat([self.frame, rows], rechunk=True)[old_I.numpy()]
        batch = self.rows.batch
        if len(rows):
            batch = Batch.cat([batch, partial_batch(rows, schema)])
        gather = RowGather(RowGather(batch).take(old_I))
        return Catalogue(frame, keys_I, gather), old_I.masked_fill(old_I >= len(self), NO_ROW)

    @cached_property
    def _row_of_key(self) -> Tensor | None:
        """Row of each key, where keys are small enough for a table: one read instead of a search."""
        low, high = int(self.keys_I[0]), int(self.keys_I[-1])
        if low < 0 or high >= 4 * len(self) + 1024:
            return None
        table = torch.full((high + 1,), NO_ROW, dtype=torch.int32)
        table[self.keys_I] = torch.arange(len(self), dtype=torch.int32)
        return table

    def places(self, keys: Tensor) -> Tensor:
        """Row of each key, `NO_ROW` for a key that is not in the catalogue."""
        if not len(self):
            return torch.full_like(keys, NO_ROW)
        if self._row_of_key is not None:
            inside = keys.clamp(0, self._row_of_key.numel() - 1)
            rows = self._row_of_key.index_select(0, inside.reshape(-1)).long().view_as(keys)
            return rows.masked_fill_(inside != keys, NO_ROW)
        rows = torch.searchsorted(self.keys_I, keys).clamp_max_(len(self) - 1)
        return rows.masked_fill(self.keys_I[rows] != keys, NO_ROW)

    def keys_of(self, rows: Tensor) -> Tensor:
        """Key of each row; of `NO_ROW` that of no item."""
        return self.keys_I[rows].masked_fill_(rows == NO_ROW, NO_ITEM)

    @cached_property
    def bid_I(self) -> Tensor | None:
        if BID not in self.frame.columns:
            return None
        return torch.from_numpy(self.frame[BID].to_numpy().copy())

    @cached_property
    def active_I(self) -> Tensor:
        """Rows that may be retrieved."""
        if ACTIVE not in self.frame.columns:
            return torch.arange(len(self))
        return torch.from_numpy(self.frame[ACTIVE].to_numpy().copy()).nonzero().squeeze(1)


def times_column(history: str) -> str:
    """Column of a catalogue of users: when the events of a derived history happened, in seconds since 1970."""
    return f"__time.{history}"


def check_bids(items: pl.DataFrame) -> None:
    """Raises:
    ValueError: if a bid is no number from 0 on; names the item in the first column.
    """
    bid = items[BID].cast(pl.Float64)
    wrong = ~(bid.is_finite() & (bid >= 0)).fill_null(False)
    if wrong.any():
        row = int(wrong.arg_true()[0])
        raise ValueError(f'column "{BID}" of item {items[row, 0]!r} is {bid[row]}, expected a number >= 0')


def all_rows(dataset: Dataset, role: Literal["item", "user"]) -> pl.DataFrame:
    """The catalogue of a role over all splits: the last seen features of each item or user.

    Features only: what an item is and what a user did is known at serving time; no label is in it. A history that was
    derived from the log goes on to the log's end.
    """
    parts = [dataset.catalogue(role, split) for split in ("train", "valid", "test") if split in dataset.splits]
    rows = pl.concat(parts).unique(parts[0].columns[0], keep="last", maintain_order=True)
    for sequence in dataset.schema.histories:
        if sequence.role == role:
            rows = _with_last_events(rows, dataset, sequence)
    if role == "user" and dataset.schema.keys.timestamp is not None and has_own_histories(dataset.schema):
        user, time = rows.columns[0], pl.col(KEY_COLUMNS["timestamp"])
        log = pl.concat([dataset.scan(split) for split in dataset.splits])
        last = log.group_by(user).agg(time.max().alias(SEEN)).collect()
        rows = rows.join(last, on=user, how="left", maintain_order="left")
    return rows


def has_own_histories(schema: Schema) -> bool:
    """Whether a history of users is a column of the log."""
    return any(sequence.role == "user" and not sequence.of for sequence in schema.sequences)


def _with_last_events(users: pl.DataFrame, dataset: Dataset, sequence: Sequence) -> pl.DataFrame:
    """The history of each user with the events of the whole log, as old as they are at its end.

    Beside the last `max_length`, what they displace before their label is known.
    """
    user, time = KEY_COLUMNS["user_id"], KEY_COLUMNS["timestamp"]
    wanted = dict.fromkeys([user, time, *sequence.of, *([sequence.where] if sequence.where is not None else [])])
    log = pl.concat([dataset.scan(split).select(*wanted) for split in dataset.splits])
    end = last_time(dataset)
    happened = pl.lit(True) if sequence.where is None else pl.col(sequence.where) == 1
    fields = [
        (end - pl.col(time)).cast(pl.Float32).log1p().alias(sequence.column(field))
        if isinstance(field, EventNumber)
        else pl.col(field.name).alias(sequence.column(field))
        for field in sequence.fields
    ]
    names = [sequence.column(field) for field in sequence.fields]
    names.append(times_column(sequence.name))
    delay = next((label.delay_seconds for label in dataset.schema.labels if label.name == sequence.where), 0.0)
    pending = (pl.col(names[-1]) + whole_seconds(delay) > end).sum()
    events = (
        log.filter(happened)
        .sort(time, maintain_order=True)
        .select(user, *fields, pl.col(time).cast(pl.Int64).alias(names[-1]))
        .group_by(user)
        .agg(pl.col(names).tail(sequence.max_length + pending))
    )
    known = users.drop(names[:-1]).lazy().join(events, on=user, how="left", maintain_order="left")
    return known.with_columns(pl.col(names).fill_null([])).select(*users.columns, names[-1]).collect()


def last_time(dataset: Dataset) -> int | None:
    """When the last row of all splits happened; None if the schema names no timestamp."""
    if dataset.schema.keys.timestamp is None:
        return None
    time = KEY_COLUMNS["timestamp"]
    log = pl.concat([dataset.scan(split).select(time) for split in dataset.splits])
    return int(log.select(pl.col(time).max()).collect().item())


def with_market(items: pl.DataFrame, dataset: Dataset, active_days: float | None) -> pl.DataFrame:
    """Add each item's last bid, and whether it was shown in the last `active_days` of the log (None: all are)."""
    item, time = KEY_COLUMNS["item_id"], KEY_COLUMNS["timestamp"]
    has_bid, has_time = dataset.schema.keys.bid is not None, dataset.schema.keys.timestamp is not None
    if active_days is not None and not has_time:
        raise ValueError(f"{dataset.path}: active_days needs a timestamp among the schema's keys")
    columns = [item, *([BID] if has_bid else []), *([time] if has_time else [])]
    log = pl.concat(
        [dataset.scan(split).select(columns) for split in ("train", "valid", "test") if split in dataset.splits]
    )
    if has_time:
        log = log.sort(time, maintain_order=True)
    last = log.group_by(item).agg(pl.col(columns[1:]).last()).collect()
    if active_days is None:
        last = last.with_columns(pl.lit(True).alias(ACTIVE))
    else:
        oldest = pl.col(time).max() - round(active_days * 86_400)
        last = last.with_columns((pl.col(time) >= oldest).alias(ACTIVE))
    return items.join(
        last.select(item, *([BID] if has_bid else []), ACTIVE), on=item, how="left", maintain_order="left"
    )


def most_shown(items: Catalogue, encoders: Encoders) -> Tensor:
    """Active rows of a catalogue, those first that training had the most rows of; where ids have no vocabulary those of
    the highest bid, else in the catalogue's order."""
    rows_I, name = items.active_I, encoders.schema.keys.item_id
    for place, feature in enumerate(encoders.schema.categorical):
        if feature.name == name and feature.encoding == "vocabulary":
            count_V = torch.from_numpy(encoders.vocabularies[feature.table_name].id_counts)
            shown_I = count_V[items.rows.batch.ids_BF[rows_I, place]]
            return rows_I[shown_I.argsort(descending=True, stable=True)]
    return rows_I if items.bid_I is None else rows_I[items.bid_I[rows_I].argsort(descending=True, stable=True)]


def usual_context(dataset: Dataset) -> pl.DataFrame:
    """One row: the most frequent value of each context id in training, the mean of each context number, or its median
    if that is piecewise linear.

    A request that does not say where or when it comes from is scored as a usual one. For the position of an ad, which
    is not known before ranking, this compares all candidates at one position.
    """
    schema = dataset.schema.select({"context"})
    # The mean of places among bins, of which -1 is none, would mean nothing.
    middle = {feature.name for feature in schema.numeric if feature.encoding == "piecewise_linear"}
    wanted = [
        (pl.col(name).quantile(0.5, "lower") if name in middle else pl.col(name).mean()).cast(pl.Float32)
        for name in schema.numeric_columns
    ]
    wanted += [pl.col(f.name).drop_nulls().mode().min() for f in schema.categorical]
    return dataset.scan("train").select(wanted).collect() if wanted else pl.DataFrame()
