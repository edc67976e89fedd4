"""What indexes that walk a graph have in common: inner products become distances."""

# Shapes: B queries, S items, D width, E width of points (D or D + 1), L links, N items found.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fullrank.retrieval.vectors.snapshot import SnapshotIndex, ladder

# The largest effort, as a multiple of the results asked for, that is tried for the sake of recall.
MOST_EFFORT = 20


class GraphConfig(SnapshotIndex.Config):
    """Hyper-parameters.

    Attributes:
        links: links of an item; the lowest level has twice as many.
        build_effort: items kept in view when an item is linked.
        effort: items kept in view by a search, at least as many as it returns; default the least that reaches `recall`.
    """

    links: int = Field(default=16, ge=2)
    build_effort: int = Field(default=100, ge=1)
    effort: int | None = Field(default=None, ge=1)


class GraphIndex(SnapshotIndex):
    """An index that walks from neighbour to neighbour.

    Greedy walks need distances. On raw inner products they get stuck: whatever is large is everybody's neighbour, small
    items are nobody's, and recall stays far below what is asked, at any effort. So vectors of unequal norms get one
    more number, √(Φ² - |v|²) with Φ the largest norm, and queries a 0: all are then equally long, and the nearest
    point is the largest inner product.

    Source: Bachrach et al., Speeding Up the Xbox Recommender System Using a Euclidean Transformation for Inner-Product
    Spaces, RecSys 2014, section 4.
    """

    Config = GraphConfig
    config: GraphConfig

    @abstractmethod
    def _graph(self, points_SE: Tensor) -> Any:
        """The library's graph over points, by Euclidean distance."""

    @abstractmethod
    def _walk(self, graph: Any, queries_BE: Tensor, count: int, effort: int) -> Tensor:
        """`_find` among points."""

    def links(self) -> tuple[Tensor, int] | None:
        """Links between the places of the snapshot on the level that has all items, (S, L), -1 for none, and the place
        where searches begin; None if there is no snapshot or the library does not tell."""
        return None

    def _build(self, vectors_SD: Tensor) -> Any:
        return self._graph(augmented(vectors_SD))

    def _find(self, library: Any, queries_BD: Tensor, count: int, effort: int) -> Tensor:
        queries_BE = torch.cat([queries_BD, queries_BD.new_zeros(len(queries_BD), 1)], 1)
        return self._walk(library, queries_BE, count, max(effort, count))

    def _efforts(self, size: int) -> Sequence[int]:
        return ladder(100, 100 * MOST_EFFORT) if self.config.effort is None else [self.config.effort]

    def _scored(self, size: int, effort: int) -> int:
        # Every item in view is scored once, and so are those of its links that were not seen before: about half.
        return min(size, effort * self.config.links)


def augmented(vectors_SD: Tensor) -> Tensor:
    """Vectors with one more number that makes all norms equal, (S, D + 1)."""
    square_S = vectors_SD.double().square().sum(1)
    missing_S = (square_S.max() - square_S).clamp_min(0).sqrt().float()
    return torch.cat([vectors_SD, missing_S[:, None]], 1).contiguous()
