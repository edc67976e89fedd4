"""A hierarchical index of items, and what is searched through it."""

from fullrank.retrieval.hierarchy.health import Audit, Health
from fullrank.retrieval.hierarchy.index import HierarchicalIndex, StaleIndexError
from fullrank.retrieval.hierarchy.scorer import DotProduct, Scorer
from fullrank.retrieval.hierarchy.searching import IndexResult, SearchStats

__all__ = [
    "Audit",
    "DotProduct",
    "Health",
    "HierarchicalIndex",
    "IndexResult",
    "Scorer",
    "SearchStats",
    "StaleIndexError",
]
