"""Logistic regression: z = b + Σ w_i x_i."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.layers.linear_term import LinearTerm
from fullrank.models.base import Ranker, RankerOutput, stacked
from fullrank.schema import Schema


class LR(Ranker):
    """One linear model per task."""

    name = "lr"
    source = "Logistic regression with one weight per id"

    def __init__(self, schema: Schema, config: Ranker.Config) -> None:
        super().__init__(schema, config)
        self.terms = nn.ModuleList(LinearTerm(schema, config.embeddings, bias=True) for _ in range(self.num_tasks))

    def output_biases(self) -> list[Tensor]:
        return [term.bias for term in cast(Iterable[LinearTerm], self.terms) if term.bias is not None]

    def forward(self, batch: Batch) -> RankerOutput:
        return RankerOutput(stacked([term(batch) for term in self.terms]))
