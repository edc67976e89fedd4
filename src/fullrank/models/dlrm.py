"""DLRM: numbers through a bottom MLP to one token, dot products of all pairs of tokens, top MLP."""

# Shapes: B rows, F tokens, D width, P = F(F-1)/2 pairs.

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection
from fullrank.layers.mlp import MLP
from fullrank.layers.numbers import NumberCodes
from fullrank.models.base import BatchNorm, Dropout, Hidden, Ranker, RankerOutput
from fullrank.schema import Schema


class DLRM(Ranker):
    """Deep learning recommendation model.

    Deviation: the bottom MLP ends in its activation, as in the paper's code; `interaction: cat` replaces the dot
    products by the tokens themselves, which is what the BARS leaderboard ran under this name.
    """

    name = "dlrm"
    source = "Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            interaction: dot products of all pairs of tokens, or the tokens themselves.
            bottom_hidden: widths of the MLP that makes a token of all numbers.
            hidden: widths of the top MLP.
        """

        interaction: Literal["dot", "cat"] = "dot"
        bottom_hidden: Hidden = (256, 128)
        hidden: Hidden = (256, 128, 64)
        batch_norm: BatchNorm = False
        dropout: Dropout = 0.0

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        width = config.embedding_dim
        self.embeddings = EmbeddingCollection(schema, config.embeddings, pool_sequences=True)
        numbers = len(schema.numeric_columns)
        self.numbers = NumberCodes(schema)
        self.bottom = MLP(self.numbers.width, (*config.bottom_hidden, width)) if numbers else None
        tokens = len(self.embeddings.widths) + (1 if numbers else 0)
        if tokens == 0 or (config.interaction == "dot" and tokens < 2):
            raise ValueError("DLRM needs at least two features to take dot products of")
        row, column = torch.triu_indices(tokens, tokens, offset=1)
        self.register_buffer("pairs", row * tokens + column, persistent=False)
        top = tokens * (tokens - 1) // 2 + (width if numbers else 0)
        self.top = MLP(
            top if config.interaction == "dot" else tokens * width,
            config.hidden,
            self.num_tasks,
            batch_norm=config.batch_norm,
            dropout=config.dropout,
        )

    def output_biases(self) -> list[Tensor]:
        return [self.top.output_bias]

    def forward(self, batch: Batch) -> RankerOutput:
        embedded = self.embeddings(batch)
        numbers_BD = None if self.bottom is None else self.bottom(self.numbers(batch)).float()
        parts = [] if numbers_BD is None else [numbers_BD[:, None]]
        if embedded.widths:
            parts.append(embedded.tokens_BFD)
        tokens_BFD = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if self.config.interaction == "cat":
            return RankerOutput(self.top(tokens_BFD.flatten(1)))
        dots_BFF = torch.bmm(tokens_BFD, tokens_BFD.transpose(1, 2))
        dots_BP = dots_BFF.flatten(1).index_select(1, self.get_buffer("pairs")).float()
        return RankerOutput(self.top(dots_BP if numbers_BD is None else torch.cat([numbers_BD, dots_BP], 1)))
