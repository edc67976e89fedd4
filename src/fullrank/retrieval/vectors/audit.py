"""What an index finds and what it can find at all."""

# Shapes: Q queries, S items of a snapshot, L links, K results.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.retrieval.exact import ExactIndex
from fullrank.retrieval.hierarchy.health import recall
from fullrank.retrieval.vectors.base import VectorIndex
from fullrank.retrieval.vectors.graph import GraphIndex


class Audit(NamedTuple):
    """What an index finds.

    Attributes:
        recall: share of the k best items of the queries that searches find.
        own: share of items that a search for their own vector returns among its k, unless k others have a larger
            product with it.
        reachable: share of items that a walk along the links of a graph can come to from the one where searches begin;
            None for what is no graph, or does not show its links.
        cost: items scored per query.
    """

    recall: float
    own: float
    reachable: float | None
    cost: int


def audit(index: VectorIndex, queries_QD: Tensor | None = None, *, k: int = 100, sample: int = 200) -> Audit:
    """Hold an index against scoring all of its items.

    Args:
        queries_QD: default the index's typical queries, or vectors of items.
        sample: items whose own vectors are searched, and queries where none are given, drawn at random.

    Raises:
        ValueError: if the index is empty.
    """
    keys_I, vectors_ID = index.contents()
    if not len(keys_I):
        raise ValueError("an empty index cannot be audited")
    exact = ExactIndex(index.width)
    exact.add(keys_I, vectors_ID)
    rows = torch.randperm(len(keys_I), generator=torch.Generator().manual_seed(0))[:sample]
    own_QD, own_Q = vectors_ID[rows], keys_I[rows]
    if queries_QD is None:
        queries_QD = own_QD if index.typical_QD is None else index.typical_QD
    best_QK = exact.search(queries_QD, k).item_keys_BK
    found = index.search(queries_QD, k)
    wanted_Q = (exact.search(own_QD, k).item_keys_BK == own_Q[:, None]).any(1)
    found_Q = (index.search(own_QD, k).item_keys_BK == own_Q[:, None]).any(1)
    own = float(found_Q[wanted_Q].double().mean()) if bool(wanted_Q.any()) else 1.0
    return Audit(recall(found.item_keys_BK, best_QK), own, reachable(index), round(float(found.cost_B.double().mean())))


def reachable(index: VectorIndex) -> float | None:
    """Share of the items of a graph's snapshot that links of the lowest level lead to from where searches begin."""
    if not isinstance(index, GraphIndex) or index.snapshot is None:
        return None
    found = index.links()
    if found is None:
        return None
    links_SL, entry = found
    seen_S = torch.zeros(len(links_SL), dtype=torch.bool)
    front = torch.tensor([entry])
    while front.numel():
        seen_S[front] = True
        following = links_SL[front].flatten()
        following = torch.unique(following[following >= 0])
        front = following[~seen_S[following]]
    return float(seen_S.double().mean())
