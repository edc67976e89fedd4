"""A log of events as rows to rank: each next item of a user against a sampled other, with the items before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data.arrow import as_array, as_series, list_array
from fullrank.data.formats.by_user import ByUser
from fullrank.data.formats.next_item import NextItems, next_items
from fullrank.data.raw import LINE_COLUMN, RawChunk, only_rejected, raw_columns
from fullrank.schema import Categorical, EventId, Feature, Keys, Label, MultiCategorical, Schema, Sequence

USER, ITEM, TIME = "user_id", "item_id", "timestamp"
HISTORY = 100
# Attributes of an item, and of all items of a history.
ATTRIBUTES, HISTORY_ATTRIBUTES = 16, 400
# Rows come of so many events at a time; of fewer where items have attributes, each list of which is long.
CANDIDATES, ATTRIBUTE_CANDIDATES = 32_768, 2048

# What is known of an item beside its id: nothing, one category, or a list of attributes.
Known = Literal["", "category_id", "attributes"]


class EventLog(Protocol):
    """Who took which item in which order, and what the items are.

    Attributes:
        timed: its events have times.
        known: what it says of the items.
    """

    timed: bool
    known: Known

    def events(self) -> Iterator[RawChunk]:
        """Columns user_id, item_id (text or integers), timestamp (seconds) if timed, and `__line`."""
        ...

    def items(self, ids: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
        """item_id and the known column of those of `ids` that are described; rejected rows."""
        ...

    def groups(self) -> int:
        """How many groups of users the events should be divided into."""
        ...


def event_schema(known: Known, *, timed: bool) -> Schema:
    """The schema of the rows of a log."""
    features: list[Feature] = [Categorical(name="item_id", role="item")]
    fields = [EventId(name="item", table="item_id")]
    if known == "category_id":
        features.append(Categorical(name="category_id", role="item"))
        fields.append(EventId(name="category", table="category_id"))
    if known == "attributes":
        features.append(MultiCategorical(name="attributes", role="item", max_length=ATTRIBUTES))
    features.append(Sequence(name="history", fields=tuple(fields), max_length=HISTORY))
    if known == "attributes":
        attribute = EventId(name="attribute", table="attributes")
        features.append(Sequence(name="history_attributes", fields=(attribute,), max_length=HISTORY_ATTRIBUTES))
    keys = Keys(user_id=USER, item_id=ITEM, timestamp=TIME if timed else None)
    return Schema(features=tuple(features), labels=(Label(name="label"),), keys=keys)


def event_rows(layout: EventLog, schema: Schema) -> Iterator[RawChunk]:
    """The rows of a log, in its schema or in one with other lengths: see `NextItems`."""
    lengths = {sequence.name: sequence.max_length for sequence in schema.sequences}
    lengths["attributes"] = next((bag.max_length for bag in schema.bags if bag.name == "attributes"), ATTRIBUTES)
    columns = [*raw_columns(schema), "split"]
    ids: dict[Any, int] = {}
    with ByUser(USER, layout.groups()) as events:
        for chunk in layout.events():
            if chunk.rejected.height:
                yield only_rejected(columns, chunk.rejected)
            if chunk.frame.height:
                events.add(chunk.frame.with_columns(_codes(chunk.frame[ITEM], ids)))
        catalogue = pl.Series(ITEM, list(ids))
        about, rejected = _described(layout, catalogue)
        if rejected.height:
            yield only_rejected(columns, rejected)
        for place in range(events.groups):
            group = events.frame(place)
            if group is None:
                continue
            # Users side by side, in order of their first event in the log; events in order of time.
            group = group.with_row_index("__place")
            first = pl.col("__place").min().over(USER)
            group = group.sort(first, *([TIME] if layout.timed else []), "__place").drop("__place")
            items = group[ITEM].cast(pl.Int64).to_numpy()
            longest = lengths.get("history", HISTORY)
            candidates = ATTRIBUTE_CANDIDATES if layout.known == "attributes" else CANDIDATES
            for rows in next_items(group[USER], items, len(ids), max_length=longest, candidates=candidates):
                yield _chunk(group, rows, catalogue, about, lengths)


def _codes(items: pl.Series, ids: dict[Any, int]) -> pl.Series:
    """Items as places in `ids`, to which new ones are added."""
    distinct = items.unique(maintain_order=True)
    places = [ids.setdefault(item, len(ids)) for item in distinct.to_list()]
    return items.replace_strict(distinct, pl.Series(places, dtype=pl.Int32), return_dtype=pl.Int32).alias(ITEM)


def _described(layout: EventLog, catalogue: pl.Series) -> tuple[pl.Series | None, pl.DataFrame]:
    """What is known of each item of the catalogue, null where nothing is."""
    if not layout.known:
        return None, pl.DataFrame()
    items, rejected = layout.items(catalogue)
    if catalogue.is_empty():
        return None, rejected
    items = items.with_columns(pl.col(ITEM).cast(catalogue.dtype))
    return catalogue.to_frame().join(items, on=ITEM, how="left", maintain_order="left")[layout.known], rejected


def _chunk(
    group: pl.DataFrame, rows: NextItems, catalogue: pl.Series, about: pl.Series | None, lengths: dict[str, int]
) -> RawChunk:
    item = pl.Series(rows.item)
    columns = {
        USER: group[USER].gather(rows.event),
        ITEM: catalogue.gather(item),
        "label": pl.Series(rows.label),
        "split": rows.part,
        LINE_COLUMN: group[LINE_COLUMN].gather(rows.event),
    }
    if TIME in group.columns:
        columns[TIME] = group[TIME].gather(rows.event)
    lists: dict[str, pl.Series] = {}
    taken = group[ITEM].gather(rows.places)
    if "history" in lengths:
        lists["history.item"] = _lists(rows.offsets, catalogue.gather(taken))
    if about is not None:
        columns[about.name] = (about.list.head(lengths["attributes"]) if about.name == "attributes" else about).gather(
            item
        )
        if "history" in lengths and about.name == "category_id":
            lists["history.category"] = _lists(rows.offsets, about.gather(taken))
        if "history_attributes" in lengths and about.name == "attributes":
            lists["history_attributes.attribute"] = _flattened(
                rows.offsets, taken.to_numpy(), about, lengths["history_attributes"]
            )
    # The rows of a candidate share its lists.
    columns.update({name: pl.Series(rows.history) for name in lists})
    return RawChunk(pl.DataFrame(columns), dictionaries=lists)


def _flattened(
    offsets: npt.NDArray[np.int32], items: npt.NDArray[np.int64], attributes: pl.Series, most: int
) -> pl.Series:
    """Lists of the last attributes of the items of each list, `most` at most.

    Cut before they are put together: an item may have any number of attributes, and a list any such items.
    """
    counts = attributes.list.len().fill_null(0).to_numpy().astype(np.int64)
    first = np.cumsum(counts) - counts
    before = np.zeros(len(items) + 1, dtype=np.int64)
    np.cumsum(counts[items], out=before[1:])
    ends = before[offsets[1:]]
    begins = np.maximum(before[offsets[:-1]], ends - most)
    kept = np.zeros(len(offsets), dtype=np.int64)
    np.cumsum(ends - begins, out=kept[1:])
    places = np.repeat(begins - kept[:-1], ends - begins) + np.arange(kept[-1])
    item = np.searchsorted(before, places, side="right") - 1
    elements = as_series(as_array(attributes).flatten(), attributes.name)
    return _lists(kept.astype(np.int32), elements.gather(first[items[item]] + places - before[item]))


def _lists(offsets: npt.NDArray[np.int32], elements: pl.Series) -> pl.Series:
    return as_series(list_array(offsets, elements), elements.name)
