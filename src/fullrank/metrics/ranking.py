"""Metrics of ranked lists and of the agreement between stages of a funnel."""

# Shapes: B requests, N candidates, K list length.

from __future__ import annotations

import torch
from torch import Tensor


def _top(scores_BN: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores of each row, ties by lower index; all of them if there are fewer."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return torch.argsort(scores_BN, dim=1, descending=True, stable=True)[:, :k]


def recall_at_k(ranked_BK: Tensor, relevant_B: Tensor, k: int) -> float:
    """Share of rows whose one relevant id is among the first k of its list.

    Args:
        ranked_BK: int64 ids, best first.
        relevant_B: int64 id.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return float((ranked_BK[:, :k] == relevant_B[:, None]).any(1).double().mean())


def ndcg_at_k(scores_BN: Tensor, gains_BN: Tensor, k: int) -> float:
    """Normalised discounted cumulative gain with log2 discounts; rows without any gain are left out.

    Source: Järvelin & Kekäläinen, Cumulated Gain-Based Evaluation of IR Techniques, TOIS 2002 (linear gains).
    """
    discount = 1 / torch.log2(torch.arange(2, min(k, scores_BN.shape[1]) + 2, dtype=torch.float64))
    gains_BN = gains_BN.double()
    got = (gains_BN.gather(1, _top(scores_BN, k)) * discount).sum(1)
    best = (gains_BN.gather(1, _top(gains_BN, k)) * discount).sum(1)
    kept = best > 0
    if not bool(kept.any()):
        raise ValueError("NDCG is undefined: no row has a positive gain")
    return float((got[kept] / best[kept]).mean())


def ads_recall(final_BN: Tensor, early_BN: Tensor, k: int, n: int) -> float:
    """Share of the final stage's top k that the early stage keeps in its top n, averaged over requests.

    Args:
        final_BN: value of each candidate by the final stage.
        early_BN: value by the early stage.
    """
    kept = torch.zeros_like(final_BN, dtype=torch.bool).scatter_(1, _top(early_BN, n), True)
    return float(kept.gather(1, _top(final_BN, k)).double().mean())


def value_recall(final_BN: Tensor, early_BN: Tensor, k: int, n: int) -> float:
    """Value of the best k among the early stage's top n over the value of the best k of all; values non-negative."""
    kept = torch.zeros_like(final_BN, dtype=torch.bool).scatter_(1, _top(early_BN, n), True)
    value_BN = final_BN.double()
    reachable = torch.where(kept, value_BN, torch.zeros_like(value_BN))
    got = reachable.gather(1, _top(reachable, k)).sum(1)
    best = value_BN.gather(1, _top(value_BN, k)).sum(1)
    return float(got.sum() / best.sum())


def pair_consistency(first_BN: Tensor, second_BN: Tensor) -> float:
    """Share of candidate pairs that two stages order alike, over the pairs that neither ties."""
    first = torch.sign(first_BN[:, :, None] - first_BN[:, None, :])
    second = torch.sign(second_BN[:, :, None] - second_BN[:, None, :])
    product = first * second
    decided = (product != 0).sum()
    if int(decided) == 0:
        raise ValueError("consistency is undefined: every pair is tied in one of the stages")
    return float((product > 0).sum() / decided)
