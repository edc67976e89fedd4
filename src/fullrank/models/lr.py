"""Logistic regression: z = b + Σ w_i x_i."""

from __future__ import annotations

from torch import Tensor

from fullrank.batch import Batch
from fullrank.layers.linear_term import LinearTerms
from fullrank.models.base import Ranker, RankerOutput
from fullrank.schema import Schema


class LR(Ranker):
    """One linear model per task."""

    name = "lr"
    source = "Logistic regression with one weight per id"

    def __init__(self, schema: Schema, config: Ranker.Config) -> None:
        super().__init__(schema, config)
        self.terms = LinearTerms(schema, config.embeddings, bias=True)

    def output_biases(self) -> list[Tensor]:
        return self.terms.biases

    def forward(self, batch: Batch) -> RankerOutput:
        return RankerOutput(self.terms(batch).float())
