"""Metrics of click predictions over streams of any length, in constant memory."""

# Shapes: n rows, K bins.

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fullrank.metrics.binary import Background, background_rate, binary_entropy, cross_entropy
from fullrank.metrics.rows import observed

# Bins are equally wide in log-odds: a probability of 1e-5 is told from 2e-5 as well as .3 from .5.
LOWEST, HIGHEST = -16.0, 16.0


@dataclass
class BinnedMetrics:
    """Log loss, NE and calibration as sums, exact; AUC from a histogram of the logits. No GAUC: it needs the rows.

    The error of the AUC is known. Only pairs of a positive and a negative that share a bin are misjudged, as ties, so
    |binned - exact| <= 1/2 sum_k P_k N_k / (P N), with P_k and N_k the positives and negatives of bin k; `compute`
    returns that bound. With the default bins, .002 wide in log-odds, it is below .001 unless the predictions crowd
    within a few bins; logits beyond +-16 share the outermost bins. No fixed bins bound the error in advance: if all
    predictions share a bin it is 1/2.

    Attributes:
        bins: of the histogram, equally wide between log-odds of -16 and 16.
        background, train_rate: the base rate of `ne`, as for `normalized_entropy`.
    """

    bins: int = 16_384
    background: Background = "eval"
    train_rate: float | None = None
    _positive_K: Tensor = field(init=False, repr=False)
    _negative_K: Tensor = field(init=False, repr=False)
    _sums: Tensor = field(init=False, repr=False)  # rows, cross-entropy, predicted

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, got {self.bins}")
        background_rate(self.background, 0.5, self.train_rate)
        self._positive_K = torch.zeros(self.bins, dtype=torch.float64)
        self._negative_K = torch.zeros(self.bins, dtype=torch.float64)
        self._sums = torch.zeros(3, dtype=torch.float64)

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add rows; those with a NaN label are unobserved and left out.

        Raises:
            ValueError: as `log_loss`.
        """
        logits, labels, weights, _ = observed(logits, labels, weights)
        z, y = logits.double(), labels.double()
        w = torch.ones_like(z) if weights is None else weights.double()
        # Clamped before the conversion: an integer does not hold the bin of 1e30.
        bin_of = (
            ((z.clamp(LOWEST, HIGHEST) - LOWEST) * (self.bins / (HIGHEST - LOWEST))).long().clamp_max(self.bins - 1)
        )
        self._positive_K += torch.bincount(bin_of, w * y, minlength=self.bins)
        self._negative_K += torch.bincount(bin_of, w * (1 - y), minlength=self.bins)
        sums = (torch.ones_like(z), w * cross_entropy(z, y), w * torch.sigmoid(z))
        self._sums += torch.stack([values.sum() for values in sums])

    def merge(self, other: BinnedMetrics) -> None:
        """Add the rows of another one.

        Raises:
            ValueError: if it has another number of bins.
        """
        if other.bins != self.bins:
            raise ValueError(f"cannot merge a histogram of {other.bins} bins into one of {self.bins}")
        self._positive_K += other._positive_K
        self._negative_K += other._negative_K
        self._sums += other._sums

    def compute(self) -> dict[str, float]:
        """`rows`, `rate`, `logloss`, `ne`, `auc`, `auc_error` (the bound above), `calibration`; NaN what is undefined.

        Raises:
            ValueError: if there are no rows, or none of positive weight.
        """
        rows, loss, predicted = self._sums.tolist()
        positive, negative = float(self._positive_K.sum()), float(self._negative_K.sum())
        mass = positive + negative
        if mass == 0:
            raise ValueError("a metric needs at least one row of positive weight")
        entropy = binary_entropy(background_rate(self.background, positive / mass, self.train_rate))
        below_K = self._negative_K.cumsum(0) - self._negative_K
        tied = 0.5 * float((self._positive_K * self._negative_K).sum())
        pairs = positive * negative
        return {
            "rows": rows,
            "rate": positive / mass,
            "logloss": loss / mass,
            "ne": loss / mass / entropy if entropy else math.nan,
            "auc": (float((self._positive_K * below_K).sum()) + tied) / pairs if pairs else math.nan,
            "auc_error": tied / pairs if pairs else math.nan,
            "calibration": predicted / positive if positive else math.nan,
        }
