"""Which items of a catalogue a filter lets through, by what they are."""

# Shapes: I items.

from __future__ import annotations

from functools import lru_cache

import polars as pl
import torch
from torch import Tensor

from fullrank.data.encoders import Encoders
from fullrank.funnel.catalogue import BID, Catalogue
from fullrank.retrieval.filters import ItemFilter
from fullrank.schema import FIRST_VOCABULARY_ID, Categorical, MultiCategorical, Numeric

# Filters whose items are remembered.
REMEMBERED = 64


class Attributes:
    """The columns of a catalogue that a filter may speak of: the item's id and bid, its features with a vocabulary by
    their values in the log, and ranges of its numbers.

    Numbers are kept as the encoders left them, which never changes their order: bounds are encoded alike. Values that a
    vocabulary does not have are nobody's.
    """

    def __init__(self, items: Catalogue, encoders: Encoders) -> None:
        self._items, self._encoders = items, encoders
        schema = encoders.schema
        self._names = {str(schema.keys.item_id): items.frame.columns[0]}
        if schema.keys.bid is not None and BID in items.frame.columns:
            self._names[schema.keys.bid] = BID
        listed: list[Categorical | MultiCategorical] = [*schema.categorical, *schema.bags]
        self._features = {
            feature.name: feature
            for feature in listed
            if feature.role == "item" and feature.table_name in encoders.vocabularies
        }
        self._numbers = {
            feature.name: feature
            for feature in schema.numeric
            if feature.role == "item" and feature.encoding != "periodic" and feature.name not in self._names
        }
        self._decoded = lru_cache(len(self._features) or 1)(self._decode)
        self._chosen = lru_cache(REMEMBERED)(self._choose)

    def chosen(self, wanted: ItemFilter) -> Tensor:
        """Rows of the catalogue that pass, bool of shape (I,).

        Raises:
            ValueError: if the filter speaks of an unknown column, or of a range of what is no number.
        """
        return self._chosen(wanted.model_dump_json())

    def _choose(self, text: str) -> Tensor:
        wanted = ItemFilter.model_validate_json(text)
        named = dict.fromkeys([*wanted.any, *wanted.all, *wanted.none, *wanted.range])
        columns: list[pl.Series] = []
        ranges = dict(wanted.range)
        for name in named:
            if name in self._names:
                columns.append(self._items.frame[self._names[name]].alias(name))
            elif name in self._features:
                columns.append(self._decoded(name))
            elif name in self._numbers:
                if name not in wanted.range or name in {**wanted.any, **wanted.all, **wanted.none}:
                    raise ValueError(f'filter: "{name}" is a number: give a range of it')
                low, high = wanted.range[name]
                ranges[name] = self._bound(self._numbers[name], low), self._bound(self._numbers[name], high)
                columns.append(self._items.frame[name])
            else:
                known = ", ".join((*self._names, *self._features, *self._numbers))
                raise ValueError(f'filter: there is no column "{name}" to filter items by; there are {known}')
        frame = pl.DataFrame(columns) if columns else pl.DataFrame({"_": pl.repeat(0, len(self._items), eager=True)})
        mask = wanted.model_copy(update={"range": ranges}).chosen(frame)
        return torch.from_numpy(mask.to_numpy().copy())

    def _bound(self, feature: Numeric, bound: float | None) -> float | None:
        if bound is None:
            return None
        encoded = self._encoders.transform(
            pl.DataFrame([pl.Series(feature.name, [bound], pl.Float64)]), allow_missing=True
        )
        return float(encoded[feature.name][0])

    def _decode(self, name: str) -> pl.Series:
        """The values of a feature, or lists of them, as text; null where there is none that the vocabulary knows."""
        values = self._encoders.vocabularies[self._features[name].table_name].values
        column = self._items.frame[name]
        is_list = isinstance(column.dtype, pl.List)
        ids = (column.list.explode() if is_list else column).cast(pl.Int64) - FIRST_VOCABULARY_ID
        texts = values.gather(ids.set(ids < 0, None))
        if not is_list:
            return texts.alias(name)
        rows = pl.DataFrame({"row": pl.int_range(len(column), eager=True), "ids": column}).explode("ids")["row"]
        lists = pl.DataFrame({"row": rows, "value": texts}).group_by("row", maintain_order=True).agg("value")["value"]
        return lists.alias(name)
