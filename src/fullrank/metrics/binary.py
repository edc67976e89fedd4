"""Metrics of predicted probabilities: cross-entropy, normalized entropy, calibration.

Computed in float64 on the CPU, wherever the tensors live.
"""

# Shapes: n rows, K bins.

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fullrank.metrics.rows import checked

Background = Literal["eval", "train"] | float


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-y ln p - (1 - y) ln(1 - p) of each row, in float64 and accurate to rounding however large the logit.

    `torch.nn.functional.softplus` will not do: it drops its tail above 20, all that a confident right answer costs.
    """
    z, y = logits.double(), labels.double()
    return torch.where(z > 0, (1 - y) * z, -y * z) + torch.log1p(torch.exp(-z.abs()))


def log_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Weighted mean cross-entropy in nats.

    Args:
        logits: shape (n,), log-odds.
        labels: shape (n,), in [0, 1].
        weights: shape (n,), non-negative; equal when omitted.

    Raises:
        ValueError: if there are no rows, shapes differ, a logit is not finite, a label is outside [0, 1], a weight is
            negative or not finite, or all weights are zero. Every metric of this file raises for these.
    """
    z, y, w = checked(logits, labels, weights)
    return float((w * cross_entropy(z, y)).sum() / w.sum())


def binary_entropy(rate: float) -> float:
    """Entropy in nats of a coin that shows 1 with probability `rate`."""
    if rate in (0.0, 1.0):
        return 0.0
    return -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)


def background_rate(background: Background, eval_rate: float, train_rate: float | None) -> float:
    """The base rate that a normalized entropy is held against.

    Raises:
        ValueError: if it is asked of the training data without `train_rate`, `train_rate` is given and not asked for,
            or the rate lies outside [0, 1].
    """
    if background not in ("eval", "train") and isinstance(background, str):
        raise ValueError(f'background is "{background}", expected "eval", "train" or a rate')
    if (background == "train") != (train_rate is not None):
        raise ValueError('train_rate, the mean label of the training data, and background "train" need each other')
    rate = eval_rate if background == "eval" else train_rate if background == "train" else background
    assert not isinstance(rate, str) and rate is not None
    if not 0 <= rate <= 1:
        raise ValueError(f"the background rate must lie in [0, 1], got {rate}")
    return rate


def normalized_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    background: Background = "eval",
    train_rate: float | None = None,
) -> float:
    """Cross-entropy of the predictions over the entropy of the base rate; below 1 beats predicting the mean.

    Predicting the evaluated rows' own rate costs exactly 1 with the background "eval"; with a fixed background it costs
    1 only where the two rates agree.

    Args:
        logits: shape (n,), log-odds.
        labels: shape (n,), in [0, 1].
        weights: shape (n,), non-negative; equal when omitted.
        background: where the base rate comes from: the weighted mean of `labels` ("eval"), the training data
            ("train", given as `train_rate`), or a rate. A fixed one compares models across evaluation sets.
        train_rate: mean label of the training data.

    Returns:
        NaN, with a warning, if the base rate is 0 or 1.

    Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014, section 2.2.
    """
    _, y, w = checked(logits, labels, weights)
    rate = background_rate(background, float((w * y).sum() / w.sum()), train_rate)
    entropy = binary_entropy(rate)
    if entropy == 0:
        warnings.warn("normalized entropy is undefined: the base rate is 0 or 1", stacklevel=2)
        return math.nan
    return log_loss(logits, labels, weights) / entropy


def relative_information_gain(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    background: Background = "eval",
    train_rate: float | None = None,
) -> float:
    """1 - normalized entropy: the share of the base rate's entropy that the predictions explain; higher is better."""
    return 1 - normalized_entropy(logits, labels, weights, background=background, train_rate=train_rate)


def normalized_entropy_gain(baseline: float, candidate: float) -> float:
    """Relative reduction of the normalized entropy in percent; positive: the candidate is better.

    Papers that print an "NE diff" in which negative is better print minus this.

    Raises:
        ValueError: if the baseline's normalized entropy is not positive.
    """
    if baseline <= 0:
        raise ValueError(f"the normalized entropy of the baseline must be positive, got {baseline}")
    return 100 * (baseline - candidate) / baseline


def calibration(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Sum of predicted probabilities over sum of labels: above 1 predicts too much; NaN, with a warning, if no label is
    positive."""
    z, y, w = checked(logits, labels, weights)
    actual = float((w * y).sum())
    if actual == 0:
        warnings.warn("calibration is undefined: there is no positive label", stacklevel=2)
        return math.nan
    return float((w * torch.sigmoid(z.double())).sum()) / actual


class Reliability(NamedTuple):
    """Mean prediction, mean label and rows (their weight) of each bin that is not empty, lowest predictions first."""

    predicted_K: Tensor
    observed_K: Tensor
    rows_K: Tensor


def reliability(logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, bins: int = 10) -> Reliability:
    """The calibration curve over bins of equal mass.

    Equal predictions share a bin, the one of their middle: the curve does not depend on the order of the rows, and a
    constant prediction is one bin.

    Raises:
        ValueError: if `bins` is below 1, or as `log_loss`.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    scores, labels, weights = checked(logits, labels, weights)
    z = scores.double().numpy()
    order = np.argsort(z)
    z, y, w = z[order], labels.numpy()[order], weights.numpy()[order]
    ties = np.flatnonzero(np.concatenate(([True], z[1:] != z[:-1])))
    mass_of_tie = np.add.reduceat(w, ties)
    middle = np.cumsum(mass_of_tie) - mass_of_tie / 2
    # The total of the same running sum, so that rounding cannot put the last middle beyond it.
    bin_of_tie = np.minimum((middle / (middle[-1] + mass_of_tie[-1] / 2) * bins).astype(np.int64), bins - 1)
    starts = ties[np.flatnonzero(np.concatenate(([True], bin_of_tie[1:] != bin_of_tie[:-1])))]
    p = torch.sigmoid(torch.from_numpy(z)).numpy()
    mass, predicted, observed = (np.add.reduceat(values, starts) for values in (w, w * p, w * y))
    kept = mass > 0
    return Reliability(
        *(
            torch.from_numpy(values)
            for values in (predicted[kept] / mass[kept], observed[kept] / mass[kept], mass[kept])
        )
    )


def expected_calibration_error(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, bins: int = 20
) -> float:
    """Mean distance of predicted and observed rate over the bins of `reliability`.

    Source: Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015.
    Deviation: there with bins of equal width; here of equal mass, because click probabilities crowd near zero.
    """
    curve = reliability(logits, labels, weights, bins=bins)
    return float(((curve.predicted_K - curve.observed_K).abs() * curve.rows_K).sum() / curve.rows_K.sum())
