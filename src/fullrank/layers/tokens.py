"""The features of a batch as vectors: one token each, or side by side."""

# Shapes: B rows, F tokens (ids, bags, pooled sequences, numbers), D width, N numeric columns.

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, Tables
from fullrank.layers.mlp import MLP
from fullrank.layers.numbers import SCALAR_START, NumberCodes, NumberVectors
from fullrank.schema import Schema


class NumberTokens(nn.Module):
    """The codes of all numbers together through an MLP to a few tokens."""

    def __init__(self, schema: Schema, tables: Tables, num_tokens: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.width = tables.embedding_dim
        self.codes = NumberCodes(schema)
        self.mlp = MLP(self.codes.width, hidden)
        self.out = nn.Linear(self.mlp.out_features, num_tokens * self.width)
        nn.init.normal_(self.out.weight, std=SCALAR_START)
        nn.init.zeros_(self.out.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Shape (B, num_tokens, D)."""
        tokens: Tensor = self.out(self.mlp(self.codes(batch))).float()
        return tokens.view(len(tokens), -1, self.width)


class FeatureTokens(nn.Module):
    """Every feature as a vector of one width: ids, bags and mean-pooled sequences first, then numbers.

    Args:
        number_tokens: how many tokens all numbers together give, through an MLP; 0 for one token per number.
        number_hidden: hidden widths of that MLP.
    """

    def __init__(
        self,
        schema: Schema,
        tables: Tables,
        *,
        number_tokens: int = 0,
        number_hidden: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.ids = EmbeddingCollection(schema, tables, pool_sequences=True)
        numbers = len(schema.numeric_columns)
        together = number_tokens > 0 and numbers > 0
        self.numbers: NumberVectors | NumberTokens = (
            NumberTokens(schema, tables, number_tokens, number_hidden) if together else NumberVectors(schema, tables)
        )
        self.num_tokens = len(self.ids.widths) + (number_tokens if together else numbers)
        if self.num_tokens == 0:
            raise ValueError("the schema has no features")
        for name, width in zip(self.ids.token_columns, self.ids.widths, strict=True):
            if width != tables.embedding_dim:
                raise ValueError(
                    f'this model needs one embedding width for all features: "{name}" has embedding_dim {width}, '
                    f"expected {tables.embedding_dim}"
                )

    def forward(self, batch: Batch) -> Tensor:
        """tokens_BFD."""
        parts = [self.ids(batch).tokens_BFD] if self.ids.widths else []
        if batch.numeric_BN.shape[1]:
            parts.append(self.numbers(batch))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class FlatFeatures(nn.Module):
    """The vectors of all features side by side, in the order of `FeatureTokens`; widths of tables may differ."""

    def __init__(self, schema: Schema, tables: Tables) -> None:
        super().__init__()
        self.ids = EmbeddingCollection(schema, tables, pool_sequences=True)
        self.numbers = NumberVectors(schema, tables)
        self.width = self.ids.flat_dim + len(schema.numeric_columns) * tables.embedding_dim
        if self.width == 0:
            raise ValueError("the schema has no features")

    def forward(self, batch: Batch) -> Tensor:
        """Shape (B, width)."""
        flat: Tensor = self.ids(batch).flat
        return torch.cat([flat, self.numbers(batch).flatten(1)], 1) if batch.numeric_BN.shape[1] else flat
