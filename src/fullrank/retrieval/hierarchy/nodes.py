"""The nodes of an index: occupied prefixes of codes, level by level."""

# Shapes: N levels, K_n codes of level n, M nodes of a level, L leaves, I items, V width of node vectors, P parts.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# A leaf that has grown too large is split into parts; as many as there can be.
PARTS = 1 << 10


@dataclass(frozen=True)
class Codes:
    """How codes name nodes, and the vectors that these have.

    A node of level n is a prefix of n codes, read as a number of mixed radix. A leaf has one more digit, its part,
    which is 0 unless the leaf was split.

    Attributes:
        num_nodes: K_1 .. K_N.
        width: V.
        vectors: of each level (K_n, V), the vector of a code: that of a node is the sum along its prefix (residual
            codes). Or (K_1 ·· K_n, V), a vector for each prefix. None of any level where a node has the mean of its
            items.
        parts_P: int64 numbers of the leaves that were made by splitting, ascending.
        part_vectors_PV: theirs.
    """

    num_nodes: tuple[int, ...]
    width: int
    vectors: tuple[Tensor, ...]
    parts_P: Tensor
    part_vectors_PV: Tensor

    @classmethod
    def of(cls, num_nodes: Sequence[int], vectors: Sequence[Tensor] | None, item_width: int) -> Codes:
        """Codes without parts.

        Raises:
            ValueError: if a level has no vectors, too many or too few, or widths that differ, or a number is not
                finite.
        """
        vectors = () if vectors is None else vectors
        sizes = tuple(num_nodes)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"num_nodes is {sizes}, expected a number of at least 1 for each level")
        if math.prod(sizes) * PARTS >= 1 << 62:
            raise ValueError(f"num_nodes is {sizes}, {math.prod(sizes)} leaves, expected at most 2^51")
        if vectors and len(vectors) != len(sizes):
            raise ValueError(f"there are vectors of {len(vectors)} levels, num_nodes is {sizes}")
        for level, (size, rows_KV) in enumerate(zip(sizes, vectors, strict=False)):
            allowed = (size, math.prod(sizes[: level + 1]))
            if rows_KV.ndim != 2 or rows_KV.shape[0] not in allowed:
                raise ValueError(
                    f"node vectors of level {level} have shape {tuple(rows_KV.shape)}, expected {size} rows, "
                    f"one for each code, or {allowed[1]}, one for each prefix"
                )
            if rows_KV.shape[1] != vectors[0].shape[1]:
                raise ValueError(
                    f"node vectors of level {level} have width {rows_KV.shape[1]}, level 0 {vectors[0].shape[1]}"
                )
            finite_K = torch.isfinite(rows_KV).all(1)
            if not bool(finite_K.all()):
                row = int((~finite_K).nonzero()[0])
                raise ValueError(f"node vectors of level {level}: row {row} has a NaN or infinite number")
        width = vectors[0].shape[1] if vectors else item_width
        no_parts = torch.zeros(0, dtype=torch.int64), torch.zeros(0, width)
        return cls(sizes, width, tuple(rows.float() for rows in vectors), *no_parts)

    @property
    def levels(self) -> int:
        return len(self.num_nodes)

    def leaves(self, codes_IN: Tensor) -> Tensor:
        """The unsplit leaf of each item.

        Raises:
            ValueError: if codes are of another shape, or outside their level.
        """
        if codes_IN.ndim == 1 and self.levels == 1:
            codes_IN = codes_IN[:, None]
        if codes_IN.ndim != 2 or codes_IN.shape[1] != self.levels or codes_IN.is_floating_point():
            raise ValueError(
                f"codes are {codes_IN.dtype} of shape {tuple(codes_IN.shape)}, expected integers, {self.levels} an item"
            )
        leaf_I = torch.zeros(codes_IN.shape[0], dtype=torch.int64)
        for level, size in enumerate(self.num_nodes):
            code_I = codes_IN[:, level].long()
            outside = (code_I < 0) | (code_I >= size)
            if bool(outside.any()):
                row = int(outside.nonzero()[0])
                raise ValueError(f"codes: row {row} has {int(code_I[row])} at level {level}, expected 0 to {size - 1}")
            leaf_I = leaf_I * size + code_I
        return leaf_I * PARTS

    def routed(self, leaf_I: Tensor, vectors_ID: Tensor) -> Tensor:
        """The part that each item belongs to, the nearest one, where its leaf was split."""
        bases = torch.unique(self.parts_P // PARTS) * PARTS
        split_I = torch.isin(leaf_I, bases)
        if not bool(split_I.any()):
            return leaf_I
        leaf_I = leaf_I.clone()
        for base in torch.unique(leaf_I[split_I]).tolist():
            rows = (leaf_I == base).nonzero().squeeze(1)
            own_P = (self.parts_P // PARTS * PARTS == base).nonzero().squeeze(1)
            nearest = torch.cdist(vectors_ID[rows], self.part_vectors_PV[own_P]).argmin(1)
            leaf_I[rows] = self.parts_P[own_P[nearest]]
        return leaf_I

    def codes(self, leaf_I: Tensor) -> Tensor:
        """The inverse of `leaves`, (I, N); parts are forgotten."""
        rest_I, found = leaf_I // PARTS, []
        for size in reversed(self.num_nodes):
            found.append(rest_I % size)
            rest_I = rest_I // size
        return torch.stack(found[::-1], 1)

    def checked(self, leaf_I: Tensor) -> None:
        """Raises:
        ValueError: if leaves are outside the tree, or parts have no vectors.
        """
        count = math.prod(self.num_nodes)
        for numbers in (leaf_I, self.parts_P):
            if (
                numbers.ndim != 1
                or numbers.dtype != torch.int64
                or bool(((numbers < 0) | (numbers >= count * PARTS)).any())
            ):
                raise ValueError(f"there are leaves that are none of the {count} of the tree")
        if self.part_vectors_PV.shape != (self.parts_P.numel(), self.width):
            raise ValueError(
                f"vectors of parts have shape {tuple(self.part_vectors_PV.shape)}, "
                f"expected {(self.parts_P.numel(), self.width)}"
            )

    def parents(self, level: int, numbers_M: Tensor) -> Tensor:
        """Numbers, at the level above, of nodes of a level."""
        return numbers_M // (self.num_nodes[level] * (PARTS if level == self.levels - 1 else 1))

    def vectors_of(self, level: int, numbers_M: Tensor) -> Tensor:
        """Vectors (M, V) of nodes of a level."""
        if level == self.levels - 1:
            found = self._unsplit(level, numbers_M // PARTS)
            if self.parts_P.numel():
                place_M = torch.searchsorted(self.parts_P, numbers_M).clamp_max(self.parts_P.numel() - 1)
                split_M = self.parts_P[place_M] == numbers_M
                found[split_M] = self.part_vectors_PV[place_M[split_M]]
            return found
        return self._unsplit(level, numbers_M)

    def _unsplit(self, level: int, numbers_M: Tensor) -> Tensor:
        size, rows_KV = self.num_nodes[level], self.vectors[level]
        if rows_KV.shape[0] != size or level == 0:
            return rows_KV[numbers_M]
        return self._unsplit(level - 1, numbers_M // size) + rows_KV[numbers_M % size]


@dataclass(frozen=True)
class Level:
    """The occupied nodes of a level.

    Attributes:
        numbers_M: int64, ascending: children of a node are neighbours.
        vectors_MV: float32.
        children_M1: nodes of the next level up to each node's first child, and their number at last; empty at leaves.
    """

    numbers_M: Tensor
    vectors_MV: Tensor
    children_M1: Tensor

    def __len__(self) -> int:
        return self.numbers_M.numel()

    @cached_property
    def most_children(self) -> int:
        return int(self.children_M1.diff().max()) if self.children_M1.numel() > 1 else 0


# (level, numbers of its occupied nodes, which of them each leaf is below) -> their vectors.
VectorsOf = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Tree:
    """Nodes that have items below them.

    Attributes:
        levels: coarsest first; the last are the leaves.
        count_L: living items of each leaf.
        sums_LV: float64, the sum of their vectors; None where codes have vectors.
    """

    codes: Codes
    levels: tuple[Level, ...]
    count_L: Tensor
    sums_LV: Tensor | None

    @classmethod
    def of(cls, codes: Codes, leaf_I: Tensor, count_I: Tensor, sums_IV: Tensor | None) -> Tree:
        """The tree of items by their leaves, in any order.

        Args:
            count_I: how many items each entry stands for; entries of a leaf may cancel.
            sums_IV: the sum of their vectors; None where codes have vectors.
        """
        leaves_L, of_I = torch.unique(leaf_I, return_inverse=True)
        count_L = torch.zeros_like(leaves_L).index_add_(0, of_I, count_I)
        occupied_L = count_L > 0
        if sums_IV is None:
            return cls._built(codes, leaves_L[occupied_L], count_L[occupied_L], None, _of_codes(codes))
        sums_LV = sums_IV.new_zeros(leaves_L.numel(), sums_IV.shape[1]).index_add_(0, of_I, sums_IV)
        return cls._of_sums(codes, leaves_L[occupied_L], count_L[occupied_L], sums_LV[occupied_L])

    @classmethod
    def _of_sums(cls, codes: Codes, leaves_L: Tensor, count_L: Tensor, sums_LV: Tensor) -> Tree:
        def means(level: int, numbers_M: Tensor, node_L: Tensor) -> Tensor:
            count_M = torch.zeros_like(numbers_M).index_add_(0, node_L, count_L)
            sums_MV = sums_LV.new_zeros(len(numbers_M), codes.width).index_add_(0, node_L, sums_LV)
            return (sums_MV / count_M[:, None]).float()

        return cls._built(codes, leaves_L, count_L, sums_LV, means)

    @classmethod
    def _built(
        cls, codes: Codes, leaves_L: Tensor, count_L: Tensor, sums_LV: Tensor | None, vectors_of: VectorsOf
    ) -> Tree:
        levels: list[Level] = []
        numbers_M, children_M1 = leaves_L, torch.zeros(0, dtype=torch.int64)
        node_L = torch.arange(leaves_L.numel())
        for level in reversed(range(codes.levels)):
            levels.append(Level(numbers_M, vectors_of(level, numbers_M, node_L), children_M1))
            if level:
                numbers_M, of_M, count_M = torch.unique_consecutive(
                    codes.parents(level, numbers_M), return_inverse=True, return_counts=True
                )
                node_L = of_M[node_L]
                children_M1 = torch.cat([count_M.new_zeros(1), count_M.cumsum(0)])
        return cls(codes, tuple(reversed(levels)), count_L, sums_LV)

    @property
    def leaves_L(self) -> Tensor:
        return self.levels[-1].numbers_M

    def only(self, leaf_I: Tensor) -> Tree:
        """Only the nodes above these leaves, as they are; an entry for each item."""

        def kept(level: int, numbers_M: Tensor, node_L: Tensor) -> Tensor:
            return self.levels[level].vectors_MV[torch.searchsorted(self.levels[level].numbers_M, numbers_M)]

        leaves_L, count_L = torch.unique(leaf_I, return_counts=True)
        return self._built(self.codes, leaves_L, count_L, None, kept)

    def changed(self, leaf_I: Tensor, by_I: Tensor, sums_IV: Tensor | None) -> Tree:
        """With some more items, or fewer, in these leaves; see `of`."""
        place_I = torch.searchsorted(self.leaves_L, leaf_I).clamp_max(max(0, self.leaves_L.numel() - 1))
        if self.leaves_L.numel() and bool((self.leaves_L[place_I] == leaf_I).all()):
            count_L = self.count_L.index_add(0, place_I, by_I)
            if bool((count_L > 0).all()):  # the nodes stay as they are
                if self.sums_LV is None or sums_IV is None:
                    return replace(self, count_L=count_L)
                return self._of_sums(self.codes, self.leaves_L, count_L, self.sums_LV.index_add(0, place_I, sums_IV))
        sums = None if self.sums_LV is None or sums_IV is None else torch.cat([self.sums_LV, sums_IV])
        return Tree.of(self.codes, torch.cat([self.leaves_L, leaf_I]), torch.cat([self.count_L, by_I]), sums)


def _of_codes(codes: Codes) -> VectorsOf:
    return lambda level, numbers_M, node_L: codes.vectors_of(level, numbers_M)
