"""Indexes of vectors that find the codes of items themselves."""

# Shapes: I items, D width, K clusters, B queries.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fullrank.embeddings.semantic_id.quantizer import assigned
from fullrank.embeddings.semantic_id.rq_kmeans import ITERATIONS, k_means
from fullrank.retrieval.hierarchy.index import HierarchicalIndex
from fullrank.retrieval.hierarchy.scorer import DotProduct
from fullrank.retrieval.hierarchy.searching import IndexResult
from fullrank.retrieval.hierarchy.snapshot import Selection
from fullrank.retrieval.hierarchy.storage import checked_items

# Vectors for each cluster, chosen at random, that are enough to find it.
POINTS_PER_CLUSTER = 64


class CodedIndex(ABC):
    """A `HierarchicalIndex` of vectors, searched by their inner product.

    Attributes:
        index: where the items are; other scorers, audits and health are there.
    """

    index: HierarchicalIndex

    @abstractmethod
    def codes(self, vectors_ID: Tensor) -> Tensor:
        """The leaf of each vector, as codes (I, N)."""

    def __len__(self) -> int:
        return len(self.index)

    def add(self, keys_I: Tensor, vectors_ID: Tensor) -> None:
        """See `HierarchicalIndex.add`."""
        self.index.add(keys_I, vectors_ID, self._codes(keys_I, vectors_ID))

    def update(self, keys_I: Tensor, vectors_ID: Tensor) -> None:
        """See `HierarchicalIndex.update`."""
        self.index.update(keys_I, vectors_ID, self._codes(keys_I, vectors_ID))

    def remove(self, keys_A: Tensor) -> None:
        """See `HierarchicalIndex.remove`."""
        self.index.remove(keys_A)

    def search(
        self, queries_BD: Tensor, k: int, beam: Sequence[int], *, allowed: Tensor | Selection | None = None
    ) -> IndexResult:
        """See `HierarchicalIndex.search`."""
        return self.index.search(DotProduct(self.index.width), queries_BD, k, beam, allowed=allowed)

    def _codes(self, keys_I: Tensor, vectors_ID: Tensor) -> Tensor:
        return self.codes(checked_items(keys_I, vectors_ID, self.index.width))


class IVFIndex(CodedIndex):
    """One level of clusters by k-means; an item is in the nearest: an inverted file."""

    def __init__(self, index: HierarchicalIndex, centres_KD: Tensor) -> None:
        self.index, self.centres_KD = index, centres_KD

    @classmethod
    def build(
        cls, keys_I: Tensor, vectors_ID: Tensor, clusters: int, *, seed: int = 0, iterations: int = ITERATIONS
    ) -> IVFIndex:
        """Raises:
        ValueError: as `HierarchicalIndex.build`.
        """
        vectors_ID = checked_items(keys_I, vectors_ID, vectors_ID.shape[-1])
        centres_KD = clustered(vectors_ID, clusters, seed, iterations)
        index = HierarchicalIndex.build(
            keys_I,
            vectors_ID,
            assigned(vectors_ID, centres_KD)[1][:, None],
            num_nodes=(clusters,),
            node_vectors=[centres_KD],
        )
        return cls(index, centres_KD)

    def codes(self, vectors_ID: Tensor) -> Tensor:
        return assigned(vectors_ID, self.centres_KD)[1][:, None]

    def retrain(self, *, seed: int = 0, iterations: int = ITERATIONS) -> None:
        """Find clusters of the items that are there now; searches go on meanwhile."""
        vectors_ID, _ = self.index.lookup(self.index.keys)
        centres_KD = clustered(vectors_ID, len(self.centres_KD), seed, iterations)

        def encode(keys: Tensor) -> tuple[Tensor, Tensor]:
            vectors, _ = self.index.lookup(keys)
            return vectors, assigned(vectors, centres_KD)[1][:, None]

        self.index.refresh(encode, node_vectors=[centres_KD], version=self.index.version)
        self.index.release()
        self.centres_KD = centres_KD


def clustered(vectors_ID: Tensor, clusters: int, seed: int, iterations: int = ITERATIONS) -> Tensor:
    """Centres (K, D) by k-means of a sample.

    Raises:
        ValueError: if there are fewer vectors than clusters.
    """
    if not 1 <= clusters <= len(vectors_ID):
        raise ValueError(f"clusters is {clusters}, expected 1 to the number of vectors, {len(vectors_ID)}")
    generator = torch.Generator().manual_seed(seed)
    most = POINTS_PER_CLUSTER * clusters
    if len(vectors_ID) > most:
        vectors_ID = vectors_ID[torch.randperm(len(vectors_ID), generator=generator)[:most]]
    return k_means(vectors_ID, clusters, generator, iterations)[0]
