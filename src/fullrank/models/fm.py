"""Factorisation machine: z = b + Σ w_i x_i + Σ_{i<j} <e_i, e_j>."""

from __future__ import annotations

from torch import Tensor

from fullrank.batch import Batch
from fullrank.layers.factorization import PairwiseTerm
from fullrank.layers.linear_term import LinearTerms
from fullrank.layers.tokens import FeatureTokens
from fullrank.models.base import Ranker, RankerOutput
from fullrank.schema import Schema


class FM(Ranker):
    """Tasks share the vectors e_i and have their own w, b and weights of the dimensions (`PairwiseTerm`)."""

    name = "fm"
    source = "Rendle, Factorization Machines, ICDM 2010"

    def __init__(self, schema: Schema, config: Ranker.Config) -> None:
        super().__init__(schema, config)
        self.linear = LinearTerms(schema, config.embeddings, bias=True)
        self.tokens = FeatureTokens(schema, config.embeddings)
        self.pairs = PairwiseTerm(config.embedding_dim, self.num_tasks)

    def output_biases(self) -> list[Tensor]:
        return self.linear.biases

    def forward(self, batch: Batch) -> RankerOutput:
        return RankerOutput((self.linear(batch) + self.pairs(self.tokens(batch))).float())
