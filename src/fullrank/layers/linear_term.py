"""First-order part of factorisation-machine-like models."""

# Shapes: B rows, N components of the numbers' codes.

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, Tables
from fullrank.layers.numbers import NumberCodes
from fullrank.schema import Schema, Sequence


class LinearTerm(nn.Module):
    """One weight per id and per component of a number's code: z = Σ w_i x_i, plus a bias if asked for.

    Bags and sequences contribute the mean (or sum) of their ids' weights. Tables are plain, whatever their kind in the
    rest of the model.
    """

    def __init__(self, schema: Schema, tables: Tables, *, bias: bool) -> None:
        super().__init__()
        self.weights = EmbeddingCollection(_without_widths(schema), tables.of_width(1), pool_sequences=True)
        self.codes = NumberCodes(schema)
        self.numeric_N = nn.Parameter(torch.zeros(self.codes.width))
        self.bias = nn.Parameter(torch.zeros(())) if bias else None

    def forward(self, batch: Batch) -> Tensor:
        """Logits of shape (B,)."""
        logits_B: Tensor = self.weights(batch).flat.sum(1)
        if self.numeric_N.numel():
            logits_B = logits_B + self.codes(batch) @ self.numeric_N
        return logits_B if self.bias is None else logits_B + self.bias


class LinearTerms(nn.ModuleList):
    """One `LinearTerm` per task."""

    def __init__(self, schema: Schema, tables: Tables, *, bias: bool) -> None:
        super().__init__(LinearTerm(schema, tables, bias=bias) for _ in schema.labels)

    @property
    def biases(self) -> list[Tensor]:
        """Of the tasks, in order."""
        return [term.bias for term in self if isinstance(term, LinearTerm) and term.bias is not None]

    def forward(self, batch: Batch) -> Tensor:
        """logits_BT."""
        return torch.stack([term(batch) for term in self], 1)


def _without_widths(schema: Schema) -> Schema:
    def plain(feature: object) -> object:
        if isinstance(feature, Sequence):
            return feature.model_copy(update={"fields": tuple(plain(part) for part in feature.fields)})
        if hasattr(feature, "embedding_dim"):
            return feature.model_copy(update={"embedding_dim": None})  # type: ignore[attr-defined]
        return feature

    return schema.model_copy(update={"features": tuple(plain(feature) for feature in schema.features)})
