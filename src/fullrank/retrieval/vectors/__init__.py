"""Indexes of vectors: the largest inner products with a query, exactly or nearly, under additions and removals."""

from fullrank.retrieval.vectors.base import VectorIndex
from fullrank.retrieval.vectors.registry import VECTOR_INDEXES, VectorIndexSpec, register_index

__all__ = ["VECTOR_INDEXES", "VectorIndex", "VectorIndexSpec", "register_index"]
