"""Exact search of the largest inner products that leaves out what provably is not among them."""

# Shapes: B users, L leaves of a segment, I its rows, D width.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.retrieval.base import NO_ITEM
from fullrank.retrieval.hierarchy.ranges import Best, Ranges, Rows, scored
from fullrank.retrieval.hierarchy.scorer import DotProduct
from fullrank.retrieval.hierarchy.searching import IndexResult, SearchStats
from fullrank.retrieval.hierarchy.snapshot import Snapshot
from fullrank.retrieval.hierarchy.storage import ROWS_AT_ONCE, Segment

# Rows that are scored before the first bound is drawn; each further step takes as many as all before it.
FIRST_ROWS = 4096
# Of ‖u‖‖v‖: what float32 may be wrong by.
SLACK = 1e-5


@dataclass(frozen=True)
class _Bounds:
    """What bounds u·v in each leaf of a segment.

    Attributes:
        centres_LD: q, the mean of its rows.
        radius_L: R, the largest ‖v - q‖.
        norm_I: ‖v‖, falling within each leaf.
    """

    centres_LD: Tensor
    radius_L: Tensor
    norm_I: Tensor

    @classmethod
    def of(cls, segment: Segment) -> _Bounds:
        size_L = segment.offsets_L1.diff()
        centres_LD = (segment.sums() / size_L[:, None]).float()
        radius_L, norms = torch.zeros(len(centres_LD)), []
        of_I = torch.arange(len(centres_LD)).repeat_interleave(size_L)
        blocks = zip(torch.split(segment.vectors_ID, ROWS_AT_ONCE), torch.split(of_I, ROWS_AT_ONCE), strict=True)
        for rows, of in blocks:
            radius_L.scatter_reduce_(0, of, (rows - centres_LD[of]).norm(dim=1), "amax")
            norms.append(rows.norm(dim=1))
        return cls(centres_LD, radius_L, torch.cat(norms))


@torch.no_grad()
def certified_search(snapshot: Snapshot, users_BD: Tensor, k: int) -> IndexResult:
    """The k items of the largest u·v of each user.

    Within a leaf, u·v <= u·q + ‖u‖R and u·v <= ‖u‖‖v‖. Leaves are scored in falling order of the smaller of the two for
    their longest vector, and of each only the rows that are long enough; what is bounded by less than the k-th score so
    far cannot be among the k. On data without strong clusters most items must be scored: it proves, it does not hurry.
    Removed items may keep R larger than it need be.

    Raises:
        ValueError: if a user's vector is not finite.
    """
    finite_B = torch.isfinite(users_BD).all(1)
    if not bool(finite_B.all()):
        raise ValueError(f"the vector of user {int((~finite_B).nonzero()[0])} has a NaN or infinite number")
    users, k = users_BD.shape[0], min(k, len(snapshot))
    keys_BK, scores_BK = torch.full((users, k), NO_ITEM), torch.full((users, k), -torch.inf)
    items_B = torch.zeros(users, dtype=torch.int64)
    leaves = 0
    if k:
        leaves = sum(segment.leaves_L.numel() for segment in snapshot.segments)
        for row in range(users):
            best, items_B[row] = _of_one(snapshot, users_BD[row : row + 1], k)
            keys_BK[row], scores_BK[row] = best.keys_BK[0], best.scores_BK[0]
    nodes_BN = torch.zeros((users, len(snapshot.tree.levels)), dtype=torch.int64)
    nodes_BN[:, -1] = leaves
    flops = 2 * users_BD.shape[1] * int(nodes_BN.sum() + items_B.sum())
    return IndexResult(
        keys_BK, scores_BK, SearchStats(nodes_BN, items_B, flops, snapshot.index_version, snapshot.model_version)
    )


def _of_one(snapshot: Snapshot, user_1D: Tensor, k: int) -> tuple[Best, int]:
    best, items = Best.none(1), 0
    norm = float(user_1D.norm())
    for segment in snapshot.segments:
        bounds: _Bounds = segment.fact("bounds", lambda of=segment: _Bounds.of(of))  # type: ignore[misc]
        longest_L = bounds.norm_I[segment.offsets_L1[:-1]]
        ball_L = (bounds.centres_LD @ user_1D[0]) + norm * bounds.radius_L
        bound_L = torch.minimum(ball_L, norm * longest_L) + SLACK * norm * longest_L
        bound_L, leaf_L = bound_L.sort(descending=True)
        done, wanted = 0, FIRST_ROWS
        while done < leaf_L.numel():
            bar = float(best.scores_BK[0, k - 1]) if best.scores_BK.shape[1] == k else -torch.inf
            some_L = leaf_L[done : done + int((bound_L[done:] >= bar).sum())]
            if not some_L.numel():
                break
            begin_L = segment.offsets_L1[some_L]
            size_L = _long_enough(bounds.norm_I, begin_L, segment.offsets_L1[some_L + 1], bar / norm if norm else -1.0)
            taken = max(1, int((size_L.cumsum(0) <= wanted).sum()))
            begin_J, order_J = begin_L[:taken].sort()
            ranges = Ranges(begin_J[None], size_L[:taken][order_J][None])
            stored = Rows(segment.vectors_ID, _products, segment.living_I)
            scores_BW, live_BW = scored(ranges, stored, _SCORER, user_1D)

            def keys_of(columns: Tensor, some: slice, of: Segment = segment, ranges: Ranges = ranges) -> Tensor:
                return of.keys_I[ranges.rows(columns)]

            if scores_BW.shape[1]:
                best = best.with_more(scores_BW, live_BW, keys_of, k)
            items += scores_BW.shape[1]
            done += taken
            wanted = max(wanted, items)
    return best, items


_SCORER = DotProduct()


def _products(user_1D: Tensor, vectors_ID: Tensor) -> Tensor:
    return user_1D @ vectors_ID.T


def _long_enough(norm_I: Tensor, begin_L: Tensor, end_L: Tensor, least: float) -> Tensor:
    """How many rows at the beginning of each range have a norm of at least `least`, or a rounding error less."""
    low_L, high_L = begin_L.clone(), end_L.clone()
    least -= SLACK * abs(least)
    while bool((low_L < high_L).any()):
        middle_L = (low_L + high_L) // 2
        long_L = norm_I[middle_L.clamp_max(norm_I.numel() - 1)] >= least
        open_L = low_L < high_L
        low_L = torch.where(open_L & long_L, middle_L + 1, low_L)
        high_L = torch.where(open_L & ~long_L, middle_L, high_L)
    return low_L - begin_L
