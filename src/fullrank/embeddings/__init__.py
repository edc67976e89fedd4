"""Ids to vectors."""

from fullrank.embeddings.collection import EmbeddingCollection
from fullrank.embeddings.embedded import Embedded
from fullrank.embeddings.optimizer import EmbeddingOptimizer
from fullrank.embeddings.partitions import complementary_partitions, is_complementary
from fullrank.embeddings.table import TABLE_KINDS, AnyTable, Ask, Part, Table, TableConfig, Tables, register

__all__ = [
    "TABLE_KINDS",
    "AnyTable",
    "Ask",
    "Embedded",
    "EmbeddingCollection",
    "EmbeddingOptimizer",
    "Part",
    "Table",
    "TableConfig",
    "Tables",
    "complementary_partitions",
    "is_complementary",
    "register",
]
