"""A row for each id, and a row for ids never seen that has learnt what an unknown id is like."""

# Shapes: N ids, D width.

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fullrank.embeddings.table import Ask, Part, Table, TableConfig
from fullrank.schema import OUT_OF_VOCABULARY_ID


class IndividualTable(Table):
    """e(i) = W[i]; while training, a random share of the ids is taken for the out-of-vocabulary one.

    A vocabulary of training rows has no unknown values in these rows, so that in a plain table the row of unknown ids
    stays what it started as. Here it becomes the mean of what ids are like.
    """

    class Config(TableConfig):
        """Attributes:
        unknown_share: share of the ids that a training step does not know.
        """

        kind: Literal["individual"] = "individual"
        unknown_share: float = Field(default=0.01, ge=0, lt=1)

    grows = True
    config: Config

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        self.parts = (Part("rows", rows, width, init_std),)

    def asks(self, ids_N: Tensor) -> list[Ask]:
        if self.training and self.config.unknown_share:
            known_N = torch.rand(ids_N.shape, device=ids_N.device) >= self.config.unknown_share
            ids_N = torch.where(known_N | (ids_N < OUT_OF_VOCABULARY_ID), ids_N, OUT_OF_VOCABULARY_ID)
        return [Ask(0, ids_N)]

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        return vectors[0]
