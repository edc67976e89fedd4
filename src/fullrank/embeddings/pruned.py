"""A plain table without the rows of some ids, as `fullrank prune` makes it."""

# Shapes: R ids of the table, N ids looked up, M of them that have a row, D width.

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fullrank.embeddings.table import Ask, Part, Table, TableConfig

DROPPED = -1


class PrunedTable(Table):
    """e(i) = W[remap[i]], or zeros if remap[i] is -1.

    A dropped id has the zero vector, which adds nothing to a sum and counts in a mean, and not that of unknown values:
    so a lookup is one in the full table with the dropped rows set to zero.

    Attributes:
        remap_R: int32, the row of each id. In the state of the model; until it is set the first ids have the rows,
            which are the frequent ones where a vocabulary orders them.
    """

    class Config(TableConfig):
        """Attributes:
        kept_rows: rows that are stored.
        """

        kind: Literal["pruned"] = "pruned"
        kept_rows: int = Field(ge=1)

    config: Config
    remap_R: Tensor

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        if config.kept_rows > rows:
            raise ValueError(f"kept_rows is {config.kept_rows}, and the table has {rows} rows")
        self.parts = (Part("rows", config.kept_rows, width, init_std),)
        ids_R = torch.arange(rows, dtype=torch.int32)
        self.register_buffer("remap_R", ids_R.masked_fill(ids_R >= config.kept_rows, DROPPED))
        self.register_load_state_dict_post_hook(lambda table, _: table.check())  # type: ignore[no-untyped-call]

    def check(self) -> None:
        """Raises:
        ValueError: if an id has a row that is not stored.
        """
        low, high = torch.aminmax(self.remap_R)
        if int(low) < DROPPED or int(high) >= self.config.kept_rows:
            raise ValueError(
                f"the remap of a pruned table has rows {int(low)} to {int(high)}, expected {DROPPED} to "
                f"{self.config.kept_rows - 1}"
            )

    def asks(self, ids_N: Tensor) -> list[Ask]:
        rows_N = self.remap_R.index_select(0, ids_N).long()
        of_M = (rows_N >= 0).nonzero().squeeze(1)
        return [Ask(0, rows_N[of_M], of_M)]

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        (ask,) = asks
        assert ask.of is not None
        return vectors[0].new_zeros(ids_N.numel(), self.width).index_copy(0, ask.of, vectors[0])
