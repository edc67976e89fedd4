"""Stored items: the members of a leaf behind one another, so that a leaf is scored as one slice."""

# Shapes: I items, L occupied leaves, A keys looked up, B users, J leaves of a user, D width of item vectors.

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fullrank.retrieval.base import NO_ITEM
from fullrank.retrieval.hierarchy.ranges import Ranges
from fullrank.retrieval.vectors.base import places_of

F = TypeVar("F")

# A segment is at least this many times as large as all that came after it, or they become one: at most a fifth of the
# items lie in the tail, and an item is copied a few times in all.
TAIL_RATIO = 4
# Smaller segments always become one with the next.
SMALL_SEGMENT = 4096
# Rows that are worked on at once where all are.
ROWS_AT_ONCE = 1 << 16
# The share of dead rows from which on a segment is written anew without them.
MOST_DEAD = 0.2


@dataclass(frozen=True, eq=False)
class Segment:
    """Items in order of their leaf, within a leaf the longest vector first, then by key. Never changed once made.

    Attributes:
        leaves_L: int64 numbers of the leaves that have rows here, ascending.
        offsets_L1: rows up to each leaf, and the number of rows at last.
        keys_I: int64.
        vectors_ID: float32.
        living_I: False for rows of items that were removed; None if there are none.
        dead: how many those are.
        facts: what was found out about the rows, living or not, by name; shared with what only has fewer living ones.
    """

    leaves_L: Tensor
    offsets_L1: Tensor
    keys_I: Tensor
    vectors_ID: Tensor
    living_I: Tensor | None = None
    dead: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, keys_I: Tensor, vectors_ID: Tensor, leaf_I: Tensor) -> Segment:
        """Sort items in."""
        order_I = keys_I.argsort()
        norm_I = vectors_ID.square().sum(1)
        order_I = order_I[norm_I[order_I].argsort(descending=True, stable=True)]
        order_I = order_I[leaf_I[order_I].argsort(stable=True)]
        return cls.in_order(keys_I[order_I], vectors_ID[order_I], leaf_I[order_I])

    @classmethod
    def in_order(cls, keys_I: Tensor, vectors_ID: Tensor, leaf_I: Tensor) -> Segment:
        """Of items that are in order already."""
        leaves_L, count_L = torch.unique_consecutive(leaf_I, return_counts=True)
        offsets_L1 = torch.cat([count_L.new_zeros(1), count_L.cumsum(0)])
        return cls(leaves_L, offsets_L1, keys_I, vectors_ID)

    @classmethod
    def none(cls, width: int) -> Segment:
        """No items."""
        none_I = torch.zeros(0, dtype=torch.int64)
        return cls.in_order(none_I, torch.zeros(0, width), none_I)

    def __len__(self) -> int:
        return self.keys_I.numel()

    @property
    def living(self) -> int:
        return len(self) - self.dead

    @property
    def leaf_I(self) -> Tensor:
        """The leaf of each row."""
        return self.fact("leaf_I", lambda: self.leaves_L.repeat_interleave(self.offsets_L1.diff()))

    def fact(self, name: str, find: Callable[[], F]) -> F:
        """What follows from the rows, found when it is first asked for."""
        if name not in self.facts:
            self.facts[name] = find()
        found: F = self.facts[name]
        return found

    def sums(self) -> Tensor:
        """Float64 sum of the vectors of each leaf (L, D), dead ones among them."""
        leaves = self.leaves_L.numel()
        of_I = torch.arange(leaves).repeat_interleave(self.offsets_L1.diff())
        found = torch.zeros(leaves, self.vectors_ID.shape[1], dtype=torch.float64)
        for of, rows in zip(torch.split(of_I, ROWS_AT_ONCE), torch.split(self.vectors_ID, ROWS_AT_ONCE), strict=True):
            found.index_add_(0, of, rows.double())
        return found

    def rows(self, keys_A: Tensor) -> Tensor:
        """The living row of each key; -1 where there is none."""
        if not len(self):
            return torch.full_like(keys_A, -1)
        keys_I, rows_I = self.fact("by_key", self.keys_I.sort)
        place_A = places_of(keys_A, keys_I)
        rows_A, found_A = rows_I[place_A], place_A >= 0
        if self.living_I is not None:
            found_A &= self.living_I[rows_A]
        return torch.where(found_A, rows_A, -1)

    def ranges(self, leaves_BJ: Tensor) -> Ranges:
        """The rows of leaves; none of a leaf that has none here, or is -1."""
        if not len(self):
            return Ranges(torch.zeros_like(leaves_BJ), torch.zeros_like(leaves_BJ))
        place_BJ = torch.searchsorted(self.leaves_L, leaves_BJ).clamp_max(self.leaves_L.numel() - 1)
        begin_BJ = self.offsets_L1[place_BJ]
        size_BJ = self.offsets_L1[place_BJ + 1] - begin_BJ
        return Ranges(begin_BJ, size_BJ.masked_fill(self.leaves_L[place_BJ] != leaves_BJ, 0))

    def removed(self, rows_A: Tensor) -> Segment:
        """Without these living rows, which stay as dead ones."""
        living_I = torch.ones(len(self), dtype=torch.bool) if self.living_I is None else self.living_I.clone()
        living_I[rows_A] = False
        return self._with(living_I)

    def only(self, kept_I: Tensor) -> Segment:
        """Only these rows, where they lie: the others count as removed."""
        return self._with(kept_I if self.living_I is None else self.living_I & kept_I)

    def _with(self, living_I: Tensor) -> Segment:
        return replace(self, living_I=living_I, dead=len(self) - int(living_I.sum()))

    def compact(self) -> Segment:
        """Without dead rows."""
        if self.living_I is None:
            return self
        rows = self.living_I
        return Segment.in_order(self.keys_I[rows], self.vectors_ID[rows], self.leaf_I[rows])


