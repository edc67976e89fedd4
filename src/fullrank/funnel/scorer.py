"""One ranker over raw rows: what can be served of a log that names neither users nor items."""

# Shapes: B rows, T tasks; X any shape.

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
import torch
from torch import Tensor

from fullrank.data.encoders import KEY_COLUMNS, Encoders
from fullrank.data.loader import batch_from_frame
from fullrank.embeddings import EmbeddingCollection
from fullrank.funnel.raw_values import check_alike, list_column, scalar_column
from fullrank.funnel.stages import FINAL
from fullrank.funnel.value import ValueFormula, default_formula, formula_names
from fullrank.models.base import Ranker
from fullrank.schema import EventNumber, MultiCategorical, Numeric, Schema
from fullrank.schema import Sequence as Events

ROWS_AT_ONCE = 8192
_ROW = re.compile(r"\brow (\d+)\b")

# Told the name of a stage and the seconds it took.
Observe = Callable[[str, float], None]


@dataclass(frozen=True)
class ScoredItem:
    """An item, or a row, as the final stage sees it.

    Attributes:
        item_id: None for a row that names no item.
        value: None where the formula gave no number.
        predictions: by task: a probability, or a number for regression.
    """

    item_id: int | str | None
    value: float | None
    predictions: dict[str, float]


