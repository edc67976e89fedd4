"""Ids to vectors."""

from fullrank.embeddings.collection import Embedded, EmbeddingCollection
from fullrank.embeddings.optimizer import EmbeddingOptimizer

__all__ = ["Embedded", "EmbeddingCollection", "EmbeddingOptimizer"]
