"""Hashed tables: several ids have one row, and nothing tells them apart."""

# Shapes: N ids.

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fullrank.embeddings.table import Ask, Part, Table, TableConfig


class HashedTable(Table):
    """e(i) = W[i mod m] with m = ⌈rows / collisions⌉: the baseline of every table that saves memory.

    An id that came later has a row of its own.
    """

    class Config(TableConfig):
        """Attributes:
        collisions: ids that share a row. 4, if no rows are given.
        stored_rows: m instead.
        """

        kind: Literal["hash"] = "hash"
        collisions: int | None = Field(default=None, ge=1)
        stored_rows: int | None = Field(default=None, ge=1)

        @model_validator(mode="after")
        def _one_size(self) -> Self:
            if self.collisions is not None and self.stored_rows is not None:
                raise ValueError("expected one of collisions, stored_rows, got both")
            return self

    grows = True
    config: Config

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        self.modulus = config.stored_rows or -(-self.first_rows // (config.collisions or 4))
        self.parts = (Part("rows", self.modulus + rows - self.first_rows, width, init_std),)

    def asks(self, ids_N: Tensor) -> list[Ask]:
        own_N = self.modulus + ids_N - self.first_rows
        return [Ask(0, torch.where(ids_N < self.first_rows, ids_N % self.modulus, own_N))]

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        return vectors[0]
