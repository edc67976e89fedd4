"""Mixed dimensions: popular ids have wide rows, rare ones narrow rows that a projection lifts to the common width."""

# Shapes: N ids, R rows of the table, D width of the table's vectors, W width of a block.

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from fullrank.embeddings.dimensions import equal_count_blocks, mixed_dimensions
from fullrank.embeddings.table import Ask, Part, Table, TableConfig
from fullrank.schema import OUT_OF_VOCABULARY_ID

# Width of the only block of a table of which nothing more is said.
DEFAULT_DIM = 4


class Block(NamedTuple):
    """A range of ids.

    Attributes:
        ids: how many.
        dim: width of their rows.
        parameters: numbers stored, projection included.
        projected: whether there is a projection.
    """

    ids: int
    dim: int
    parameters: int
    projected: bool


class MixedDimensionTable(Table):
    """e(i) = E_b[i - first_b] P_b for the block b of id i; a block as wide as the table has no projection.

    The blocks of a table are said by `dim`, one for all ids; by `dims` and `shares`; or by `temperature`: `num_blocks`
    ranges of ids with about equal training counts, as wide as the popularity rule says (`mixed_dimensions`).
    Vocabularies give the most frequent value the smallest id, so consecutive ids are blocks by popularity.

    Rows of a narrow block start with the plain table's standard deviation, its projection with columns of unit length
    in expectation, so that the entries of e(i) start alike in every block. Ids that came later are in the block of the
    out-of-vocabulary id, behind those that it had.

    Source: Ginart et al., Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems,
    ISIT 2021, arXiv 1909.11810.
    """

    class Config(TableConfig):
        """Attributes:
        dim: width of the only block; 4 if nothing else is said.
        dims: widths of the blocks, the most popular ids first; none above the width of the table.
        shares: of all ids, for each block but the last, which takes the rest.
        temperature: of the popularity rule: 0 makes all blocks as wide as the table, 1 as wide as they are popular.
        num_blocks: of a table with a temperature; there may be fewer if single ids have most of the counts.
        blocks: ids and training counts of each of them. Training writes it down.
        """

        written: ClassVar[tuple[str, ...]] = ("first_rows", "blocks")

        kind: Literal["mixed_dimension"] = "mixed_dimension"
        dim: PositiveInt | None = None
        dims: tuple[PositiveInt, ...] = ()
        shares: tuple[float, ...] = ()
        temperature: float | None = Field(default=None, ge=0, le=1)
        num_blocks: int = Field(default=4, ge=2)
        blocks: tuple[tuple[PositiveInt, NonNegativeInt], ...] | None = None

        @model_validator(mode="after")
        def _one_way(self) -> Self:
            ways = {"dim": self.dim, "dims": self.dims or None, "temperature": self.temperature}
            given = [name for name, value in ways.items() if value is not None]
            if len(given) > 1:
                raise ValueError(f"{' and '.join(given)} each say how wide the blocks are: give one of them")
            if len(self.shares) != len(self.widths) - 1 and (self.shares or self.dims):
                expected = max(len(self.widths) - 1, 0)
                raise ValueError(f"expected {expected} shares for {len(self.widths)} dims, got {self.shares}")
            if any(not 0 < share < 1 for share in self.shares) or sum(self.shares) >= 1:
                raise ValueError(f"expected shares above 0 whose sum is below 1, got {self.shares}")
            if self.blocks is not None and self.temperature is None:
                raise ValueError("blocks are those of a temperature, and there is none")
            return self

        @property
        def widths(self) -> tuple[int, ...]:
            """Of the blocks; none if a temperature is to say."""
            return self.dims or (() if self.temperature is not None else (self.dim or DEFAULT_DIM,))

        def fitted(self, counts: npt.NDArray[np.int64]) -> Self:
            if self.temperature is None or self.blocks is not None:
                return self
            sizes = equal_count_blocks(counts, self.num_blocks)
            ends = list(itertools.accumulate(sizes, initial=0))
            blocks = tuple((end - begin, int(counts[begin:end].sum())) for begin, end in itertools.pairwise(ends))
            return self.model_copy(update={"blocks": blocks})

    grows = True
    config: Config

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        sizes, dims = self._sizes(), self._dims()
        if max(dims) > width:
            raise ValueError(f"dims {dims} of a mixed_dimension table are above its width {width}")
        self.begins = [0, *itertools.accumulate(sizes)]
        if self.first_rows < rows:
            block = bisect_right(self.begins, OUT_OF_VOCABULARY_ID) - 1  # not the first one if that is very small
            self.later_begin = self.begins[block + 1]
            sizes[block] += rows - self.first_rows
            self.begins = [0, *itertools.accumulate(sizes)]
        self.parts = tuple(
            Part(f"block{block}", size, dim, init_std)
            for block, (size, dim) in enumerate(zip(sizes, dims, strict=True))
        )
        self.projections = nn.ParameterDict(
            {
                f"block{block}": nn.Parameter(torch.randn(dim, width) * dim**-0.5)
                for block, dim in enumerate(dims)
                if dim < width
            }
        )

    def _sizes(self) -> list[int]:
        """Ids of each block, of the first ones."""
        if self.config.temperature is None:
            sizes = [int(share * self.first_rows) for share in self.config.shares]
            return [*sizes, self.first_rows - sum(sizes)]
        if self.config.blocks is None:
            raise ValueError(
                "the blocks of a temperature come from the training counts of a vocabulary, as `fullrank train` takes "
                "them from a dataset: a model made by hand needs RankerSpec.fitted(encoders)"
            )
        sizes = [ids for ids, _ in self.config.blocks]
        if sum(sizes) != self.first_rows:
            raise ValueError(f"blocks {sizes} have {sum(sizes)} ids, and the table {self.first_rows}")
        return sizes

    def _dims(self) -> tuple[int, ...]:
        config = self.config
        if config.temperature is None or config.blocks is None:
            return config.widths
        sizes, popularity = zip(*((ids, count / ids) for ids, count in config.blocks), strict=True)
        return tuple(mixed_dimensions(sizes, self.width, popularity=popularity, temperature=config.temperature))

    @classmethod
    @torch.no_grad()
    def from_table(
        cls, table_RD: Tensor, dims: Sequence[int], shares: Sequence[float] = ()
    ) -> tuple[MixedDimensionTable, list[Tensor]]:
        """The table of these blocks that is nearest to a plain one, and the rows of its parts.

        Each block is the truncated singular value decomposition of its rows, which no other matrix of its rank is
        nearer to.

        Raises:
            ValueError: as the Config, or if a width is above that of the table.
        """
        rows, width = table_RD.shape
        table = cls(rows, width, 0.0, cls.Config(dims=tuple(dims), shares=tuple(shares)))
        blocks = []
        for part, rows_MD in zip(table.parts, torch.split(table_RD, [part.rows for part in table.parts]), strict=True):
            if part.width == width:
                blocks.append(rows_MD)
                continue
            left_MK, values_K, right_KD = torch.linalg.svd(rows_MD, full_matrices=False)
            rank = min(part.width, len(values_K))  # a block of fewer ids than its width
            rows_MW = rows_MD.new_zeros(part.rows, part.width)
            rows_MW[:, :rank] = left_MK[:, :rank] * values_K[:rank]
            table.projections[part.name].zero_()[:rank] = right_KD[:rank]
            blocks.append(rows_MW)
        return table, blocks

    def dimension_report(self) -> list[Block]:
        """What each block is and stores, the most popular ids first."""
        return [
            Block(
                part.rows,
                part.width,
                part.rows * part.width + (part.width * self.width if part.name in self.projections else 0),
                part.name in self.projections,
            )
            for part in self.parts
        ]

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
