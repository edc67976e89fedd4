"""What the planted tasks have in common: parts, blocks of rows, labels drawn from a known probability."""

# Shapes: n rows of a block.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from fullrank.data.arrow import as_array
from fullrank.data.splits import PARTS
from fullrank.schema import Schema

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Columns = dict[str, npt.NDArray[Any]]

BLOCK_ROWS = 131_072


class PlantedTask(BaseModel, ABC):
    """A log whose labels are drawn from a probability that is a function of the row's own features.

    So the best possible model is known, and it can be learnt: nothing that decides a label is hidden. The latent
    tables depend on `seed` and the options alone, not on the number of rows.

    Attributes:
        rows: of all parts together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]

    rows: int = Field(default=300_000, ge=10)
    seed: int = Field(default=0, ge=0)

    @abstractmethod
    def log_schema(self) -> Schema:
        """Columns of the log."""

    @abstractmethod
    def part_rows(self) -> dict[str, int]:
        """Rows of each part that has any."""

    @abstractmethod
    def part_frames(self, part: str) -> Iterator[pl.DataFrame]:
        """See `frames`."""

    def frames(self, part: str) -> Iterator[pl.DataFrame]:
        """The rows of one part, block by block: raw columns of the schema, and `__true_<label>`.

        Raises:
            ValueError: if the log has no such part.
        """
        if part not in self.part_rows():
            raise ValueError(f'task "{self.name}" has no part "{part}", expected one of {", ".join(self.part_rows())}')
        return self.part_frames(part)

    def latents(self, table: int = 0) -> np.random.Generator:
        """Where a hidden table is drawn from."""
        return np.random.default_rng((self.seed, 1, table))


class IndependentRows(PlantedTask):
    """A task whose rows (or runs of rows) are drawn independently of one another.

    Attributes:
        valid, test: shares of the rows.
    """

    valid: float = Field(default=0.1, ge=0, lt=0.5)
    test: float = Field(default=0.1, ge=0, lt=0.5)

    @abstractmethod
    def block(self, rng: np.random.Generator, rows: int, first: int) -> pl.DataFrame:
        """Some rows; `first` is the number of the first of them in the whole log."""

    def part_rows(self) -> dict[str, int]:
        valid, test = round(self.rows * self.valid), round(self.rows * self.test)
        sizes = dict(zip(PARTS, (self.rows - valid - test, valid, test), strict=True))
        return {part: rows for part, rows in sizes.items() if rows}

    def part_frames(self, part: str) -> Iterator[pl.DataFrame]:
        sizes = self.part_rows()
        number = PARTS.index(part)
        before = sum(rows for name, rows in sizes.items() if PARTS.index(name) < number)
        for block, begin in enumerate(range(0, sizes[part], BLOCK_ROWS)):
            rng = np.random.default_rng((self.seed, 2, number, block))
            yield self.block(rng, min(BLOCK_ROWS, sizes[part] - begin), before + begin)


def sigmoid(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits))


def labelled(rng: np.random.Generator, columns: Columns, **probabilities: Floats) -> pl.DataFrame:
    """Columns, then each label drawn from its probability, and the probability itself as `__true_<label>`."""
    columns = dict(columns)
    for label, p in probabilities.items():
        columns[label] = (rng.random(len(p)) < p).astype(np.int8)
        columns[f"__true_{label}"] = p.astype(np.float32)
    return pl.DataFrame(columns)


def event_columns(sequence: str, fields: Columns, lengths: Ints) -> list[pl.Series]:
    """Padded events (n, L), real ones first, as list columns `<sequence>.<field>`."""
    width = next(iter(fields.values())).shape[1]
    real = (np.arange(width) < lengths[:, None]).reshape(-1)
    offsets = as_array(np.concatenate([[0], np.cumsum(lengths)]))
    return [
        pl.Series(
            f"{sequence}.{name}",
            pl.from_arrow(pa.LargeListArray.from_arrays(offsets, as_array(values.reshape(-1)[real]))),
        )
        for name, values in fields.items()
    ]


def unit_variance(values: Floats) -> Floats:
    """A table of effects with mean 0 and variance 1."""
    centred = values - values.mean()
    scaled: Floats = centred / math.sqrt(float(np.square(centred).mean()))
    return scaled
