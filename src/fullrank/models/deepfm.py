"""DeepFM: a factorisation machine and an MLP on the same embeddings, logits added."""

from __future__ import annotations

from torch import Tensor

from fullrank.batch import Batch
from fullrank.layers.factorization import pairwise_term
from fullrank.layers.linear_term import LinearTerm
from fullrank.layers.mlp import MLP
from fullrank.layers.tokens import FeatureTokens
from fullrank.models.base import Dropout, Hidden, Ranker, RankerOutput, stacked
from fullrank.schema import Schema


class DeepFM(Ranker):
    """z = Σ w_i x_i + Σ_{i<j} <e_i, e_j> + MLP(e); single-task."""

    name = "deepfm"
    source = "Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, IJCAI 2017"

    class Config(Ranker.Config):
        hidden: Hidden = (256, 128, 64)
        batch_norm: bool = False
        dropout: Dropout = 0.0

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.require_single_task()
        self.linear = LinearTerm(schema, config.embeddings, bias=False)
        self.tokens = FeatureTokens(schema, config.embeddings)
        width = self.tokens.num_tokens * config.embedding_dim
        self.mlp = MLP(width, config.hidden, 1, batch_norm=config.batch_norm, dropout=config.dropout)

    def output_biases(self) -> list[Tensor]:
        return [self.mlp.output_bias]

    def forward(self, batch: Batch) -> RankerOutput:
        tokens_BFD = self.tokens(batch)
        deep_B1 = self.mlp(tokens_BFD.flatten(1))
        return RankerOutput(stacked([self.linear(batch) + pairwise_term(tokens_BFD) + deep_B1.squeeze(1)]))