def merged(segments: Sequence[Segment]) -> Segment:
    """All living items of several segments as one."""
    whole = [segment.compact() for segment in segments if segment.living] or [segments[0].compact()]
    if len(whole) == 1:
        return whole[0]
    return Segment.of(
        torch.cat([segment.keys_I for segment in whole]),
        torch.cat([segment.vectors_ID for segment in whole]),
        torch.cat([segment.leaf_I for segment in whole]),
    )


def kept_small(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The same living items: segments that have become too small for what follows them are merged, those with too many
    dead rows written anew; the first is the largest, the others are the tail."""
    parts = [segment.compact() if segment.dead > MOST_DEAD * len(segment) else segment for segment in segments]
    parts = [part for part in parts if len(part)]
    while len(parts) > 1 and _too_small(parts[-2], len(parts[-1])):
        parts[-2:] = [merged(parts[-2:])]
    if len(parts) > 1 and _too_small(parts[0], sum(len(part) for part in parts[1:])):
        parts = [merged(parts)]
    return tuple(parts)


def _too_small(segment: Segment, behind: int) -> bool:
    return len(segment) < SMALL_SEGMENT or len(segment) < TAIL_RATIO * behind


def checked_items(keys_I: Tensor, vectors_ID: Tensor, width: int) -> Tensor:
    """Item vectors as float32.

    Raises:
        ValueError: if shapes or types are wrong, a key is that of no item or given twice, or a number is not finite.
    """
    if keys_I.ndim != 1 or keys_I.dtype != torch.int64:
        raise ValueError(f"item keys are {keys_I.dtype} of shape {tuple(keys_I.shape)}, expected a row of int64")
    if vectors_ID.ndim != 2 or vectors_ID.shape != (keys_I.numel(), width):
        raise ValueError(f"item vectors have shape {tuple(vectors_ID.shape)}, expected {(keys_I.numel(), width)}")
    if vectors_ID.dtype != torch.float32:
        warnings.warn(f"item vectors are {vectors_ID.dtype}, stored as torch.float32", stacklevel=4)
        vectors_ID = vectors_ID.float()
    if bool((keys_I == NO_ITEM).any()):
        raise ValueError(f"{NO_ITEM} is the key of no item")
    finite_I = torch.isfinite(vectors_ID).all(1)
    if not bool(finite_I.all()):
        row = int((~finite_I).nonzero()[0])
        raise ValueError(f"row {row}, the vector of item {int(keys_I[row])}, has a NaN or infinite number")
    keys = keys_I.sort().values
    twice = keys[1:] == keys[:-1]
    if bool(twice.any()):
        raise ValueError(f"item {int(keys[1:][twice][0])} is given twice")
    return vectors_ID
