"""Retrievers whose score is an inner product: vectors of users and items, and an index of the latter."""

# Shapes: B users, I items, D width of vectors, A items that may be returned.

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from fullrank.batch import Batch
from fullrank.retrieval.base import Items, Retriever, SearchResult
from fullrank.retrieval.exact import ExactIndex
from fullrank.schema import Schema


class VectorRetriever(Retriever):
    """Score = inner product of a user's and an item's vector, both of `width`.

    A subclass has `fit`, `width`, `user_vectors` and `item_vectors`. What it learns it adds to `state` and takes back
    in `restore`; the index is in both already. A bias of an item is one more number of its vector, and a 1 of the
    user's.

    Attributes:
        vectors: the index of the items' vectors.
    """

    filters = True

    def __init__(self, schema: Schema, config: Retriever.Config | None = None) -> None:
        super().__init__(schema, config)
        self.vectors = self._empty()

    def _empty(self) -> ExactIndex:
        return ExactIndex(self.width)

    @property
    @abstractmethod
    def width(self) -> int:
        """D. It follows from the schema and the config, as it is asked for before anything is learnt."""

    @abstractmethod
    def user_vectors(self, users: Batch) -> Tensor:
        """Queries, float32 of shape (B, D), without gradients."""

    @abstractmethod
    def item_vectors(self, items: Batch) -> Tensor:
        """What the index holds, float32 of shape (I, D), without gradients."""

    def index(self, items: Items) -> None:
        fresh = self._empty()
        fresh.add(items.keys_I, self.item_vectors(items.features))
        self.vectors = fresh

    def add(self, items: Items) -> None:
        self.vectors.add(items.keys_I, self.item_vectors(items.features))

    def remove(self, keys: Tensor) -> None:
        self.vectors.remove(keys)

    def search(self, users: Batch, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        return self.vectors.search(self.user_vectors(users), k, allowed=allowed)

    def cost(self) -> int:
        return len(self.vectors)

    def state(self) -> dict[str, Tensor]:
        return {"index.keys": self.vectors.keys_I, "index.vectors": self.vectors.vectors_ID.contiguous()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.vectors.add(state["index.keys"], state["index.vectors"])
