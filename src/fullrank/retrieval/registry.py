"""The retrievers by name, and how funnels name one."""

from __future__ import annotations

from typing import Any, ClassVar

from fullrank.registry import Registry, Spec
from fullrank.retrieval.base import Retriever
from fullrank.schema import Schema

RETRIEVERS: Registry[type[Retriever]] = Registry(
    "retriever",
    "fullrank.retrievers",
    {
        "two_tower": "fullrank.retrieval.two_tower:TwoTower",
        "popularity": "fullrank.retrieval.popularity:Popularity",
        "monn": "fullrank.retrieval.hierarchy.hsnn:MoNNRetriever",
        "hsnn": "fullrank.retrieval.hierarchy.hsnn:HSNN",
        "mf_bpr": "fullrank.retrieval.implicit.mf_bpr:MatrixFactorization",
        "simplex": "fullrank.retrieval.implicit.simplex:SimpleX",
        "lightgcn": "fullrank.retrieval.implicit.lightgcn:LightGCN",
        "graph_filter": "fullrank.retrieval.implicit.graph_filter:GraphFilter",
        "graph_blend": "fullrank.retrieval.implicit.graph_blend:GraphBlend",
    },
)


def register(retriever: type[Retriever]) -> type[Retriever]:
    """List a retriever under its `name`, so that recipes can ask for it and what is saved of it can be loaded.

    Usable as a decorator. A package lists its retrievers for good by entry points of the group `fullrank.retrievers`.

    Raises:
        ValueError: if the class has no name, or another retriever has it.
    """
    return RETRIEVERS.register_class(retriever)


class RetrieverSpec(Spec):
    """A retriever's name and Config: `{name: two_tower, output_dim: 64}`."""

    registry: ClassVar[Registry[Any]] = RETRIEVERS

    config: Retriever.Config

    def build(self, schema: Schema) -> Retriever:
        """The retriever for a fitted schema, not fitted itself.

        Raises:
            ValueError: if the schema lacks what the retriever needs.
        """
        return RETRIEVERS[self.name](schema, self.config)
