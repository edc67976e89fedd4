"""Area under the ROC curve, over all rows (AUC) and inside groups (GAUC); exact, ties count half."""

# Shapes: n rows, G groups.

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fullrank.metrics.rows import checked

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Weighting = Literal["impressions", "clicks", "uniform"]


def auc(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Probability that a random positive outranks a random negative, ties counting half (Mann-Whitney).

    Args:
        scores: shape (n,), any increasing transform of the prediction.
        labels: shape (n,), in [0, 1]; a fractional label counts as that much of a positive and the rest of a negative.
        weights: shape (n,), non-negative.

    Returns:
        NaN, with a warning, if one class is absent or weighs nothing.

    Raises:
        ValueError: as `log_loss`.
    """
    value = float(_areas(scores, labels, None, weights).auc_G[0])
    if math.isnan(value):
        warnings.warn("AUC is undefined: one class is absent", stacklevel=2)
    return value


class GroupedAUC(NamedTuple):
    """GAUC, how many groups had both classes, and how many there are."""

    value: float
    groups_used: int
    groups: int


def gauc(
    scores: Tensor,
    labels: Tensor,
    groups: Tensor,
    weights: Tensor | None = None,
    *,
    weighting: Weighting = "impressions",
) -> GroupedAUC:
    """AUC inside each group (user), averaged over the groups that have both classes.

    Args:
        scores, labels, weights: as for `auc`.
        groups: shape (n,), integer key of each row's group.
        weighting: a group counts by its rows (DIN's code), its positive rows (InterFormer), or once; rows by weight.

    Returns:
        Value NaN, with a warning, if no group has both classes.

    Raises:
        ValueError: as `log_loss`; if the groups are not integers or of another shape, or the weighting is unknown.

    Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018, section 5.3.
    """
    if groups.shape != scores.shape:
        raise ValueError(f"groups have shape {tuple(groups.shape)}, expected that of the scores {tuple(scores.shape)}")
    if groups.is_floating_point() or groups.is_complex():
        raise ValueError(f"groups must be integers, got {groups.dtype}")
    parts = _areas(scores, labels, groups, weights)
    share = {"impressions": parts.mass_G, "clicks": parts.positive_G, "uniform": np.ones_like(parts.mass_G)}
    if weighting not in share:
        raise ValueError(f'weighting is "{weighting}", expected one of {", ".join(share)}')
    used = ~np.isnan(parts.auc_G)
    if not used.any():
        warnings.warn("GAUC is undefined: no group has both classes", stacklevel=2)
        return GroupedAUC(math.nan, 0, used.size)
    value = np.average(parts.auc_G[used], weights=share[weighting][used])
    return GroupedAUC(float(value), int(used.sum()), used.size)


class _Areas(NamedTuple):
    auc_G: Doubles
    mass_G: Doubles
    positive_G: Doubles


def _areas(scores: Tensor, labels: Tensor, groups: Tensor | None, weights: Tensor | None) -> _Areas:
    """AUC of each group by one sort on (group, score), packed into one integer, and sums over runs of equals."""
    unweighted = weights is None
    scores, labels, weights = checked(scores, labels, weights)
    y, w = labels.numpy(), weights.numpy()
    key = _ascending_integers(scores)
    if groups is not None:
        key += _small_integers(groups) << 32
    if unweighted and bool(((y == 0) | (y == 1)).all()):
        # The label rides along as the lowest bit: sorting values is several times cheaper than sorting positions.
        key <<= 1
        key += y.astype(np.int64)
        key.sort()
        positive = (key & 1).astype(np.float64)
        negative = 1 - positive
        key >>= 1
    else:
        order = np.argsort(key)
        key, positive, negative = key[order], (w * y)[order], (w * (1 - y))[order]
    ties = run_starts(key)
    tie_positive, tie_negative = np.add.reduceat(positive, ties), np.add.reduceat(negative, ties)
    starts = run_starts(key[ties] >> 32)
    lengths = np.diff(np.append(starts, len(ties)))
    total_positive, total_negative = np.add.reduceat(tie_positive, starts), np.add.reduceat(tie_negative, starts)
    mass_G, positive_G = total_positive + total_negative, total_positive
    if not unweighted:
        # Powers of two, so exact: one sum runs over all groups below, and a heavy group must not drown a light one.
        tie_positive, total_positive = _scaled(tie_positive, total_positive, lengths)
        tie_negative, total_negative = _scaled(tie_negative, total_negative, lengths)
    # Negatives ranked below each tie, counted from the start of its group.
    below = np.cumsum(tie_negative) - tie_negative
    below -= np.repeat(below[starts], lengths)
    won = np.add.reduceat(tie_positive * (below + 0.5 * tie_negative), starts)
    with np.errstate(invalid="ignore"):
        return _Areas(won / (total_positive * total_negative), mass_G, positive_G)


def _ascending_integers(scores: Tensor) -> Integers:
    """Integers from 0 to below 2**32 that sort and tie as the scores do."""
    if scores.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return np.unique(scores.numpy(), return_inverse=True)[1].astype(np.int64)
    # 0.0 + -0.0 is 0.0: the two zeros have other bits but are equal.
    bits = (scores.float().numpy() + np.float32(0)).view(np.int32)
    # A float's bits, read as an integer, ascend with it from 0.0 up and descend below: turn the latter round.
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    return bits.astype(np.int64) + (1 << 31)


def _small_integers(groups: Tensor) -> Integers:
    """Integers from 0 to below 2**30, equal where the groups are."""
    group = groups.detach().cpu().numpy().astype(np.int64)
    if int(group.min()) < 0 or int(group.max()) >= 1 << 30:
        group = np.unique(group, return_inverse=True)[1].astype(np.int64)
    return group


def run_starts(values: Integers) -> Integers:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))


def _scaled(part: Doubles, total_G: Doubles, lengths_G: Integers) -> tuple[Doubles, Doubles]:
    """Both over a power of two that brings the total of each group, if not 0, into [1/2, 1)."""
    exponent_G = np.frexp(total_G)[1]
    return np.ldexp(part, -np.repeat(exponent_G, lengths_G)), np.ldexp(total_G, -exponent_G)