class Scorer:
    """A ranker with the encoders of its training data: raw rows in, predictions out.

    It is the last stage of every funnel, and alone what `fullrank train` leaves of a single model.

    Args:
        encoders: of training; its schema is the model's.
        model: a trained ranker.
        value: formula over tasks and `bid`; see `default_formula`.
    """

    def __init__(self, encoders: Encoders, model: Ranker, value: str | None = None) -> None:
        self.encoders = encoders
        self.schema: Schema = encoders.schema
        self.model = model.eval()
        self.value = ValueFormula(value or default_formula(self.schema), formula_names(self.schema))
        self.tasks = tuple(label.name for label in self.schema.labels)
        self._binary_T = torch.tensor([label.kind == "binary" for label in self.schema.labels])
        trust_ids(model)
        self.columns = _columns(self.schema)

    @property
    def rankers(self) -> dict[str, Ranker]:
        """Its one, as those of a funnel by stage."""
        return {FINAL: self.model}

    def with_rankers(self, rankers: Mapping[str, Ranker]) -> Scorer:
        """The same with another ranker."""
        return Scorer(self.encoders, rankers[FINAL], self.value.text)

    def predictions(self, logits_XT: Tensor) -> Tensor:
        """Probabilities of binary tasks, the numbers themselves of regression tasks."""
        return torch.where(self._binary_T, torch.sigmoid(logits_XT), logits_XT)

    def values(self, logits_XT: Tensor, bid_X: Tensor | None) -> Tensor:
        """The formula's value, -inf where it gives no finite number, as where the bid is NaN.

        Raises:
            ValueError: if a bid is negative.
        """
        columns = dict(zip(self.tasks, self.predictions(logits_XT).unbind(-1), strict=True))
        if bid_X is not None:
            if bool((bid_X < 0).any()):
                raise ValueError(f"a bid is {float(bid_X[bid_X < 0][0]):g}, expected a number >= 0")
            columns["bid"] = bid_X
        value_X = self.value(columns)
        return torch.where(torch.isfinite(value_X), value_X, -torch.inf)

    def spreads(self, logits_XT: Tensor, bid_X: Tensor | None, pseudo_counts: float) -> Tensor:
        """Standard deviations of the values, if each probability p were the mean of `pseudo_counts` impressions.

        To first order (delta method), tasks independent: var V = sum_t (dV / dp_t)^2 p_t (1 - p_t) / (n + 1), the
        variance of Beta(n p, n (1 - p)). Predictions of numbers are taken as certain.
        """
        # Autograd needs tensors that were not made in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            prediction_XT = self.predictions(logits_XT.double().clone()).detach().requires_grad_()
            columns = dict(zip(self.tasks, prediction_XT.unbind(-1), strict=True))
            if bid_X is not None:
                columns["bid"] = bid_X.double().clone()
            value_X = self.value(columns)
            if not value_X.requires_grad:
                return torch.zeros(value_X.shape, dtype=torch.float64)
            (slope_XT,) = torch.autograd.grad(value_X.sum(), prediction_XT)
        p_XT = prediction_XT.detach()
        variance_XT = torch.where(self._binary_T, p_XT * (1 - p_XT) / (pseudo_counts + 1), 0.0)
        return (slope_XT.square() * variance_XT).sum(-1).sqrt().nan_to_num(0.0, posinf=0.0)

    def scored(self, item_ids: Sequence[int | str | None], logits_BT: Tensor, bid_B: Tensor | None) -> list[ScoredItem]:
        """One entry for each row of logits."""
        values, predictions = self.values(logits_BT, bid_B).tolist(), self.predictions(logits_BT).tolist()
        return [
            ScoredItem(item_id, value if value > -torch.inf else None, dict(zip(self.tasks, numbers, strict=True)))
            for item_id, value, numbers in zip(item_ids, values, predictions, strict=True)
        ]

    @torch.inference_mode()
    def score(
        self,
        rows: Sequence[Mapping[str, Any]],
        observe: Observe | None = None,
        *,
        first: int = 1,
        extra: Mapping[str, Tensor] | None = None,
    ) -> list[ScoredItem]:
        """Predictions for rows in the columns of the schema, in the given order.

        A feature that a row leaves out is missing in it. Keys and labels may be there, so that a row of the log can be
        sent as it is; of them only the item's id and the bid are read.

        Args:
            observe: told the seconds that encoding and the model took.
            first: number of the first row, in errors.
            extra: further columns, for a ranker that reads `Batch.extra`.

        Raises:
            ValueError: if a row has an unknown column or a value of the wrong type; names row and column.
        """
        if not rows:
            return []
        begin = time.perf_counter()
        try:
            frame = self.encoders.transform(self._frame(rows), allow_missing=True)
        except UnicodeEncodeError:
            raise
        except ValueError as error:
            raise ValueError(_ROW.sub(lambda row: f"row {int(row[1]) + first - 1}", str(error), count=1)) from None
        batch = replace(batch_from_frame(frame, self.schema), extra=dict(extra or {}))
        encoded = time.perf_counter()
        logits_BT = torch.cat(
            [self.model(batch[i : i + ROWS_AT_ONCE]).logits_BT for i in range(0, len(rows), ROWS_AT_ONCE)]
        )
        if observe is not None:
            observe("encode", encoded - begin)
            observe("final", time.perf_counter() - encoded)
        bid_B = None
        if self.schema.keys.bid is not None:
            bid = KEY_COLUMNS["bid"]
            numbers = frame[bid].cast(pl.Float32) if bid in frame.columns else pl.Series([None] * len(rows))
            bid_B = torch.tensor([float("nan") if number is None else number for number in numbers.to_list()])
        item = self.schema.keys.item_id
        return self.scored([row.get(item) if item is not None else None for row in rows], logits_BT, bid_B)

    def _frame(self, rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
        names = dict.fromkeys(name for row in rows for name in row)
        ignored = {label.name for label in self.schema.labels} | set(self.schema.keys.model_dump().values())
        # A frame without columns would have no rows.
        columns = [pl.Series("__row", range(len(rows)))]
        for name in names:
            if name in self.columns:
                columns.append(self.columns[name]([row.get(name) for row in rows]))
            elif name not in ignored:
                place = next(place for place, row in enumerate(rows, 1) if name in row)
                raise ValueError(f'row {place}: unknown column "{name}"; expected {", ".join(self.columns)}')
        if (bid := self.schema.keys.bid) in names:
            for place, row in enumerate(rows, 1):
                if isinstance(number := row.get(bid), float) and math.isnan(number):
                    raise ValueError(f'row {place}: column "{bid}" is NaN, expected a number >= 0 or null')
        given = set(names)
        for sequence in self.schema.sequences:
            fields = [sequence.column(part) for part in sequence.fields]
            absent = [name for name in fields if name not in given]
            if absent and len(absent) < len(fields):
                there = next(name for name in fields if name in given)
                raise ValueError(f'"{there}" is given without "{absent[0]}": give all fields of {sequence.name}')
            if len(fields) > 1 and not absent:
                check_alike(sequence, {name: [row.get(name) for row in rows] for name in fields})
        return pl.DataFrame(columns)


def trust_ids(model: Ranker) -> None:
    """Ids come from encoders that know the tables' sizes; a lookup refuses what is outside in any case."""
    for module in model.modules():
        if isinstance(module, EmbeddingCollection):
            module.check_ids = False


def _columns(schema: Schema) -> dict[str, Callable[[Sequence[Any]], pl.Series]]:
    """What makes a column of each feature, and of the bid, from the values of the rows."""

    def scalar(name: str, *, numeric: bool) -> Callable[[Sequence[Any]], pl.Series]:
        return lambda values: scalar_column(name, values, numeric=numeric)

    def listed(name: str, feature: MultiCategorical | Events, *, numeric: bool) -> Callable[[Sequence[Any]], pl.Series]:
        return lambda values: list_column(name, values, feature, numeric=numeric)

    columns: dict[str, Callable[[Sequence[Any]], pl.Series]] = {}
    for feature in schema.features:
        if isinstance(feature, Events):
            for part in feature.fields:
                name = feature.column(part)
                columns[name] = listed(name, feature, numeric=isinstance(part, EventNumber))
            if len(feature.fields) == 1:
                # As in a log, a sequence of one field may go by the sequence's own name.
                columns[feature.name] = listed(feature.name, feature, numeric=not feature.id_fields)
        elif isinstance(feature, MultiCategorical):
            columns[feature.name] = listed(feature.name, feature, numeric=False)
        else:
            columns[feature.name] = scalar(feature.name, numeric=isinstance(feature, Numeric))
    bid = schema.keys.bid
    if bid is not None and bid not in columns:
        columns[bid] = scalar(bid, numeric=True)
    return columns
