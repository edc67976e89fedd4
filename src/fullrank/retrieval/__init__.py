"""From a whole catalogue to the few hundred or thousand items worth ranking."""

from fullrank.retrieval.base import Items, Retriever, SearchResult, item_keys
from fullrank.retrieval.popularity import Popularity
from fullrank.retrieval.two_tower import TwoTower

RETRIEVERS: dict[str, type[Popularity] | type[TwoTower]] = {kind.name: kind for kind in (TwoTower, Popularity)}

__all__ = ["RETRIEVERS", "Items", "Popularity", "Retriever", "SearchResult", "TwoTower", "item_keys"]
