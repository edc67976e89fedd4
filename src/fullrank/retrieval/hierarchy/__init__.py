"""A hierarchical index of items, and what is searched through it."""

from fullrank.retrieval.hierarchy.coded import IVFIndex
from fullrank.retrieval.hierarchy.health import Audit, Health
from fullrank.retrieval.hierarchy.index import HierarchicalIndex
from fullrank.retrieval.hierarchy.scorer import DotProduct, Scorer
from fullrank.retrieval.hierarchy.searching import IndexResult, SearchStats
from fullrank.retrieval.hierarchy.snapshot import Selection, StaleIndexError
from fullrank.retrieval.hierarchy.streaming_vq import StreamingVQ
from fullrank.retrieval.hierarchy.tree import TreeIndex

__all__ = [
    "Audit",
    "DotProduct",
    "Health",
    "HierarchicalIndex",
    "IVFIndex",
    "IndexResult",
    "Scorer",
    "SearchStats",
    "Selection",
    "StaleIndexError",
    "StreamingVQ",
    "TreeIndex",
]
