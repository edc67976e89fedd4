"""What the metrics of predictions ask of their rows."""

# Shapes: n rows.

from __future__ import annotations

import math

import torch
from torch import Tensor


def checked(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The rows on the CPU, labels and weights (ones when omitted) in float64.

    Raises:
        ValueError: if they are not vectors of one length, are empty, a logit is not finite, a label is outside [0, 1],
            a weight is negative or not finite, or all weights are zero.
    """
    _check_shapes(logits, labels=labels, weights=weights)
    if logits.numel() == 0:
        raise ValueError("a metric needs at least one row")
    _check_values(logits, labels, weights)
    labels = labels.detach().cpu().double()
    weights = torch.ones_like(labels) if weights is None else weights.detach().cpu().double()
    if not 0 < float(weights.sum()) < math.inf:
        raise ValueError(f"weights must have a positive, finite sum, got {float(weights.sum())}")
    return logits.detach().cpu(), labels, weights


def observed(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, groups: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The rows of a batch whose label is not NaN, on the CPU, in the types they came in; possibly none.

    Raises:
        ValueError: if they are not vectors of one length, or an observed row is one that `checked` refuses.
    """
    _check_shapes(logits, labels=labels, weights=weights, groups=groups)
    labels = labels.detach().cpu()
    seen = ~labels.isnan()
    logits, labels = logits.detach().cpu()[seen], labels[seen]
    weights = None if weights is None else weights.detach().cpu()[seen]
    _check_values(logits, labels, weights)
    return logits, labels, weights, None if groups is None else groups.detach().cpu()[seen]


def _check_shapes(logits: Tensor, **others: Tensor | None) -> None:
    if logits.ndim != 1:
        raise ValueError(f"logits must be a vector, got shape {tuple(logits.shape)}")
    for name, values in others.items():
        if values is not None and values.shape != logits.shape:
            raise ValueError(
                f"{name} have shape {tuple(values.shape)}, expected that of the logits, {len(logits)} rows"
            )


def _check_values(logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
    if not bool(logits.isfinite().all()):
        raise ValueError("logits contain NaN or infinity")
    if not bool(((labels >= 0) & (labels <= 1)).all()):
        raise ValueError("labels must lie in [0, 1]")
    if weights is not None and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("weights must be finite and non-negative")
