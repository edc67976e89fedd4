"""Metrics of click predictions: cross-entropy, NE, AUC, GAUC, calibration."""

# Shapes: n rows, g groups, k bins.

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor


def _checked(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if logits.ndim != 1 or logits.shape != labels.shape or (weights is not None and weights.shape != logits.shape):
        shapes = [tuple(t.shape) for t in (logits, labels, weights) if t is not None]
        raise ValueError(f"logits, labels and weights must be vectors of one length, got shapes {shapes}")
    if logits.numel() == 0:
        raise ValueError("a metric needs at least one row")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits contain NaN or infinity")
    labels = labels.double()
    if not bool(((labels >= 0) & (labels <= 1)).all()):
        raise ValueError("labels must lie in [0, 1]")
    weights = torch.ones_like(labels) if weights is None else weights.double()
    if not bool((weights >= 0).all()) or float(weights.sum()) == 0:
        raise ValueError("weights must be non-negative and not all zero")
    return logits.double(), labels, weights


def log_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Weighted mean cross-entropy in nats, softplus(z) - y z, exact for any finite logit.

    Args:
        logits: shape (n,), log-odds.
        labels: shape (n,), in [0, 1].
        weights: shape (n,), non-negative; equal when omitted.

    Raises:
        ValueError: if shapes differ, a logit is not finite, or a label is outside [0, 1].
    """
    z, y, w = _checked(logits, labels, weights)
    return float((w * (torch.nn.functional.softplus(z) - y * z)).sum() / w.sum())


def binary_entropy(rate: float) -> float:
    """Entropy in nats of a coin that shows 1 with probability `rate`."""
    if rate in (0.0, 1.0):
        return 0.0
    return -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)


def _ratio_to_entropy(loss: float, rate: float) -> float:
    entropy = binary_entropy(rate)
    if entropy == 0:
        warnings.warn("normalized entropy is undefined: the base rate is 0 or 1", stacklevel=3)
        return math.nan
    return loss / entropy


def normalized_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, background: float | None = None
) -> float:
    """Cross-entropy of the predictions over the entropy of the base rate; below 1 beats predicting the mean.

    Args:
        logits: shape (n,), log-odds.
        labels: shape (n,), in [0, 1].
        weights: shape (n,), non-negative; equal when omitted.
        background: the base rate; default the weighted mean of `labels`. Give the training rate to compare models
            across evaluation sets.

    Returns:
        NaN, with a warning, if the base rate is 0 or 1.

    Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014, section 2.2.
    """
    _, y, w = _checked(logits, labels, weights)
    rate = float((w * y).sum() / w.sum()) if background is None else background
    return _ratio_to_entropy(log_loss(logits, labels, weights), rate)


def auc(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Probability that a random positive outranks a random negative, ties counting half (Mann-Whitney).

    Args:
        scores: shape (n,), any monotone transform of the prediction.
        labels: shape (n,), 0 or 1.
        weights: shape (n,), non-negative.

    Returns:
        NaN, with a warning, if one class is absent.
    """
    s, y, w = _checked(scores, labels, weights)
    value = _grouped_auc(s, y, w, torch.zeros_like(s, dtype=torch.int64))
    if value.auc_G.isnan().all():
        warnings.warn("AUC is undefined: one class is absent", stacklevel=2)
    return float(value.auc_G[0])


class _Groups(NamedTuple):
    auc_G: Tensor
    rows_G: Tensor
    positives_G: Tensor


def _grouped_auc(scores: Tensor, labels: Tensor, weights: Tensor, groups: Tensor) -> _Groups:
    """Tie-averaged AUC inside each group, by one sort by score, one stable sort by group, and segment sums."""
    order = torch.argsort(scores, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    s, y, w, g = scores[order], labels[order], weights[order], groups[order]
    new_group = torch.ones_like(g, dtype=torch.bool)
    new_group[1:] = g[1:] != g[:-1]
    new_tie = new_group.clone()
    new_tie[1:] |= s[1:] != s[:-1]
    group_id, tie_id = new_group.cumsum(0) - 1, new_tie.cumsum(0) - 1
    num_groups, num_ties = int(group_id[-1]) + 1, int(tie_id[-1]) + 1
    positive, negative = w * y, w * (1 - y)
    tie_positive = torch.zeros(num_ties, dtype=torch.float64).index_add_(0, tie_id, positive)
    tie_negative = torch.zeros(num_ties, dtype=torch.float64).index_add_(0, tie_id, negative)
    tie_group = group_id[new_tie]
    total_positive = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, tie_group, tie_positive)
    total_negative = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, tie_group, tie_negative)
    # Negatives ranked below each tie, counted from the start of its group.
    below = tie_negative.cumsum(0) - tie_negative
    before_group = total_negative.cumsum(0) - total_negative
    wins = tie_positive * (below - before_group[tie_group] + 0.5 * tie_negative)
    won = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, tie_group, wins)
    rows = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, group_id, w)
    return _Groups(won / (total_positive * total_negative), rows, total_positive)


