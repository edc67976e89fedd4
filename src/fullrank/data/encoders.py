"""From the raw values of a log to the numbers and ids that a model reads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import polars as pl

from fullrank.schema import Schema


def stable_hash(values: pl.Series) -> pl.Series:
    """64-bit hash (UInt64) of each value's text; null stays null. Equal on every machine, version and process."""
    raise NotImplementedError


class Encoders:
    """All fitted encoders of a schema; the same object encodes training data and requests.

    Attributes:
        schema: fitted.
    """

    schema: Schema

    @classmethod
    def fit(cls, schema: Schema, chunks: Iterable[pl.DataFrame]) -> Self:
        """Fit on the raw columns of the training part, read once."""
        raise NotImplementedError

    def transform(self, frame: pl.DataFrame, *, allow_missing: bool = False) -> pl.DataFrame:
        """Encoded columns (features, labels and keys under their fixed names) of a raw frame.

        Args:
            frame: raw columns, as in `RawChunk.frame`.
            allow_missing: a feature's column that is absent counts as missing in every row (labels and keys may
                always be absent).

        Raises:
            ValueError: if a column is absent or does not hold what the schema says.
        """
        raise NotImplementedError

    def save(self, directory: Path) -> None: ...

    @classmethod
    def load(cls, directory: Path) -> Self:
        raise NotImplementedError
