"""How full and how worn an index is, and what its beams find."""

# Shapes: B users, L leaves, K results.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.retrieval.base import NO_ITEM
from fullrank.retrieval.hierarchy.scorer import Scorer
from fullrank.retrieval.hierarchy.searching import search_snapshot
from fullrank.retrieval.hierarchy.snapshot import Snapshot


@dataclass(frozen=True)
class Health:
    """The state of an index.

    Attributes:
        items: that are searchable.
        nodes: of each level that have items.
        perplexity: of each level, e to the entropy of the items' nodes: how many equally full nodes would be as even.
        mean_leaf: items of a leaf that has some.
        max_leaf: items of the fullest.
        dead_share: of stored rows whose items were removed.
        tail_share: of stored rows that were added after the last time that all were laid in order.
        segments: pieces that a leaf may lie in.
        quantization_error: mean of ‖v - q‖² over items, q being the vector of the leaf; None if the two have not the
            same width.
        quantization_error_at_build: the same when the index was built or refreshed; None too if it was built by adding.
    """

    items: int
    nodes: tuple[int, ...]
    perplexity: tuple[float, ...]
    mean_leaf: float
    max_leaf: int
    dead_share: float
    tail_share: float
    segments: int
    quantization_error: float | None
    quantization_error_at_build: float | None


@dataclass(frozen=True)
class Audit:
    """What a beam finds.

    Attributes:
        beam: its widths.
        recall: share of the k best items of each user that it finds, mean over users.
        items_share: share of the stored items that it scores.
        nodes: nodes scored for a user, mean.
    """

    beam: tuple[int, ...]
    recall: float
    items_share: float
    nodes: float


def health(snapshot: Snapshot) -> Health:
    tree, stored = snapshot.tree, snapshot.stored
    count_L, perplexity = tree.count_L.double(), []
    numbers, levels = tree.leaves_L, tree.codes.levels
    for level in reversed(range(levels)):
        _, of_L = torch.unique(numbers, return_inverse=True)
        share = torch.zeros(of_L.numel(), dtype=torch.float64).index_add_(0, of_L, count_L)
        share = share[share > 0] / max(1, len(snapshot))
        perplexity.append(float(torch.exp(-(share * share.log()).sum())) if share.numel() else 0.0)
        numbers = tree.codes.parents(level, numbers)
    leaves = tree.count_L.numel()
    return Health(
        items=len(snapshot),
        nodes=tuple(len(level) for level in tree.levels),
        perplexity=tuple(reversed(perplexity)),
        mean_leaf=len(snapshot) / leaves if leaves else 0.0,
        max_leaf=int(tree.count_L.max()) if leaves else 0,
        dead_share=(stored - len(snapshot)) / stored if stored else 0.0,
        tail_share=sum(len(segment) for segment in snapshot.segments[1:]) / stored if stored else 0.0,
        segments=len(snapshot.segments),
        quantization_error=snapshot.quantization_error(),
        quantization_error_at_build=snapshot.error_at_build,
    )


def audit(snapshot: Snapshot, scorer: Scorer, users: Any, k: int, beams: Sequence[Sequence[int]]) -> list[Audit]:
    exact = search_snapshot(snapshot, scorer, users, k, None, None, None).item_keys_BK
    found = []
    for beam in beams:
        result = search_snapshot(snapshot, scorer, users, k, beam, None, None)
        found.append(
            Audit(
                tuple(beam),
                recall(result.item_keys_BK, exact),
                float(result.cost_B.double().mean()) / max(1, snapshot.stored),
                float(result.stats.nodes_BN.sum(1).double().mean()),
            )
        )
    return found


def recall(found_BK: Tensor, expected_BK: Tensor) -> float:
    """Share of the expected items of each user that were found, mean over users who have some."""
    there_B = (expected_BK != NO_ITEM).sum(1)
    # Both in order, so that a search finds each in the other: no (B, K, K) in memory.
    order_BK = found_BK.sort(1).values
    if not order_BK.shape[1] or not bool(there_B.any()):
        return 0.0 if bool(there_B.any()) else 1.0
    place_BK = torch.searchsorted(order_BK, expected_BK.contiguous()).clamp_max(order_BK.shape[1] - 1)
    hit_BK = (order_BK.gather(1, place_BK) == expected_BK) & (expected_BK != NO_ITEM)
    return float((hit_BK.sum(1)[there_B > 0] / there_B[there_B > 0]).mean())
