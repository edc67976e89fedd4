"""Quotient-remainder tables: the parts of an id are its digits in a mixed radix."""

# Shapes: N ids.

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from fullrank.embeddings.compositional import CompositionalConfig, CompositionalTable
from fullrank.embeddings.partitions import (
    Major,
    balanced_sizes,
    check_sizes,
    collisions_within,
    digits,
    quotient_remainder_sizes,
)

Sizes = Annotated[tuple[PositiveInt, ...], Field(min_length=2)]


class QuotientRemainderTable(CompositionalTable):
    """e(i) = U[i mod m] ω V[⌊i / m⌋] with m = ⌈rows / collisions⌉, so that `collisions` ids share a row of U.

    With more than two partitions, p_1(i) = i mod m_1 and p_j(i) = ⌊i / (m_1 ⋯ m_{j-1})⌋ mod m_j.
    """

    class Config(CompositionalConfig):
        """Attributes:
        collisions: ids that share a row of the larger of two parts; the memory falls by about this factor. 4, if no
            other size is given.
        num_partitions: this many partitions of about equal size instead, the smallest that suffice.
        sizes: parts of each partition instead.
        memory_budget: bytes of the table instead, as float32: the fewest collisions that fit, and a plain table where
            they save nothing.
        major: whether the first partition has the least significant digit (`remainder`: ids that share a row of the
            larger part lie m apart) or the most significant one (`quotient`: they are neighbours).
        """

        kind: Literal["quotient_remainder"] = "quotient_remainder"
        collisions: int | None = Field(default=None, ge=1)
        num_partitions: int | None = Field(default=None, ge=2)
        sizes: Sizes | None = None
        memory_budget: int | None = Field(default=None, ge=1)
        major: Major = "remainder"

        @model_validator(mode="after")
        def _one_size(self) -> Self:
            names = ("collisions", "num_partitions", "sizes", "memory_budget")
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                raise ValueError(f"expected one of {', '.join(names)}, got {' and '.join(given)}")
            if self.memory_budget is not None and self.operation == "path":
                raise ValueError("memory_budget sizes rows, and operation path has MLPs: give collisions or sizes")
            return self

    config: Config

    def partition_sizes(self) -> tuple[int, ...]:
        config, rows = self.config, self.first_rows
        if config.sizes is not None:
            check_sizes(rows, config.sizes, "quotient_remainder")
            return config.sizes
        if config.num_partitions is not None:
            return balanced_sizes(rows, config.num_partitions)
        if config.memory_budget is not None:
            collisions = collisions_within(config.memory_budget, [rows], self.bytes_of)
            sizes = quotient_remainder_sizes(rows, collisions)
            return sizes if self.bytes_of(sizes) < self.bytes_of((rows,)) else (rows,)
        return quotient_remainder_sizes(rows, config.collisions or 4)

    def part_names(self) -> Sequence[str]:
        if len(self.sizes) != 2:
            return super().part_names()
        return ("remainder", "quotient") if self.config.major == "remainder" else ("quotient", "remainder")

    def partition(self, ids_N: Tensor) -> list[Tensor]:
        return digits(ids_N, self.sizes, self.config.major)
