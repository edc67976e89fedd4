"""Retrievers whose score is an inner product: vectors of users and items, and an index of the latter."""

# Shapes: B users, I items, D width of vectors, A items that may be returned, Q typical users.

from __future__ import annotations

import copy
from abc import abstractmethod
from pathlib import Path
from typing import Self

from pydantic import Field
from torch import Tensor

from fullrank.batch import Batch
from fullrank.retrieval.base import Items, Retriever, SearchResult
from fullrank.retrieval.vectors import VectorIndex, VectorIndexSpec
from fullrank.schema import Schema


class VectorRetriever(Retriever):
    """Score = inner product of a user's and an item's vector, both of `width`.

    A subclass has `fit`, `width`, `user_vectors` and `item_vectors`. What it learns it adds to `state` and takes back
    in `restore`; the index is in both already. A bias of an item is one more number of its vector, and a 1 of the
    user's.

    Attributes:
        vectors: the index of the items' vectors.
        typical_QD: vectors of some users, by which an approximate index chooses how hard to search; `fit` may set it.
    """

    class Config(Retriever.Config):
        """Hyper-parameters of a retriever by inner products.

        Attributes:
            index: what searches the vectors, by name with its fields: `exact` scores all of them.
        """

        index: VectorIndexSpec = Field(default_factory=lambda: VectorIndexSpec.of("exact"))

    filters = True
    config: Config

    def __init__(self, schema: Schema, config: Config | None = None) -> None:
        super().__init__(schema, config)
        self.typical_QD: Tensor | None = None
        self.vectors = self._empty()

    def _empty(self) -> VectorIndex:
        index = self.config.index.build(self.width)
        index.typical_QD = self.typical_QD
        return index

    @property
    @abstractmethod
    def width(self) -> int:
        """D. It follows from the schema and the config, as it is asked for before anything is learnt."""

    @abstractmethod
    def user_vectors(self, users: Batch) -> Tensor:
        """Queries, float32 of shape (B, D), without gradients."""

    @abstractmethod
    def item_vectors(self, items: Batch) -> Tensor:
        """Vectors of items by their features, float32 of shape (I, D), without gradients."""

    def index_vectors(self, items: Items) -> Tensor:
        """What the index holds, float32 of shape (I, D): `item_vectors`, and what is known of an item by its key."""
        return self.item_vectors(items.features)

    def index(self, items: Items) -> None:
        fresh = self._empty()
        fresh.add(items.keys_I, self.index_vectors(items))
        self.vectors = fresh

    def add(self, items: Items) -> None:
        self.vectors.add(items.keys_I, self.index_vectors(items))

    def remove(self, keys: Tensor) -> None:
        self.vectors.remove(keys)

    def fork(self) -> Self:
        vectors = self.vectors.fork()
        if vectors is self.vectors:
            return self
        other = copy.copy(self)
        other.vectors = vectors
        return other

    def search(self, users: Batch, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        return self.vectors.search(self.user_vectors(users), k, allowed=allowed)

    def cost(self) -> int:
        return self.vectors.cost()

    def state(self) -> dict[str, Tensor]:
        return {f"index.{name}": value for name, value in self.vectors.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        index = {name.removeprefix("index."): value for name, value in state.items() if name.startswith("index.")}
        self.vectors.arrays = self.arrays
        self.vectors.restore(index)
        self.typical_QD = self.vectors.typical_QD

    def write_arrays(self, directory: Path) -> None:
        self.vectors.write_arrays(directory)
