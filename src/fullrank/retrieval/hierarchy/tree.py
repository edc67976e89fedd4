"""A balanced tree of clusters, as in TDM."""

# Shapes: I items, D width, b branching, M nodes of a level.

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.retrieval.hierarchy.coded import CodedIndex
from fullrank.retrieval.hierarchy.index import HierarchicalIndex
from fullrank.retrieval.hierarchy.storage import checked_items

# Rounds of 2-means of a split.
ROUNDS = 6


class TreeIndex(CodedIndex):
    """A complete tree by recursive balanced 2-means, with the mean of its items as the vector of each node.

    Searched by a beam down the levels, as TDM is. TDM trains the scores of nodes so that a node scores as its best
    child does (a max-heap); here a `Scorer` of one's own may, and the inner product with the mean is the default. Items
    that are added go down the nearest nodes, so that leaves stay balanced only as long as data stay alike.

    Source: Zhu et al., Learning Tree-based Deep Model for Recommender Systems, KDD 2018.
    """

    def __init__(self, index: HierarchicalIndex, nodes: list[Tensor]) -> None:
        self.index, self.nodes = index, nodes

    @classmethod
    def build(
        cls, keys_I: Tensor, vectors_ID: Tensor, *, leaf_size: int = 32, branching: int = 2, seed: int = 0
    ) -> TreeIndex:
        """A tree whose leaves hold at most `leaf_size` items, as many to within one.

        Args:
            branching: children of a node, a power of 2.

        Raises:
            ValueError: if there is no item, leaf_size is below 1 or branching no power of 2; and as
                `HierarchicalIndex.build`.
        """
        vectors_ID = checked_items(keys_I, vectors_ID, vectors_ID.shape[-1])
        if leaf_size < 1:
            raise ValueError(f"leaf_size must be at least 1, got {leaf_size}")
        if branching < 2 or branching & (branching - 1):
            raise ValueError(f"branching is {branching}, expected a power of 2")
        if not len(vectors_ID):
            raise ValueError("a tree needs at least one item")
        bits = branching.bit_length() - 1
        levels = 1
        while len(vectors_ID) > leaf_size << (bits * levels):
            levels += 1
        leaf_I = balanced_leaves(vectors_ID, bits * levels, seed)
        nodes, codes = [], []
        for level in range(levels):
            node_I = leaf_I >> (bits * (levels - 1 - level))
            count_M = torch.bincount(node_I, minlength=branching ** (level + 1)).clamp_min(1)
            nodes.append(
                torch.zeros(len(count_M), vectors_ID.shape[1]).index_add_(0, node_I, vectors_ID) / count_M[:, None]
            )
            codes.append(node_I % branching)
        index = HierarchicalIndex(((branching,) * levels), nodes, vectors_ID.shape[1])
        index.add(keys_I, vectors_ID, torch.stack(codes, 1))
        return cls(index, nodes)

    def codes(self, vectors_ID: Tensor) -> Tensor:
        node_I, codes = torch.zeros(len(vectors_ID), dtype=torch.int64), []
        for size, rows_MD in zip(self.index.num_nodes, self.nodes, strict=True):
            children_Ib = node_I[:, None] * size + torch.arange(size)
            distance_Ib = (rows_MD[children_Ib] - vectors_ID[:, None]).square().sum(2)
            codes.append(distance_Ib.argmin(1))
            node_I = children_Ib.gather(1, codes[-1][:, None])[:, 0]
        return torch.stack(codes, 1)


def balanced_leaves(vectors_ID: Tensor, depth: int, seed: int = 0) -> Tensor:
    """The leaf of each vector, 0 to 2^depth - 1, after `depth` splits of every node into halves.

    A split is balanced 2-means: vectors in order of ‖v - c_0‖² - ‖v - c_1‖², the first half to c_0. All nodes of a
    level are split together.
    """
    generator = torch.Generator().manual_seed(seed)
    node_I = torch.zeros(len(vectors_ID), dtype=torch.int64)
    for _ in range(depth):
        nodes = int(node_I.max()) + 1
        size_M = torch.bincount(node_I, minlength=nodes)
        first_M = size_M.cumsum(0) - size_M
        # The second half of each node, at random to begin with.
        lean_I = torch.rand(len(vectors_ID), generator=generator)
        for _ in range(ROUNDS):
            half_I = _second_halves(node_I, lean_I, size_M, first_M)
            child_I = 2 * node_I + half_I
            count_C = torch.bincount(child_I, minlength=2 * nodes).clamp_min(1)
            mean_CD = torch.zeros(2 * nodes, vectors_ID.shape[1]).index_add_(0, child_I, vectors_ID) / count_C[:, None]
            across_MD = mean_CD[1::2] - mean_CD[::2]
            lean_I = (vectors_ID * across_MD[node_I]).sum(1)
        node_I = 2 * node_I + _second_halves(node_I, lean_I, size_M, first_M)
    return node_I


def _second_halves(node_I: Tensor, lean_I: Tensor, size_M: Tensor, first_M: Tensor) -> Tensor:
    """1 for the half of each node's vectors that lean most, else 0."""
    order_I = lean_I.argsort(stable=True)
    order_I = order_I[node_I[order_I].argsort(stable=True)]
    of_I = node_I[order_I]
    rank_I = torch.arange(len(node_I)) - first_M[of_I]
    half_I = torch.empty_like(node_I)
    half_I[order_I] = (rank_I >= (size_M[of_I] + 1) // 2).long()
    return half_I
