"""A kind of table for comparison: an id's row is a hash of it, and ids share rows as chance will have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fullrank.data.hashing import splitmix
from fullrank.embeddings import Ask, Part, Table, TableConfig, register

# Shapes: N ids.


@register
class RandomHash(Table):
    """e(i) = W[h(i) mod H]."""

    class Config(TableConfig):
        kind: Literal["random_hash"] = "random_hash"
        stored_rows: int = 1000

    config: Config

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        self.parts = (Part("rows", config.stored_rows, width, init_std),)

    def asks(self, ids_N: Tensor) -> list[Ask]:
        hashed = splitmix(ids_N.numpy().astype("uint64")) % self.config.stored_rows
        return [Ask(0, torch.from_numpy(hashed.astype("int64")))]

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        return vectors[0]
