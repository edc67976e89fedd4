"""From a whole catalogue to the few hundred or thousand items worth ranking."""

from fullrank.retrieval.base import NO_ITEM, Items, Retriever, SearchResult, item_keys
from fullrank.retrieval.filters import ItemFilter
from fullrank.retrieval.popularity import Popularity
from fullrank.retrieval.registry import RETRIEVERS, RetrieverSpec, register
from fullrank.retrieval.two_tower import TwoTower
from fullrank.retrieval.vector_retriever import VectorRetriever

__all__ = [
    "NO_ITEM",
    "RETRIEVERS",
    "ItemFilter",
    "Items",
    "Popularity",
    "Retriever",
    "RetrieverSpec",
    "SearchResult",
    "TwoTower",
    "VectorRetriever",
    "item_keys",
    "register",
]
