"""How good a ranker is on parts of a split: new and known users and items, popular and rare ones, values of columns."""

# Shapes: n rows.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.transforms import untransformed
from fullrank.funnel.predictions import Predictions, intervals
from fullrank.metrics import bootstrap
from fullrank.schema import FIRST_VOCABULARY_ID, MISSING_ID, OUT_OF_VOCABULARY_ID, Categorical

# Values of a column that get a slice of their own, and ranges of a column of numbers.
MOST_VALUES, RANGES = 10, 5
# Shares of the training impressions after which the head and the torso of the items end.
HEAD, TORSO = 0.5, 0.8
# Below these a slice says little.
FEW_ROWS, FEW_OF_A_CLASS, FEW_USERS = 100, 10, 10

NONE = -1


@dataclass(frozen=True)
class Grouping:
    """Rows cut into slices.

    Attributes:
        by: what they are cut by.
        names: of the slices.
        slice_n: place of each row's slice among them, `NONE` for a row in none.
    """

    by: str
    names: tuple[str, ...]
    slice_n: npt.NDArray[np.int64]


def groupings(dataset: Dataset, split: str, columns: Sequence[str] = ()) -> list[Grouping]:
    """New and known users and items, popularity of items, and the given columns.

    Raises:
        ValueError: if a column is neither a feature with one value a row nor a further column of the dataset.
    """
    found = [_by_column(dataset, split, column) for column in dict.fromkeys(columns)]
    keys = dataset.schema.keys
    fixed = [_novelty(dataset, split, "user")] if keys.user_id is not None else []
    if keys.item_id is not None:
        fixed += [_novelty(dataset, split, "item"), _popularity(dataset, split)]
    return [*fixed, *found]


def slices(said: Predictions, task: int, parts: Sequence[Grouping], seed: int = 0) -> list[dict[str, Any]]:
    """Metrics of a binary task in each slice that has rows; see `evaluate_funnel`."""
    observed_n = said.observed(task)
    if said.weights_n is not None:
        observed_n &= said.weights_n > 0
    result = []
    for grouping in parts:
        for place, name in enumerate(grouping.names):
            chosen_n = torch.from_numpy(grouping.slice_n == place) & observed_n
            if not bool(chosen_n.any()):
                continue
            rows = said.rows(task, chosen_n)
            drawn = bootstrap(rows, seed=seed)
            entry: dict[str, Any] = {
                "by": grouping.by,
                "slice": name,
                "task": said.labels[task].name,
                "rows": rows.rows,
                **{metric: drawn.estimate[metric] for metric in ("rate", "ne", "auc", "calibration")},
                "intervals": intervals(drawn),
            }
            positive = float(said.labels_nT[chosen_n, task].double().sum())
            if rows.rows < FEW_ROWS:
                entry["note"] = f"{rows.rows} rows: too few to say much"
            elif (fewest := min(positive, rows.rows - positive)) < FEW_OF_A_CLASS:
                entry["note"] = f"{fewest:.0f} rows of the rarer class: too few to say much"
            elif rows.clusters < FEW_USERS:
                entry["note"] = f"{rows.clusters} users: too few to say much"
            result.append(entry)
    return result


def _novelty(dataset: Dataset, split: str, role: Literal["user", "item"]) -> Grouping:
    """New is what the encoders do not know, if the key is a feature with a vocabulary; else what the training part has
    no row of."""
    key = KEY_COLUMNS[f"{role}_id"]
    name = getattr(dataset.schema.keys, f"{role}_id")
    feature = next((feature for feature in dataset.schema.categorical if feature.name == name), None)
    if feature is not None and feature.encoding == "vocabulary":
        column = dataset.scan(split).select(name).collect()[name]
        new, missing = column == OUT_OF_VOCABULARY_ID, column == MISSING_ID
    else:
        column = dataset.scan(split).select(key).collect()[key]
        seen = dataset.scan("train").select(pl.col(key).unique()).collect()[key]
        new, missing = ~column.is_in(seen.implode()), column.is_null()
    known_n = (~new).fill_null(False).cast(pl.Int64).to_numpy()
    return Grouping(role, ("new", "known"), np.where(missing.fill_null(True).to_numpy(), NONE, known_n))


