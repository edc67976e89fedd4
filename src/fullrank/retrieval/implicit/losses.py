"""Losses of implicit feedback: a pair at a time, or each user against the whole catalogue at once."""

# Shapes: B users of a batch, P pairs, Q pairs of the users of a batch, I items, D width of vectors.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank.bfloat16 import has_units

# Scores held at once by the losses over the whole catalogue.
SCORES_AT_ONCE = 20_000_000

# From scores_BI, which it may overwrite: a value for each row, its derivative by the scores but for a factor for each
# row, and that factor.
_RowLoss = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def bpr_loss(user_PD: Tensor, item_PD: Tensor, other_PD: Tensor) -> Tensor:
    """Mean of -log sigmoid(u·v - u·w), w an item that the user did not take.

    Source: Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, UAI 2009.
    """
    return F.softplus((user_PD * (other_PD - item_PD)).sum(1)).mean()


def softmax_loss(user_BD: Tensor, item_ID: Tensor, row_Q: Tensor, item_Q: Tensor) -> Tensor:
    """Mean over pairs of -log softmax(u·V) at the pair's item, the softmax being over the whole catalogue.

    All pairs of a user share one row of scores, which makes it a matrix product of B x I for Q pairs.

    Args:
        row_Q, item_Q: the pairs: rows of `user_BD`, in order, and of `item_ID`.
    """
    count_B = torch.bincount(row_Q, minlength=user_BD.shape[0]).float()
    return (
        _over_catalogue(user_BD, item_ID, count_B, _log_sum_exp) - _scores(user_BD, item_ID, row_Q, item_Q).sum()
    ) / (row_Q.numel())


def cosine_contrastive_loss(
    user_BD: Tensor, item_ID: Tensor, row_Q: Tensor, item_Q: Tensor, *, margin: float, negative_weight: float
) -> Tensor:
    """Mean over pairs of 1 - u·v + weight * mean over the catalogue of max(0, u·w - margin), all vectors of length 1.

    Deviation: the paper draws some hundred negatives for each pair; the mean over all items is the expectation of that,
    and is cheaper, as all pairs of a user share it.

    Source: Mao et al., SimpleX: A Simple and Strong Baseline for Collaborative Filtering, CIKM 2021.
    """
    count_B = torch.bincount(row_Q, minlength=user_BD.shape[0]).float()
    taken_Q = _scores(user_BD, item_ID, row_Q, item_Q)
    others = _over_catalogue(user_BD, item_ID, count_B, partial(_hinge, margin=margin))
    return (1 - taken_Q).mean() + negative_weight / (item_ID.shape[0] * row_Q.numel()) * others


def _scores(user_BD: Tensor, item_ID: Tensor, row_Q: Tensor, item_Q: Tensor) -> Tensor:
    return (user_BD.index_select(0, row_Q) * item_ID.index_select(0, item_Q)).sum(1)


def _log_sum_exp(scores_BI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    peak_B1 = scores_BI.amax(1, keepdim=True)
    exp_BI = scores_BI.sub_(peak_B1).exp_()
    sum_B = _sums(exp_BI)
    return sum_B.log() + peak_B1[:, 0].float(), exp_BI, 1 / sum_B


def _hinge(scores_BI: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    over_BI = scores_BI.sub_(margin).clamp_min_(0)
    value_B = _sums(over_BI)
    return value_B, over_BI.sign_(), torch.ones_like(value_B)


def _sums(x_BI: Tensor) -> Tensor:
    """Of each row, float32: bfloat16 is added up in float32 and then rounded, as `dtype=` would copy `x_BI` first."""
    return x_BI.sum(1).float()


def _over_catalogue(user_BD: Tensor, item_ID: Tensor, weight_B: Tensor, loss: _RowLoss) -> Tensor:
    """Sum over rows of weight * loss(u·V)."""
    total: Tensor = _OverCatalogue.apply(user_BD, item_ID, weight_B, loss)  # type: ignore[no-untyped-call]
    return total


class _OverCatalogue(torch.autograd.Function):
    """Value and gradient block by block, so that no B x I matrix outlives its block.

    Products are in bfloat16 where the processor has instructions for it, which makes them two to three times as fast.
    """

    @staticmethod
    def forward(ctx: Any, user_BD: Tensor, item_ID: Tensor, weight_B: Tensor, loss: _RowLoss) -> Tensor:
        dtype = torch.bfloat16 if has_units() else torch.float32
        items_ID = item_ID.to(dtype)
        block = max(1, SCORES_AT_ONCE // max(item_ID.shape[0], 1))
        by_user_BD, by_item_ID = torch.empty_like(user_BD), torch.zeros_like(item_ID)
        scores = torch.empty(min(block, user_BD.shape[0]), item_ID.shape[0], dtype=dtype)
        total = torch.zeros(())
        for begin in range(0, user_BD.shape[0], block):
            users_bD, weight_b = user_BD[begin : begin + block].to(dtype), weight_B[begin : begin + block]
            scores_bI = torch.mm(users_bD, items_ID.T, out=scores[: users_bD.shape[0]])
            value_b, slope_bI, factor_b = loss(scores_bI)
            total += (weight_b * value_b).sum()
            factor_b1 = (factor_b * weight_b)[:, None]
            by_user_BD[begin : begin + block] = (slope_bI @ items_ID).float() * factor_b1
            by_item_ID += (slope_bI.T @ (users_bD * factor_b1).to(dtype)).float()
        ctx.save_for_backward(by_user_BD, by_item_ID)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_user_BD, by_item_ID = ctx.saved_tensors
        return gradients[0] * by_user_BD, gradients[0] * by_item_ID, None, None