class GroupedAUC(NamedTuple):
    """GAUC and how many groups had both classes."""

    value: float
    groups_used: int
    groups: int


def gauc(
    scores: Tensor,
    labels: Tensor,
    groups: Tensor,
    weights: Tensor | None = None,
    *,
    weighting: Literal["impressions", "clicks", "uniform"] = "impressions",
) -> GroupedAUC:
    """AUC inside each group (user), averaged over the groups that have both classes.

    Args:
        groups: shape (n,), int64 key of each row's group.
        weighting: a group counts by its rows (DIN's code), its positive rows, or once.

    Returns:
        Value NaN, with a warning, if no group has both classes.

    Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018, section 5.3.
    """
    s, y, w = _checked(scores, labels, weights)
    if groups.shape != scores.shape:
        raise ValueError(f"groups have shape {tuple(groups.shape)}, scores {tuple(scores.shape)}")
    parts = _grouped_auc(s, y, w, groups)
    used = ~parts.auc_G.isnan()
    if not bool(used.any()):
        warnings.warn("GAUC is undefined: no group has both classes", stacklevel=2)
        return GroupedAUC(math.nan, 0, used.numel())
    share = {"impressions": parts.rows_G, "clicks": parts.positives_G, "uniform": torch.ones_like(parts.rows_G)}
    weight = share[weighting][used]
    return GroupedAUC(float((weight * parts.auc_G[used]).sum() / weight.sum()), int(used.sum()), used.numel())


def calibration(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Sum of predicted probabilities over sum of labels; 1 is unbiased. NaN, with a warning, without positives."""
    z, y, w = _checked(logits, labels, weights)
    actual = float((w * y).sum())
    if actual == 0:
        warnings.warn("calibration is undefined: there is no positive label", stacklevel=2)
        return math.nan
    return float((w * torch.sigmoid(z)).sum()) / actual


class Reliability(NamedTuple):
    """Mean prediction, mean label and number of rows in each bin."""

    predicted_K: Tensor
    observed_K: Tensor
    rows_K: Tensor


def reliability(logits: Tensor, labels: Tensor, *, bins: int = 10) -> Reliability:
    """The calibration curve over bins of equally many rows, lowest predictions first."""
    z, y, _ = _checked(logits, labels, None)
    p, order = torch.sigmoid(z).sort(stable=True)
    bin_of = (torch.arange(p.numel()) * bins) // p.numel()
    rows = torch.bincount(bin_of, minlength=bins).double()
    predicted = torch.bincount(bin_of, p, minlength=bins) / rows.clamp_min(1)
    observed = torch.bincount(bin_of, y[order], minlength=bins) / rows.clamp_min(1)
    kept = rows > 0
    return Reliability(predicted[kept], observed[kept], rows[kept])


def expected_calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 20) -> float:
    """Mean distance of predicted and observed rate over bins of equally many rows.

    Source: Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015.
    """
    curve = reliability(logits, labels, bins=bins)
    return float(((curve.predicted_K - curve.observed_K).abs() * curve.rows_K).sum() / curve.rows_K.sum())


@dataclass
class BinaryMetrics:
    """All of the above over a stream of batches; exact, because it keeps the scores (12 to 28 bytes a row).

    Two of them, filled on different parts of the data, can be merged.
    """

    _logits: list[Tensor] = field(default_factory=list)
    _labels: list[Tensor] = field(default_factory=list)
    _weights: list[Tensor] = field(default_factory=list)
    _groups: list[Tensor] = field(default_factory=list)

    def update(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, groups: Tensor | None = None
    ) -> None:
        """Add rows; those with a NaN label are unobserved and left out."""
        seen = ~labels.isnan()
        self._logits.append(logits.detach().float()[seen].cpu())
        self._labels.append(labels.detach().float()[seen].cpu())
        if weights is not None:
            self._weights.append(weights[seen].float().cpu())
        if groups is not None:
            self._groups.append(groups[seen].cpu())

    def merge(self, other: BinaryMetrics) -> None:
        self._logits += other._logits
        self._labels += other._labels
        self._weights += other._weights
        self._groups += other._groups

    def compute(self) -> dict[str, float]:
        """`rows`, `rate`, `logloss`, `ne`, `auc`, `calibration`, and `gauc` where groups were given.

        Raises:
            ValueError: if there are no rows.
        """
        if not self._logits:
            raise ValueError("a metric needs at least one row")
        logits, labels = torch.cat(self._logits), torch.cat(self._labels)
        weights = torch.cat(self._weights) if self._weights else None
        total = labels.double() if weights is None else labels.double() * weights
        mass = labels.numel() if weights is None else float(weights.sum())
        loss = log_loss(logits, labels, weights)
        rate = float(total.sum()) / mass
        result = {"rows": float(labels.numel()), "rate": rate, "logloss": loss}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result["ne"] = _ratio_to_entropy(loss, rate)
            result["auc"] = auc(logits, labels, weights)
            result["calibration"] = calibration(logits, labels, weights)
            if self._groups:
                result["gauc"] = gauc(logits, labels, torch.cat(self._groups), weights).value
        return result
