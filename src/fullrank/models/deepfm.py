"""DeepFM: a factorisation machine and an MLP on the same embeddings, logits added."""

from __future__ import annotations

from torch import Tensor

from fullrank.batch import Batch
from fullrank.layers.factorization import PairwiseTerm
from fullrank.layers.linear_term import LinearTerms
from fullrank.layers.mlp import MLP
from fullrank.layers.tokens import FeatureTokens
from fullrank.models.base import BatchNorm, Dropout, Hidden, Ranker, RankerOutput
from fullrank.schema import Schema


class DeepFM(Ranker):
    """z = Σ w_i x_i + Σ_{i<j} <e_i, e_j> + MLP(e); tasks share the vectors e_i and the MLP up to its last layer."""

    name = "deepfm"
    source = "Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, IJCAI 2017"

    class Config(Ranker.Config):
        hidden: Hidden = (256, 128, 64)
        batch_norm: BatchNorm = False
        dropout: Dropout = 0.0

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.linear = LinearTerms(schema, config.embeddings, bias=False)
        self.tokens = FeatureTokens(schema, config.embeddings)
        self.pairs = PairwiseTerm(config.embedding_dim, self.num_tasks)
        width = self.tokens.num_tokens * config.embedding_dim
        self.mlp = MLP(width, config.hidden, self.num_tasks, batch_norm=config.batch_norm, dropout=config.dropout)

    def output_biases(self) -> list[Tensor]:
        return [self.mlp.output_bias]

    def forward(self, batch: Batch) -> RankerOutput:
        tokens_BFD = self.tokens(batch)
        deep_BT = self.mlp(tokens_BFD.flatten(1))
        return RankerOutput((self.linear(batch) + self.pairs(tokens_BFD) + deep_BT).float())
