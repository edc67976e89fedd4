"""What networks over towers learn from: impressions with labels, positives among sampled items, a teacher."""

# Shapes: B users, I items of a step, T tasks.

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def log_inclusion(frequency_I: Tensor, rows: int, uniform: int = 0, catalogue: int = 1) -> Tensor:
    """log Q of items: the probability of being among those of a step.

    An item comes as one of `rows` positives, with its `frequency` each, or as one of `uniform` further items, drawn
    from all `catalogue` items alike: 1 - Q = (1 - q)^rows (1 - 1 / catalogue)^uniform.

    Raises:
        ValueError: if a size is out of range.
    """
    if rows < 1 or uniform < 0 or catalogue < 1:
        raise ValueError(f"rows {rows}, uniform {uniform}, catalogue {catalogue}: expected at least 1, 0 and 1")
    absent_I = rows * torch.log1p(-frequency_I.double().clamp(1e-12, 1 - 1e-12))
    if uniform:
        absent_I = absent_I + uniform * math.log1p(-1 / max(catalogue, 2))
    return torch.log(-torch.expm1(absent_I)).to(frequency_I.dtype)


def sampled_softmax(logits_BI: Tensor, own_B: Tensor, log_q_I: Tensor | None = None) -> Tensor:
    """Cross-entropy of each user's own item among the distinct items of the step, on s - log Q.

    The correction is subtracted, from the positive too: frequent items are negatives more often than they deserve, and
    so are lent that much. Scores then converge to log P(item | user), up to a number of the user's; added instead, they
    would lean from popularity twice as far as without. Items are distinct, so none is a negative of itself.

    Args:
        own_B: int64, column of each user's own item.
        log_q_I: of `log_inclusion`; no correction when omitted.

    Source: Yi et al., Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations, RecSys 2019;
    Yang et al., Mixed Negative Sampling for Learning Two-tower Neural Networks in Recommendations, WWW 2020.
    """
    return F.cross_entropy(logits_BI if log_q_I is None else logits_BI - log_q_I, own_B)


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross-entropy of predictions to a teacher's, for pairs that nobody labelled; both are logits."""
    return F.binary_cross_entropy_with_logits(logits, torch.sigmoid(teacher.detach()))


def tail_target(member_logits: Tensor, top: int) -> Tensor:
    """What a node should say to be found for its best item: the mean of the `top` largest of sampled members, dim -1.

    Cross-entropy teaches a node the mean over its members; a search needs to know where the best are.
    """
    return member_logits.topk(min(top, member_logits.shape[-1]), dim=-1).values.mean(-1)


def tail_loss(logits_BS: Tensor, wanted_BS: Tensor) -> Tensor:
    """Smooth L1 distance of nodes to `tail_target`, weighted by each user's softmax of the latter.

    A search turns on the few best nodes of a user; weighted alike, the many that it never enters decide.
    """
    distance_BS = F.smooth_l1_loss(logits_BS, wanted_BS, reduction="none")
    return (torch.softmax(wanted_BS, 1) * distance_BS).sum(1).mean()
