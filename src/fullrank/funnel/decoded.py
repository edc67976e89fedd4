"""Raw values, as a log has them, of encoded rows: encoded again, they are what they were."""

# Shapes: B rows, n ids or numbers of a column.

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.encoders import Encoders
from fullrank.data.transforms import untransformed
from fullrank.schema import FIRST_VOCABULARY_ID, MISSING_ID, Categorical, EventId, MultiCategorical, Role


class Decoder:
    """Turns the rows of a batch back to raw values by column of the log.

    A value that the encoders do not have is None: of a hashed column every one, of a vocabulary one that is not in it.
    What an import derives from earlier rows is left out: the next import derives it again.

    Args:
        roles: whose features.
    """

    def __init__(self, encoders: Encoders, roles: Set[Role]) -> None:
        self._encoders, self._schema = encoders, encoders.schema
        self._chosen = self._schema.stored.select(set(roles))

    def __call__(self, rows: Batch) -> list[dict[str, Any]]:
        """A dict for each row."""
        columns: dict[str, list[Any]] = {}
        numbers = self._schema.numeric_columns
        for numeric in self._chosen.numeric:
            encoded_B = rows.numeric_BN[:, numbers.index(numeric.name)].double().numpy()
            raw_B = untransformed(numeric, self._encoders.numbers[numeric.name], encoded_B)
            if numeric.missing_column is not None:
                raw_B = np.where(rows.numeric_BN[:, numbers.index(numeric.missing_column)].numpy() == 1, np.nan, raw_B)
            columns[numeric.name] = _without_nan(raw_B)
        places = [feature.name for feature in self._schema.categorical]
        for feature in self._chosen.categorical:
            columns[feature.name] = self._values(feature, rows.ids_BF[:, places.index(feature.name)])
        for bag in self._chosen.bags:
            values, lengths_B = rows.jagged(bag.name)
            columns[bag.name] = _lists(self._values(bag, values), lengths_B)
        for sequence in self._chosen.sequences:
            for part in sequence.fields:
                name = sequence.column(part)
                if isinstance(part, EventId):
                    values, lengths_B = rows.jagged(name)
                    columns[name] = _lists(self._values(part, values), lengths_B)
                    continue
                values, lengths_B = rows.events(name)
                raw = values.double().numpy()
                raw = np.sign(raw) * np.expm1(np.abs(raw)) if part.transform == "log1p" else raw
                columns[name] = _lists(raw.tolist(), lengths_B)
        if not columns:
            return [{} for _ in range(len(rows))]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _values(self, feature: Categorical | MultiCategorical | EventId, ids: Tensor) -> list[Any]:
        """Raw values of encoded ids, shape (n,)."""
        table, ids_n = feature.table_name, ids.numpy()
        places = ids_n - FIRST_VOCABULARY_ID
        if feature.encoding == "identity":
            return list(ids_n.tolist())
        if feature.encoding == "vocabulary":
            column = pl.Series(places)
            return self._encoders.vocabularies[table].values.gather(column.set(column < 0, None)).to_list()
        if feature.encoding == "raw":
            found: npt.NDArray[Any] = places.astype(object)
        elif feature.encoding == "log2_bucket":
            found = _counts(places + self._encoders.buckets[table].low).astype(object)
        elif feature.encoding == "quantile":
            edges = np.asarray(self._encoders.buckets[table].edges or (0.0,))
            inner = edges[np.clip(places - 1, 0, len(edges) - 1)]
            found = np.where(places > 0, inner, edges[0] - 1 - abs(edges[0])).astype(object)
        else:
            return [None] * len(ids_n)
        found[ids_n == MISSING_ID] = None
        return list(found.tolist())


def _counts(buckets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A number in each bucket of `log2_buckets`."""
    return np.where(buckets > 2, 2.0 ** np.sqrt(np.maximum(buckets - 1.5, 0)), buckets.astype(np.float64))


def _without_nan(numbers: npt.NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(number) else number for number in numbers.tolist()]


def _lists(values: list[Any], lengths_B: Tensor) -> list[list[Any]]:
    ends = lengths_B.cumsum(0).tolist()
    return [values[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
