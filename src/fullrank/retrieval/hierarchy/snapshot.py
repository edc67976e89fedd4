"""One version of an index: its items and the nodes above them."""

# Shapes: I items, A keys, L leaves, D width of item vectors.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fullrank.retrieval.hierarchy.nodes import Codes, Tree
from fullrank.retrieval.hierarchy.storage import ROWS_AT_ONCE, Segment, checked_items, kept_small, merged

# Vectors (I, D) and codes (I, N) of items by their keys (I,).
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
# Items that are encoded in one call.
ENCODED_AT_ONCE = 8192


class StaleIndexError(ValueError):
    """An index and a scorer, or items, are of different versions of a model."""


class Selection:
    """Keys of the items that a search may return.

    What a filter selects in an index is found once and kept until the index changes: a selection that is searched with
    often is best made once.
    """

    def __init__(self, keys_A: Tensor) -> None:
        self.keys_A = keys_A
        self._found: tuple[Snapshot, Snapshot] | None = None
        self._copied: tuple[Snapshot, Snapshot] | None = None

    def within(self, whole: Snapshot) -> Snapshot:
        """Only these items, where they lie, and the nodes above them."""
        found = self._found
        if found is None or found[0] is not whole:
            kept, leaves = [], [torch.zeros(0, dtype=torch.int64)]
            for segment in whole.segments:
                rows_A = segment.rows(self.keys_A)
                kept_I = torch.zeros(len(segment), dtype=torch.bool)
                kept_I[rows_A[rows_A >= 0]] = True
                leaf_I = segment.leaf_I[kept_I]
                if leaf_I.numel():
                    kept.append(segment.only(kept_I))
                    leaves.append(leaf_I)
            part = replace(whole, tree=whole.tree.only(torch.cat(leaves)), segments=tuple(kept))
            self._found = found = (whole, part)
        return found[1]

    def copied(self, whole: Snapshot) -> Snapshot:
        """Only these items, copied behind one another."""
        copied = self._copied
        if copied is None or copied[0] is not whole:
            part = self.within(whole)
            self._copied = copied = (whole, replace(part, segments=(part.items(),)))
        return copied[1]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Items and nodes that never change, so that searches need no lock.

    Attributes:
        width: D.
        index_version: counts the changes that led here.
        model_version: of the model that vectors and nodes come from.
        error_at_build: see `Health.quantization_error_at_build`.
    """

    tree: Tree
    width: int
    segments: tuple[Segment, ...]
    index_version: int
    model_version: str | None
    error_at_build: float | None = None

    def __len__(self) -> int:
        return sum(segment.living for segment in self.segments)

    @property
    def stored(self) -> int:
        """Rows, dead ones among them."""
        return sum(len(segment) for segment in self.segments)

    @classmethod
    def empty(cls, codes: Codes, width: int, model_version: str | None) -> Snapshot:
        """Of no items."""
        none = torch.zeros(0, dtype=torch.int64)
        sums = None if codes.vectors else torch.zeros(0, codes.width, dtype=torch.float64)
        return cls(Tree.of(codes, none, none, sums), width, (), 0, model_version)

    def segment(self, keys_I: Tensor, vectors_ID: Tensor, codes_IN: Tensor) -> Segment:
        """More items, checked and sorted in.

        Raises:
            ValueError: see `HierarchicalIndex.add`.
        """
        vectors_ID = checked_items(keys_I, vectors_ID, self.width)
        leaf_I = self.tree.codes.leaves(codes_IN)
        if leaf_I.numel() != keys_I.numel():
            raise ValueError(f"there are codes of {leaf_I.numel()} items and keys of {keys_I.numel()}")
        return Segment.of(keys_I, vectors_ID, self.tree.codes.routed(leaf_I, vectors_ID))

    def encoded(self, keys_I: Tensor, encode: Encode) -> Snapshot:
        """With items that are encoded first, a block at a time."""
        snapshot = self
        parts: list[Segment] = []
        for block_I in torch.split(keys_I, ENCODED_AT_ONCE):
            vectors_ID, codes_IN = encode(block_I)
            if not snapshot.segments and not parts and vectors_ID.shape[-1] != snapshot.width:
                codes, width = snapshot.tree.codes, vectors_ID.shape[-1]
                codes = Codes.of(codes.num_nodes, codes.vectors, width)
                snapshot = Snapshot.empty(codes, width, snapshot.model_version)
            parts.append(snapshot.segment(block_I, vectors_ID, codes_IN))
        return snapshot.with_items(merged(parts)) if parts else snapshot

    def found(self, keys_A: Tensor) -> Tensor:
        """Which keys are those of items here."""
        found_A = torch.zeros(keys_A.shape, dtype=torch.bool)
        for segment in self.segments:
            found_A |= segment.rows(keys_A) >= 0
        return found_A

    def require(self, keys_A: Tensor) -> None:
        """Raises:
        KeyError: if a key is that of no item here.
        """
        known_A = self.found(keys_A)
        if not bool(known_A.all()):
            raise KeyError(f"item {int(keys_A[~known_A][0])} is not in the index")

    def lookup(self, keys_A: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (A, D) and codes (A, N) of items; raises as `require`."""
        self.require(keys_A)
        vectors_AD = torch.zeros(keys_A.numel(), self.width)
        leaf_A = torch.zeros_like(keys_A)
        for segment in self.segments:
            rows_A = segment.rows(keys_A)
            here_A = rows_A >= 0
            vectors_AD[here_A], leaf_A[here_A] = segment.vectors_ID[rows_A[here_A]], segment.leaf_I[rows_A[here_A]]
        return vectors_AD, self.tree.codes.codes(leaf_A)

    def with_items(self, fresh: Segment) -> Snapshot:
        """With more items."""
        if not len(fresh):
            return self
        sums = None if self.tree.sums_LV is None else fresh.sums()
        tree = self.tree.changed(fresh.leaves_L, fresh.offsets_L1.diff(), sums)
        return replace(self, tree=tree, segments=kept_small([*self.segments, fresh]))

    def without(self, keys_A: Tensor) -> Snapshot:
        """Without the items of these keys, where they are here."""
        tree, segments = self.tree, []
        for segment in self.segments:
            rows_A = segment.rows(keys_A)
            rows_A = torch.unique(rows_A[rows_A >= 0])
            if rows_A.numel():
                leaf_A = segment.leaf_I[rows_A]
                sums = None if tree.sums_LV is None else -segment.vectors_ID[rows_A].double()
                tree = tree.changed(leaf_A, torch.full_like(leaf_A, -1), sums)
                segment = segment.removed(rows_A)
            segments.append(segment)
        return replace(self, tree=tree, segments=kept_small(segments))

    def moved(self, node_vectors: Sequence[Tensor]) -> Snapshot:
        """With other vectors of nodes."""
        old = self.tree.codes
        codes = Codes.of(old.num_nodes, node_vectors, self.width)
        codes = replace(codes, parts_P=old.parts_P, part_vectors_PV=old.part_vectors_PV)
        codes.checked(self.tree.leaves_L)
        return replace(self, tree=Tree.of(codes, self.tree.leaves_L, self.tree.count_L, None))

    def squared_distances(self, segment: Segment) -> Tensor | None:
        """‖v - q‖² of each row and the vector of its leaf, 0 for a row that is dead; None if their widths differ."""
        leaves = self.tree.levels[-1]
        if self.width != self.tree.codes.width:
            return None
        place_I = torch.searchsorted(leaves.numbers_M, segment.leaf_I).clamp_max(max(0, len(leaves) - 1))
        blocks = zip(torch.split(segment.vectors_ID, ROWS_AT_ONCE), torch.split(place_I, ROWS_AT_ONCE), strict=True)
        distance_I = torch.cat([(rows - leaves.vectors_MV[place]).square().sum(1) for rows, place in blocks])
        return distance_I if segment.living_I is None else distance_I * segment.living_I

    def quantization_error(self) -> float | None:
        """Mean of ‖v - q‖² over items; None if widths differ or there are no items."""
        distances = [self.squared_distances(segment) for segment in self.segments]
        if not distances or not len(self):
            return None
        total = sum(float(each.double().sum()) for each in distances if each is not None)
        return None if any(each is None for each in distances) else total / len(self)

    def as_built(self) -> Snapshot:
        """The same, as what later states are compared with."""
        return replace(self, error_at_build=self.quantization_error())

    def members(self, leaves_L: Tensor) -> Segment:
        """The items of some leaves."""
        found = [Segment.none(self.width)]
        for segment in self.segments:
            ranges = segment.ranges(leaves_L[None])
            rows = ranges.rows(torch.arange(int(ranges.size_BJ.sum()))[None])[0]
            part = Segment.in_order(segment.keys_I[rows], segment.vectors_ID[rows], segment.leaf_I[rows])
            living_I = None if segment.living_I is None else segment.living_I[rows]
            found.append(part if living_I is None else part.only(living_I))
        return merged(found)

    def items(self) -> Segment:
        """All items as one segment."""
        return merged([Segment.none(self.width), *self.segments])

    def state(self) -> dict[str, Tensor]:
        """Items, node vectors and sizes, as contiguous tensors by name."""
        codes, items = self.tree.codes, self.items()
        return {
            "keys": items.keys_I.contiguous(),
            "vectors": items.vectors_ID.contiguous(),
            "leaves": items.leaf_I.contiguous(),
            "num_nodes": torch.tensor(codes.num_nodes),
            "parts": codes.parts_P.contiguous(),
            "error_at_build": torch.tensor([] if self.error_at_build is None else [self.error_at_build]),
            "part_vectors": codes.part_vectors_PV.contiguous(),
            **{f"nodes.{level}": rows.contiguous() for level, rows in enumerate(codes.vectors)},
        }

    @classmethod
    def restored(cls, state: dict[str, Tensor], model_version: str | None) -> Snapshot:
        """The inverse of `state`.

        Raises:
            ValueError: if tensors are missing or contradict one another.
        """
        try:
            num_nodes = state["num_nodes"].tolist()
            given = [state[f"nodes.{level}"] for level in range(len(num_nodes)) if f"nodes.{level}" in state]
            keys_I, vectors_ID, leaf_I = state["keys"], state["vectors"], state["leaves"]
            parts_P, part_vectors_PV, built = state["parts"], state["part_vectors"], state["error_at_build"].tolist()
        except KeyError as error:
            raise ValueError(f"tensor {error} of the index is missing") from None
        vectors_ID = checked_items(keys_I, vectors_ID, vectors_ID.shape[-1])
        codes = Codes.of(num_nodes, given, vectors_ID.shape[1])
        codes = replace(codes, parts_P=parts_P, part_vectors_PV=part_vectors_PV)
        codes.checked(leaf_I)
        if leaf_I.numel() != keys_I.numel():
            raise ValueError(f"there are leaves of {leaf_I.numel()} items and keys of {keys_I.numel()}")
        snapshot = cls.empty(codes, vectors_ID.shape[1], model_version)
        snapshot = snapshot.with_items(Segment.of(keys_I, vectors_ID, leaf_I))
        return replace(snapshot, error_at_build=built[0] if built else None)
