"""Keeping leaves small and near to their items."""

# Shapes: I items, S items of the leaf that is split, D width.

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fullrank.embeddings.semantic_id.quantizer import assigned
from fullrank.embeddings.semantic_id.rq_kmeans import k_means
from fullrank.retrieval.hierarchy.nodes import PARTS, Codes, Tree
from fullrank.retrieval.hierarchy.snapshot import Snapshot
from fullrank.retrieval.hierarchy.storage import Segment, merged


def rebalanced(snapshot: Snapshot, max_leaf: int, seed: int = 0) -> Snapshot:
    """The same items, those of leaves with more than `max_leaf` in parts of at most as many.

    A part is a leaf of its own beside the others of its parent, with the mean of its items as its vector. Items that
    are added later under the same codes go to the nearest part. Items that are all alike stay together.

    Raises:
        ValueError: if max_leaf is below 1, or node vectors have not the items' width.
    """
    if max_leaf < 1:
        raise ValueError(f"max_leaf must be at least 1, got {max_leaf}")
    codes = snapshot.tree.codes
    if codes.width != snapshot.width:
        raise ValueError(f"node vectors have width {codes.width} and items {snapshot.width}: parts need the same")
    large = snapshot.tree.leaves_L[snapshot.tree.count_L > max_leaf]
    generator = torch.Generator().manual_seed(seed)
    moved: list[Segment] = []
    for leaf in large.tolist():
        members = snapshot.members(torch.tensor([leaf]))
        parts = _parts(members.vectors_ID, max_leaf, generator)
        if len(parts) == 1:
            continue
        numbers = [leaf, *_free(codes, leaf, len(parts) - 1)]
        means = torch.stack([members.vectors_ID[rows].mean(0) for rows in parts])
        codes = with_parts(codes, torch.tensor(numbers), means)
        leaf_S = torch.empty(len(members), dtype=torch.int64)
        for number, rows in zip(numbers, parts, strict=True):
            leaf_S[rows] = number
        moved.append(Segment.of(members.keys_I, members.vectors_ID, leaf_S))
    if not moved:
        return snapshot
    fresh = merged(moved)
    rest = snapshot.without(fresh.keys_I)
    tree = Tree.of(codes, rest.tree.leaves_L, rest.tree.count_L, rest.tree.sums_LV)
    return replace(rest, tree=tree).with_items(fresh)


def _parts(vectors_SD: Tensor, max_leaf: int, generator: torch.Generator) -> list[Tensor]:
    """Rows of each part: halves by 2-means, as often as needed."""
    done: list[Tensor] = []
    todo = [torch.arange(len(vectors_SD))]
    while todo:
        rows = todo.pop()
        if rows.numel() > max_leaf and len(done) + len(todo) + 2 < PARTS:
            centres, _ = k_means(vectors_SD[rows], 2, generator)
            second = torch.cdist(vectors_SD[rows], centres).argmin(1) == 1
            if bool(second.any()) and not bool(second.all()):
                todo += [rows[second], rows[~second]]
                continue
        done.append(rows)
    return done


def _free(codes: Codes, leaf: int, count: int) -> list[int]:
    """Numbers of parts, of the unsplit leaf of `leaf`, that are not taken."""
    base = leaf - leaf % PARTS
    taken = codes.parts_P[(codes.parts_P >= base) & (codes.parts_P < base + PARTS)].tolist()
    free = [number for number in range(base + 1, base + PARTS) if number not in taken]
    if len(free) < count:
        raise ValueError(f"a leaf has more than {PARTS} parts: max_leaf is too small")
    return free[:count]


def with_parts(codes: Codes, numbers_P: Tensor, vectors_PD: Tensor) -> Codes:
    """Codes that have these parts, or these vectors of parts that they have."""
    kept = ~torch.isin(codes.parts_P, numbers_P)
    numbers, order = torch.cat([codes.parts_P[kept], numbers_P]).sort()
    vectors = torch.cat([codes.part_vectors_PV[kept], vectors_PD])[order]
    return replace(codes, parts_P=numbers, part_vectors_PV=vectors)


def nearest_leaves(snapshot: Snapshot, vectors_ID: Tensor) -> Tensor:
    """Numbers of the occupied leaves that vectors are nearest to.

    Raises:
        ValueError: if there are no items, or node vectors have not the items' width.
    """
    leaves = snapshot.tree.levels[-1]
    if snapshot.tree.codes.width != snapshot.width:
        raise ValueError(
            f"node vectors have width {snapshot.tree.codes.width} and items {snapshot.width}: distances need the same"
        )
    if not len(leaves):
        raise ValueError("the index has no items, so that no leaf is near")
    return leaves.numbers_M[assigned(vectors_ID, leaves.vectors_MV)[1]]


def reassigned(snapshot: Snapshot) -> Snapshot:
    """The same items, each in the nearest leaf that there is: a step of k-means, where nodes have the mean of theirs.

    Raises:
        ValueError: as `nearest_leaves`.
    """
    moved: list[Segment] = []
    for segment in snapshot.segments:
        whole = segment.compact()
        leaf_I = nearest_leaves(snapshot, whole.vectors_ID)
        rows = (leaf_I != whole.leaf_I).nonzero().squeeze(1)
        moved.append(Segment.of(whole.keys_I[rows], whole.vectors_ID[rows], leaf_I[rows]))
    if not any(len(part) for part in moved):
        return snapshot
    fresh = merged(moved)
    return snapshot.without(fresh.keys_I).with_items(fresh)
