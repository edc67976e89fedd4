"""The features of a batch as vectors: one token each, or side by side."""

# Shapes: B rows, F tokens (ids, bags, pooled sequences, numbers), D width, N numeric columns.

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection
from fullrank.schema import Schema


class NumberVectors(nn.Module):
    """x·v for each number x, with a learned vector v that starts as small as an embedding row does."""

    def __init__(self, schema: Schema, embedding_dim: int, init_std: float) -> None:
        super().__init__()
        self.weight_ND = nn.Parameter(torch.randn(len(schema.numeric_columns), embedding_dim) * init_std)

    def forward(self, batch: Batch) -> Tensor:
        """Shape (B, N, D)."""
        return batch.numeric_BN[:, :, None] * self.weight_ND


class FeatureTokens(nn.Module):
    """Every feature as a vector of one width: ids, bags and mean-pooled sequences first, then numbers."""

    def __init__(self, schema: Schema, embedding_dim: int, init_std: float) -> None:
        super().__init__()
        self.ids = EmbeddingCollection(schema, embedding_dim=embedding_dim, init_std=init_std, pool_sequences=True)
        self.numbers = NumberVectors(schema, embedding_dim, init_std)
        self.num_tokens = len(self.ids.widths) + len(schema.numeric_columns)
        if self.num_tokens == 0:
            raise ValueError("the schema has no features")

    def forward(self, batch: Batch) -> Tensor:
        """tokens_BFD."""
        parts = [self.ids(batch).tokens_BFD] if self.ids.widths else []
        if batch.numeric_BN.shape[1]:
            parts.append(self.numbers(batch))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class FlatFeatures(nn.Module):
    """The vectors of all features side by side, in the order of `FeatureTokens`; widths of tables may differ."""

    def __init__(self, schema: Schema, embedding_dim: int, init_std: float) -> None:
        super().__init__()
        self.ids = EmbeddingCollection(schema, embedding_dim=embedding_dim, init_std=init_std, pool_sequences=True)
        self.numbers = NumberVectors(schema, embedding_dim, init_std)
        self.width = self.ids.flat_dim + len(schema.numeric_columns) * embedding_dim
        if self.width == 0:
            raise ValueError("the schema has no features")

    def forward(self, batch: Batch) -> Tensor:
        """Shape (B, width)."""
        flat: Tensor = self.ids(batch).flat
        return torch.cat([flat, self.numbers(batch).flatten(1)], 1) if batch.numeric_BN.shape[1] else flat
