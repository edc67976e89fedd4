"""The plain table: a row for each id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fullrank.embeddings.table import Ask, Part, Table, TableConfig


class FullTable(Table):
    """e(i) = W[i]. What every table is that is not named otherwise."""

    class Config(TableConfig):
        kind: Literal["full"] = "full"

    grows = True

    def __init__(self, rows: int, width: int, init_std: float, config: TableConfig) -> None:
        super().__init__(rows, width, init_std, config)
        self.parts = (Part("", rows, width, init_std),)

    def asks(self, ids_N: Tensor) -> list[Ask]:
        return [Ask(0, ids_N)]

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        return vectors[0]
