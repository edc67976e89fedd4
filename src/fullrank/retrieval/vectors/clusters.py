"""Trees and streaming clusters of the hierarchical index, as indexes of vectors."""

# Shapes: B queries, S items, D width, N items found.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fullrank.retrieval.hierarchy.coded import CodedIndex
from fullrank.retrieval.hierarchy.streaming_vq import StreamingVQ
from fullrank.retrieval.hierarchy.tree import TreeIndex
from fullrank.retrieval.vectors.ivf import cells
from fullrank.retrieval.vectors.snapshot import SnapshotIndex, ladder


class _Coded(SnapshotIndex):
    """A snapshot in leaves of a hierarchical index, searched by a beam of `effort` nodes at each level."""

    def _find(self, library: Any, queries_BD: Tensor, count: int, effort: int) -> Tensor:
        assert isinstance(library, CodedIndex)
        found_BK = library.search(queries_BD, count, (effort,) * len(library.index.num_nodes)).item_keys_BK
        return torch.nn.functional.pad(found_BK, (0, count - found_BK.shape[1]), value=-1)


class TreeVectors(_Coded):
    """A balanced tree, every node the mean of its items, descended by a beam: see `TreeIndex`."""

    class Config(SnapshotIndex.Config):
        """Hyper-parameters.

        Attributes:
            leaf_size: items of a leaf, at most.
            branching: children of a node, a power of 2.
            beam: nodes kept at each level; default the least that reaches `recall`.
        """

        leaf_size: int = Field(default=32, ge=1)
        branching: int = Field(default=8, ge=2)
        beam: int | None = Field(default=None, ge=1)

        @field_validator("branching")
        @classmethod
        def _is_a_power(cls, value: int) -> int:
            if value & (value - 1):
                raise ValueError("expected a power of 2")
            return value

    name = "tree"
    config: Config

    def _build(self, vectors_SD: Tensor) -> TreeIndex:
        config = self.config
        keys = torch.arange(len(vectors_SD))
        return TreeIndex.build(keys, vectors_SD, leaf_size=config.leaf_size, branching=config.branching)

    def _efforts(self, size: int) -> Sequence[int]:
        leaves = -(-size // self.config.leaf_size) * self.config.branching
        return ladder(2, leaves) if self.config.beam is None else [min(leaves, self.config.beam)]

    def _scored(self, size: int, effort: int) -> int:
        return min(size, effort * self.config.leaf_size)


class StreamingVectors(_Coded):
    """Clusters whose centres can follow a stream, of which the best few are scored: see `StreamingVQ`."""

    class Config(SnapshotIndex.Config):
        """Hyper-parameters.

        Attributes:
            clusters: how many; default the power of 2 next to the square root of the number of items.
            balance: how much less distance counts to a cluster that has few items; 0 is the nearest centre.
            beam: clusters that a search scores; default the least that reach `recall`.
        """

        clusters: int | None = Field(default=None, ge=1)
        balance: float = Field(default=0.25, ge=0)
        beam: int | None = Field(default=None, ge=1)

    name = "streaming_vq"
    config: Config

    def _build(self, vectors_SD: Tensor) -> StreamingVQ:
        number = cells(self.config.clusters, len(vectors_SD))
        keys = torch.arange(len(vectors_SD))
        return StreamingVQ.build(keys, vectors_SD, number, balance=self.config.balance)

    def _efforts(self, size: int) -> Sequence[int]:
        last = cells(self.config.clusters, size)
        return ladder(min(last, 4), last) if self.config.beam is None else [min(last, self.config.beam)]

    def _scored(self, size: int, effort: int) -> int:
        number = cells(self.config.clusters, size)
        return number + size * min(effort, number) // number
