"""Metrics of ranked lists."""

# Shapes: B requests, N candidates, K list length, R relevant ids.

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor


def recall_at_k(ranked_BK: Tensor, relevant_BR: Tensor, k: int) -> float:
    """Share of each row's relevant ids that are among the first k of its list, averaged over rows.

    Args:
        ranked_BK: int64 ids, best first, padded with -1 where a list is shorter than the longest.
        relevant_BR: int64 ids, distinct within a row and padded with -1, or shape (B,), one for each row. Rows without
            any are left out.
        k: the whole list, if it is shorter.

    Returns:
        NaN, with a warning, if no row has a relevant id.

    Raises:
        ValueError: if k is below 1, an id is not an integer, or the numbers of rows differ.
    """
    hit_BK, count_B = _hits(ranked_BK, relevant_BR, k)
    kept_B = count_B > 0
    if not bool(kept_B.any()):
        warnings.warn("recall is undefined: no row has a relevant id", stacklevel=2)
        return math.nan
    return float((hit_BK.sum(1)[kept_B] / count_B[kept_B].double()).mean())


def ranked_ndcg_at_k(ranked_BK: Tensor, relevant_BR: Tensor, k: int) -> float:
    """NDCG of lists of ids of which some are relevant, all equally: `ndcg_at_k` where not all candidates are scored.

    The best possible list begins with the relevant ids, whether they are among the candidates or not.

    Args:
        ranked_BK, relevant_BR, k: as in `recall_at_k`.

    Returns:
        NaN, with a warning, if no row has a relevant id.

    Raises:
        ValueError: as `recall_at_k`.
    """
    hit_BK, count_B = _hits(ranked_BK, relevant_BR, k)
    kept_B = count_B > 0
    if not bool(kept_B.any()):
        warnings.warn("NDCG is undefined: no row has a relevant id", stacklevel=2)
        return math.nan
    discount_K = 1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64))
    got_B = (hit_BK * discount_K[: hit_BK.shape[1]]).sum(1)
    best_B = discount_K.cumsum(0)[count_B[kept_B].clamp_max(k) - 1]
    return float((got_B[kept_B] / best_B).mean())


def _hits(ranked_BK: Tensor, relevant_BR: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which of the first k ids of each row are relevant, and how many relevant ids it has."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if ranked_BK.is_floating_point() or relevant_BR.is_floating_point():
        raise ValueError(f"ids must be integers, got {ranked_BK.dtype} and {relevant_BR.dtype}")
    ranked_BK, relevant_BR = ranked_BK.cpu()[:, :k], relevant_BR.cpu()
    relevant_BR = relevant_BR[:, None] if relevant_BR.ndim == 1 else relevant_BR
    if ranked_BK.ndim != 2 or relevant_BR.ndim != 2 or len(ranked_BK) != len(relevant_BR):
        raise ValueError(f"lists of shape {tuple(ranked_BK.shape)} do not fit relevant ids {tuple(relevant_BR.shape)}")
    hit_BK = torch.zeros(ranked_BK.shape, dtype=torch.bool)
    for relevant_B in relevant_BR.unbind(1):
        found_BK = ranked_BK == relevant_B[:, None]
        hit_BK |= found_BK & (found_BK.cumsum(1) == 1)  # an id that is listed twice is found once
    return hit_BK & (ranked_BK != -1), (relevant_BR != -1).sum(1)


def ndcg_at_k(scores_BN: Tensor, gains_BN: Tensor, k: int) -> float:
    """Discounted cumulative gain of the first k over the best possible one, averaged over the rows with any gain.

    Discounts are 1 / log2(position + 1). Gains count linearly; for the exponential form give `2**relevance - 1`.

    Args:
        scores_BN: what the list is sorted by, ties by lower index.
        gains_BN: non-negative worth of each candidate.
        k: all candidates, if there are fewer.

    Returns:
        NaN, with a warning, if no row has a positive gain.

    Raises:
        ValueError: if k is below 1, shapes differ, a score is NaN, or a gain is negative or not finite.

    Source: Järvelin & Kekäläinen, Cumulated Gain-Based Evaluation of IR Techniques, TOIS 2002.
    """
    scores_BN, gains_BN = same_candidates(scores_BN, gains_BN)
    if not bool(((gains_BN >= 0) & gains_BN.isfinite()).all()):
        raise ValueError("gains must be finite and non-negative")
    gains_BN = gains_BN.double()
    got_BK, best_BK = (gains_BN.gather(1, top(order, k)) for order in (scores_BN, gains_BN))
    discount_K = 1 / torch.log2(torch.arange(2, got_BK.shape[1] + 2, dtype=torch.float64))
    got_B, best_B = (got_BK * discount_K).sum(1), (best_BK * discount_K).sum(1)
    kept_B = best_B > 0
    if not bool(kept_B.any()):
        warnings.warn("NDCG is undefined: no row has a positive gain", stacklevel=2)
        return math.nan
    return float((got_B[kept_B] / best_B[kept_B]).mean())


def same_candidates(first_BN: Tensor, second_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU.

    Raises:
        ValueError: unless they are non-empty matrices of one shape without NaN.
    """
    for scores in (first_BN, second_BN):
        if scores.ndim != 2 or scores.shape != first_BN.shape or not scores.numel():
            shapes = f"{tuple(first_BN.shape)} and {tuple(second_BN.shape)}"
            raise ValueError(f"expected two non-empty matrices (requests, candidates) of one shape, got {shapes}")
        if bool(scores.isnan().any()):
            raise ValueError("scores contain NaN")
    return first_BN.detach().cpu(), second_BN.detach().cpu()


def top(scores_BN: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores of each row, ties by lower index; all of them if there are fewer.

    Raises:
        ValueError: if k is below 1.
    """
    if k < 1:
        raise ValueError(f"the length of a list must be at least 1, got {k}")
    return torch.argsort(scores_BN, dim=1, descending=True, stable=True)[:, :k]
