"""Mixed dimensions: popular ids have wide rows, rare ones narrow rows that a projection lifts to the common width."""

# Shapes: N ids, D width of the table's vectors, W width of a block.

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from fullrank.embeddings.table import Ask, Part, Table, TableConfig
from fullrank.schema import OUT_OF_VOCABULARY_ID


class MixedDimensionTable(Table):
    """e(i) = E_b[i - first_b] P_b for the block b of id i; a block as wide as the table has no projection.

    Vocabularies count their values and give the most frequent one the smallest id, so consecutive ids are blocks by
    popularity. Rows of a narrow block start with the plain table's standard deviation, its projection with columns of
    unit length in expectation, so that the entries of e(i) start alike in every block. Ids that came later are in the
    block of the out-of-vocabulary id, behind those that it had.

    Source: Ginart et al., Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems,
    ISIT 2021, arXiv 1909.11810.
    """

    class Config(TableConfig):
        """Attributes:
        dims: widths of the blocks, the most popular ids first; none above the width of the table.
        shares: of all ids, for each block but the last, which takes the rest.
        """

        kind: Literal["mixed_dimension"] = "mixed_dimension"
        dims: tuple[PositiveInt, ...] = Field(default=(4,), min_length=1)
        shares: tuple[float, ...] = ()

        @model_validator(mode="after")
        def _blocks(self) -> Self:
            if len(self.shares) != len(self.dims) - 1:
                raise ValueError(f"expected {len(self.dims) - 1} shares for {len(self.dims)} dims, got {self.shares}")
            if any(not 0 < share < 1 for share in self.shares) or sum(self.shares) >= 1:
                raise ValueError(f"expected shares above 0 whose sum is below 1, got {self.shares}")
            return self

    grows = True
    config: Config

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        if max(config.dims) > width:
            raise ValueError(f"dims {config.dims} of a mixed_dimension table are above its width {width}")
        sizes = [int(share * self.first_rows) for share in config.shares]
        sizes.append(self.first_rows - sum(sizes))
        self.begins = [0, *itertools.accumulate(sizes)]
        if self.first_rows < rows:
            block = bisect_right(self.begins, OUT_OF_VOCABULARY_ID) - 1  # not the first one if that is very small
            self.later_begin = self.begins[block + 1]
            sizes[block] += rows - self.first_rows
            self.begins = [0, *itertools.accumulate(sizes)]
        self.parts = tuple(
            Part(f"block{block}", size, dim, init_std)
            for block, (size, dim) in enumerate(zip(sizes, config.dims, strict=True))
        )
        self.projections = nn.ParameterDict(
            {
                f"block{block}": nn.Parameter(torch.randn(dim, width) * dim**-0.5)
                for block, dim in enumerate(config.dims)
                if dim < width
            }
        )

    def asks(self, ids_N: Tensor) -> list[Ask]:
        if len(self.parts) == 1:
            return [Ask(0, ids_N)]
        found, place_N = [], self._place(ids_N)
        for block, (begin, end) in enumerate(itertools.pairwise(self.begins)):
            of = ((place_N >= begin) & (place_N < end)).nonzero().squeeze(1)
            found.append(Ask(block, place_N.index_select(0, of) - begin, of))
        return found

    def _place(self, ids_N: Tensor) -> Tensor:
        """Where ids lie when all blocks are one behind the other, ids that came later within one of them."""
        if self.first_rows == self.rows:
            return ids_N
        behind_N = ids_N + (ids_N >= self.later_begin) * (self.rows - self.first_rows)
        return torch.where(ids_N < self.first_rows, behind_N, self.later_begin + ids_N - self.first_rows)

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        lifted = [self._lift(ask.part, rows_MW) for ask, rows_MW in zip(asks, vectors, strict=True)]
        if asks[0].of is None:
            return lifted[0]
        places = torch.cat([ask.of for ask in asks if ask.of is not None])
        return lifted[0].new_empty(ids_N.numel(), self.width).index_copy(0, places, torch.cat(lifted))

    def _lift(self, block: int, rows_MW: Tensor) -> Tensor:
        name = f"block{block}"
        if name not in self.projections:
            return rows_MW
        lifted_MD: Tensor = rows_MW @ self.projections[name]
        return lifted_MD.float()
