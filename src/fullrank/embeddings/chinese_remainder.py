"""Chinese remainder tables: the parts of an id are its remainders by numbers without a common divisor."""

# Shapes: N ids.

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from fullrank.embeddings.compositional import CompositionalConfig, CompositionalTable
from fullrank.embeddings.partitions import check_sizes, coprime_sizes, residues
from fullrank.embeddings.quotient_remainder import Sizes


class ChineseRemainderTable(CompositionalTable):
    """p_j(i) = i mod m_j. By the Chinese remainder theorem no two ids below m_1 ⋯ m_k have the same remainders."""

    class Config(CompositionalConfig):
        """Attributes:
        num_partitions: k, of about equal size. 2, if no sizes are given.
        sizes: m_1 .. m_k instead.
        """

        kind: Literal["chinese_remainder"] = "chinese_remainder"
        num_partitions: int | None = Field(default=None, ge=2)
        sizes: Sizes | None = None

        @model_validator(mode="after")
        def _one_size(self) -> Self:
            if self.num_partitions is not None and self.sizes is not None:
                raise ValueError("expected one of num_partitions, sizes, got both")
            return self

    config: Config

    def partition_sizes(self) -> tuple[int, ...]:
        sizes = self.config.sizes or coprime_sizes(self.first_rows, self.config.num_partitions or 2)
        check_sizes(self.first_rows, sizes, "chinese_remainder")
        return sizes

    def partition(self, ids_N: Tensor) -> list[Tensor]:
        return residues(ids_N, self.sizes)
