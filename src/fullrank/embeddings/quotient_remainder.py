"""Quotient-remainder tables: two small tables whose rows are combined, and no two ids share both."""

# Shapes: N ids, D width.

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fullrank.embeddings.table import Ask, Part, Table, TableConfig
from fullrank.schema import OUT_OF_VOCABULARY_ID


class QuotientRemainderTable(Table):
    """e(i) = U[i mod m] ω V[⌊i / m⌋] with m = ⌈rows / collisions⌉, so that `collisions` ids share a row of U.

    The parts start so that an entry of e(i) has the standard deviation of a plain table: with the product each part
    takes the square root of it, with the sum each a share of 1/√2.

    An id that came later shares the row of U with the out-of-vocabulary id, and has a row of V for itself.

    Source: Shi et al., Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation
    Systems, KDD 2020, arXiv 1909.02107.
    """

    class Config(TableConfig):
        """Attributes:
        collisions: ids that share a row of the larger part; the memory falls by about this factor.
        operation: ω, by entries.
        """

        kind: Literal["quotient_remainder"] = "quotient_remainder"
        collisions: int = Field(default=4, ge=1)
        operation: Literal["mult", "add"] = "mult"

    grows = True
    config: Config

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        self.modulus = -(-self.first_rows // config.collisions)
        self.quotients = -(-self.first_rows // self.modulus)
        std = init_std**0.5 if config.operation == "mult" else init_std * 0.5**0.5
        self.parts = (
            Part("remainder", self.modulus, width, std),
            Part("quotient", self.quotients + rows - self.first_rows, width, std),
        )

    def asks(self, ids_N: Tensor) -> list[Ask]:
        remainder_N, quotient_N = ids_N % self.modulus, ids_N.div(self.modulus, rounding_mode="floor")
        if self.first_rows < self.rows:
            is_later_N = ids_N >= self.first_rows
            remainder_N = remainder_N.masked_fill(is_later_N, OUT_OF_VOCABULARY_ID % self.modulus)
            quotient_N = torch.where(is_later_N, self.quotients + ids_N - self.first_rows, quotient_N)
        return [Ask(0, remainder_N), Ask(1, quotient_N)]

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        remainder_ND, quotient_ND = vectors
        return remainder_ND * quotient_ND if self.config.operation == "mult" else remainder_ND + quotient_ND
