"""Factorisation machine: z = b + Σ w_i x_i + Σ_{i<j} <e_i, e_j>."""

from __future__ import annotations

from torch import Tensor

from fullrank.batch import Batch
from fullrank.layers.factorization import pairwise_term
from fullrank.layers.linear_term import LinearTerm
from fullrank.layers.tokens import FeatureTokens
from fullrank.models.base import Ranker, RankerOutput, stacked
from fullrank.schema import Schema


class FM(Ranker):
    """Single-task."""

    name = "fm"
    source = "Rendle, Factorization Machines, ICDM 2010"

    def __init__(self, schema: Schema, config: Ranker.Config) -> None:
        super().__init__(schema, config)
        self.require_single_task()
        self.linear = LinearTerm(schema, config.embeddings, bias=True)
        self.tokens = FeatureTokens(schema, config.embeddings)

    def output_biases(self) -> list[Tensor]:
        return [] if self.linear.bias is None else [self.linear.bias]

    def forward(self, batch: Batch) -> RankerOutput:
        return RankerOutput(stacked([self.linear(batch) + pairwise_term(self.tokens(batch))]))
