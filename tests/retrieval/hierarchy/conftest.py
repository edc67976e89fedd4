"""Items and codes of the tests of the hierarchical index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fullrank.retrieval.hierarchy import HierarchicalIndex

WIDTH = 6
NUM_NODES = (8, 5)


@dataclass(frozen=True)
class Catalogue:
    """Clustered vectors with residual codes to the nearest of random codewords."""

    keys_I: Tensor
    vectors_ID: Tensor
    books: tuple[Tensor, ...]

    @classmethod
    def make(cls, items: int, seed: int = 0) -> Catalogue:
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(items, WIDTH, generator=generator)
        books = tuple(torch.randn(size, WIDTH, generator=generator) / (1 + n) for n, size in enumerate(NUM_NODES))
        return cls(torch.randperm(4 * items, generator=generator)[:items], vectors, books)

    def codes(self, vectors_ID: Tensor) -> Tensor:
        codes, rest = [], vectors_ID
        for book in self.books:
            codes.append(torch.cdist(rest, book).argmin(1))
            rest = rest - book[codes[-1]]
        return torch.stack(codes, 1)

    def nodes(self, vectors_ID: Tensor) -> list[Tensor]:
        """Vectors of the node of each item at each level."""
        codes = self.codes(vectors_ID)
        parts = [book[codes[:, n]] for n, book in enumerate(self.books)]
        return list(torch.stack(parts).cumsum(0))

    def index(self, **options: Any) -> HierarchicalIndex:
        return HierarchicalIndex.build(
            self.keys_I,
            self.vectors_ID,
            self.codes(self.vectors_ID),
            num_nodes=NUM_NODES,
            node_vectors=self.books,
            **options,
        )


@pytest.fixture(scope="session")
def make_catalogue() -> Callable[[int], Catalogue]:
    return Catalogue.make


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return Catalogue.make(1500)


@pytest.fixture(scope="session")
def users() -> Tensor:
    return torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(5))