def _popularity(dataset: Dataset, split: str) -> Grouping:
    """Head: the most shown items of training, which together have half of its rows; torso: those with the next 30 %;
    tail: the rest, and items that training never showed."""
    item = KEY_COLUMNS["item_id"]
    shown = dataset.scan("train").filter(pl.col(item).is_not_null()).group_by(item).len("rows")
    before = pl.col("rows").cum_sum() - pl.col("rows")
    total = pl.col("rows").sum()
    place = pl.when(before < HEAD * total).then(0).when(before < TORSO * total).then(1).otherwise(2)
    places = shown.sort(["rows", item], descending=[True, False]).select(item, place.cast(pl.Int64).alias("place"))
    rows = dataset.scan(split).select(item).join(places, on=item, how="left", maintain_order="left").collect()
    code = pl.when(pl.col(item).is_null()).then(NONE).otherwise(pl.col("place").fill_null(2))
    return Grouping("item popularity", ("head", "torso", "tail"), rows.select(code.alias("c"))["c"].to_numpy())


def _by_column(dataset: Dataset, split: str, name: str) -> Grouping:
    schema = dataset.schema
    lists = {*schema.jagged_keys, *(bag.name for bag in schema.bags), *(events.name for events in schema.sequences)}
    categorical = {feature.name: feature for feature in schema.categorical}
    numeric = {feature.name: feature for feature in schema.numeric}
    if name in lists or isinstance(dataset.extra.get(name), pl.List | pl.Array | pl.Struct):
        raise ValueError(f'{dataset.path}: "{name}" has lists; slices are by a column with one value in each row')
    if not (name in categorical or name in numeric or name in dataset.extra):
        there = ", ".join([*categorical, *numeric, *dataset.extra]) or "none"
        raise ValueError(f'{dataset.path} has no feature and no further column "{name}" to slice by; it has {there}')
    column = dataset.scan(split).select(name).collect()[name]
    if name in categorical:
        return _by_value(name, _decoded(dataset, categorical[name], column))
    if name in numeric:
        state = dataset.encoders.numbers[name]
        column = pl.Series(name, untransformed(numeric[name], state, column.cast(pl.Float64).to_numpy()))
    if column.dtype.is_float():
        column = column.fill_nan(None)
    if column.dtype.is_numeric() and column.n_unique() > MOST_VALUES + 1:
        return _by_range(name, column)
    return _by_value(
        name, pl.Series([None if value is None else _text(value) for value in column.to_list()], dtype=pl.String)
    )


def _decoded(dataset: Dataset, feature: Categorical, ids: pl.Series) -> pl.Series:
    """Text of encoded ids: the value, if the dataset knows it, else the number of its row in the table."""
    distinct = ids.unique().to_list()
    vocabulary = dataset.encoders.vocabularies.get(feature.table_name)
    reserved = {MISSING_ID: "missing", OUT_OF_VOCABULARY_ID: "new"} if vocabulary is not None else {}

    def text(row: int) -> str:
        if row in reserved:
            return reserved[row]
        return f"id {row}" if vocabulary is None else str(vocabulary.values[row - FIRST_VOCABULARY_ID])

    return ids.replace_strict(distinct, [text(row) for row in distinct], return_dtype=pl.String)


def _by_value(name: str, values: pl.Series) -> Grouping:
    """The most frequent values, and all others together."""
    values = values.fill_null("missing")
    counts = values.alias("value").value_counts().sort(["count", "value"], descending=[True, False])
    names = counts["value"].head(MOST_VALUES).to_list()
    others = counts.height - len(names)
    codes = values.replace_strict(names, list(range(len(names))), default=len(names), return_dtype=pl.Int64)
    return Grouping(name, (*names, f"{others} other values"), codes.to_numpy())


def _by_range(name: str, column: pl.Series) -> Grouping:
    """Ranges with about equal numbers of rows."""
    numbers = column.cast(pl.Float64).fill_null(float("nan")).to_numpy()
    there = ~np.isnan(numbers)
    edges = np.unique(np.quantile(numbers[there], np.arange(1, RANGES) / RANGES, method="lower"))
    code_n = np.where(there, np.searchsorted(edges, numbers, side="left"), len(edges) + 1)
    names = []
    for place in range(len(edges) + 1):
        part = numbers[code_n == place]
        names.append(f"{_text(part.min())} to {_text(part.max())}" if len(part) else "none")
    return Grouping(name, (*names, "missing"), code_n)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
