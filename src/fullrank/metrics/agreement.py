"""How well one stage of a funnel stands in for the next: what it keeps of the best, and how alike the two order."""

# Shapes: B requests, N candidates.

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.metrics.ranking import same_candidates, top

# Scores whose pairs are counted at a time; bounds the memory, about 100 bytes each.
SCORES_AT_ONCE = 1 << 20


def ads_recall(final_BN: Tensor, early_BN: Tensor, k: int, n: int) -> float:
    """Share of the final stage's top k that the early stage's top n keeps, averaged over requests.

    Args:
        final_BN: value of each candidate by the final stage.
        early_BN: value by the early stage. Ties in either are broken by lower index.
        k: all candidates, with a warning, if there are fewer.
        n: all candidates, if there are fewer.

    Raises:
        ValueError: if k or n is below 1, shapes differ, or a value is NaN.
    """
    final_BN, early_BN = same_candidates(final_BN, early_BN)
    _warn_if_fewer(final_BN, k)
    return float(_kept(early_BN, n).gather(1, top(final_BN, k)).double().mean())


def value_recall(final_BN: Tensor, early_BN: Tensor, k: int, n: int) -> float:
    """Value of the best k among the early stage's top n over the value of the best k of all, both summed over requests.

    Args:
        final_BN, early_BN, k, n: as for `ads_recall`; final values finite, perhaps negative.

    Returns:
        At most 1; NaN, with a warning, if the best k are not worth more than nothing.

    Raises:
        ValueError: as `ads_recall`, or if a final value is infinite.
    """
    final_BN, early_BN = same_candidates(final_BN, early_BN)
    if not bool(final_BN.isfinite().all()):
        raise ValueError("final values contain infinity")
    _warn_if_fewer(final_BN, k)
    value_BN = final_BN.double()
    reachable_BN = value_BN.masked_fill(~_kept(early_BN, n), -math.inf)
    best = float(value_BN.gather(1, top(value_BN, k)).sum())
    if best <= 0:
        warnings.warn("value recall is undefined: the best candidates have no positive value", stacklevel=2)
        return math.nan
    return float(value_BN.gather(1, top(reachable_BN, min(k, n))).sum()) / best


def _kept(early_BN: Tensor, n: int) -> Tensor:
    """Which candidates are among the early stage's top n."""
    return torch.zeros_like(early_BN, dtype=torch.bool).scatter_(1, top(early_BN, n), True)


def _warn_if_fewer(final_BN: Tensor, k: int) -> None:
    if k > final_BN.shape[1]:
        warnings.warn(f"there are only {final_BN.shape[1]} candidates for k = {k}: all are used", stacklevel=3)


def pair_consistency(first_BN: Tensor, second_BN: Tensor) -> float:
    """Share of candidate pairs that two stages order alike, over the pairs of all requests that neither ties.

    Returns:
        NaN, with a warning, if every pair is tied by one of the stages.

    Raises:
        ValueError: if shapes differ or a score is NaN.
    """
    pairs = _pairs(first_BN, second_BN)
    alike, opposite = int(pairs.alike_B.sum()), int(pairs.opposite_B.sum())
    if alike + opposite == 0:
        warnings.warn("consistency is undefined: every pair is tied by one of the stages", stacklevel=2)
        return math.nan
    return alike / (alike + opposite)


def kendall_tau(first_BN: Tensor, second_BN: Tensor) -> float:
    """Kendall's tau-b of two stages' scores within each request, averaged over the requests where it is defined.

    Returns:
        From -1 (opposite orders) to 1 (the same order); NaN, with a warning, if in every request one stage ties all
        candidates.

    Raises:
        ValueError: if shapes differ or a score is NaN.

    Source: Kendall, The treatment of ties in ranking problems, Biometrika 1945.
    """
    pairs = _pairs(first_BN, second_BN)
    scale_B = pairs.first_untied_B.double().sqrt() * pairs.second_untied_B.double().sqrt()
    kept_B = scale_B > 0
    if not bool(kept_B.any()):
        warnings.warn("Kendall's tau is undefined: in every request one stage ties all candidates", stacklevel=2)
        return math.nan
    return float(((pairs.alike_B - pairs.opposite_B)[kept_B] / scale_B[kept_B]).mean())


class _Pairs(NamedTuple):
    """Pairs of candidates of each request: ordered alike, ordered oppositely, not tied by the first, by the second."""

    alike_B: Tensor
    opposite_B: Tensor
    first_untied_B: Tensor
    second_untied_B: Tensor


def _pairs(first_BN: Tensor, second_BN: Tensor) -> _Pairs:
    """Counts all pairs in O(N log N log N) for each request."""
    first_BN, second_BN = same_candidates(first_BN, second_BN)
    n = first_BN.shape[1]
    rows = max(1, SCORES_AT_ONCE // n)
    counts = []
    for begin in range(0, len(first_BN), rows):
        first_rank, second_rank = (_ranks(scores_BN[begin : begin + rows]) for scores_BN in (first_BN, second_BN))
        both, order = (first_rank * n + second_rank).sort(1)
        # Sorted by the first stage, and by the second where the first ties, opposite pairs are the second's inversions.
        opposite = _inversions(second_rank.gather(1, order))
        all_pairs = n * (n - 1) // 2
        first_untied, second_untied, differ = (
            all_pairs - _equal_pairs(ranks) for ranks in (both // n, second_rank.sort(1).values, both)
        )
        alike = first_untied + second_untied - differ - opposite
        counts.append(torch.stack([alike, opposite, first_untied, second_untied]))
    return _Pairs(*torch.cat(counts, 1))


def _ranks(scores_BN: Tensor) -> Tensor:
    """0 for the lowest score of the row, 1 for the next; equal scores share one."""
    ordered_BN, order_BN = scores_BN.sort(1)
    rises_BN = torch.zeros_like(order_BN)
    rises_BN[:, 1:] = ordered_BN[:, 1:] != ordered_BN[:, :-1]
    return torch.empty_like(order_BN).scatter_(1, order_BN, rises_BN.cumsum(1))


def _run_starts(sorted_BN: Tensor) -> Tensor:
    """For each element of a sorted row, where the run of its equals begins."""
    starts_BN = torch.zeros_like(sorted_BN)
    starts_BN[:, 1:] = (sorted_BN[:, 1:] != sorted_BN[:, :-1]) * torch.arange(1, sorted_BN.shape[1])
    return starts_BN.cummax(1).values


def _equal_pairs(sorted_BN: Tensor) -> Tensor:
    return (torch.arange(sorted_BN.shape[1]) - _run_starts(sorted_BN)).sum(1)


def _inversions(ranks_BN: Tensor) -> Tensor:
    """Pairs of each row in which a higher rank stands before a lower one.

    Such a pair agrees in its highest bits down to the first that differs. So, from the highest bit on: count the ones
    that stand before a zero among ranks that agree so far, then part zeros from ones there, keeping their order.
    """
    count_B = torch.zeros(len(ranks_BN), dtype=torch.int64)
    for bit in reversed(range(ranks_BN.shape[1].bit_length())):
        one_BN = (ranks_BN >> bit) & 1
        before_BN = one_BN.cumsum(1) - one_BN
        before_BN -= before_BN.gather(1, _run_starts(ranks_BN >> (bit + 1)))
        count_B += (before_BN * (1 - one_BN)).sum(1)
        ranks_BN = ranks_BN.gather(1, (ranks_BN >> bit).argsort(dim=1, stable=True))
    return count_B
