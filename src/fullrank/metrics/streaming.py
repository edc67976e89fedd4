"""All metrics of click predictions over a stream of batches, exactly."""

# Shapes: n rows.

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fullrank.metrics.area import Weighting, auc, gauc
from fullrank.metrics.binary import (
    Background,
    background_rate,
    binary_entropy,
    calibration,
    expected_calibration_error,
    log_loss,
)
from fullrank.metrics.rows import observed


@dataclass
class BinaryMetrics:
    """Keeps the rows (8 to 20 bytes each in float32), so that even AUC and GAUC are exact.

    Two of them, filled on different parts of the data, can be merged. `BinnedMetrics` needs constant memory instead.

    Attributes:
        background, train_rate: the base rate of `ne`, as for `normalized_entropy`.
        weighting: of the groups in `gauc`, as there.
    """

    background: Background = "eval"
    train_rate: float | None = None
    weighting: Weighting = "impressions"
    _logits: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _labels: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _weights: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _groups: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        background_rate(self.background, 0.5, self.train_rate)

    def update(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, groups: Tensor | None = None
    ) -> None:
        """Add rows; those with a NaN label are unobserved and left out.

        Raises:
            ValueError: as `log_loss`, or if some updates have weights (groups) and others have none.
        """
        logits, labels, weights, groups = observed(logits, labels, weights, groups)
        self._check_fits(weights is not None, groups is not None)
        self._logits.append(logits)
        self._labels.append(labels)
        if weights is not None:
            self._weights.append(weights)
        if groups is not None:
            self._groups.append(groups)

    def merge(self, other: BinaryMetrics) -> None:
        """Add the rows of another one.

        Raises:
            ValueError: if only one of the two has weights or groups.
        """
        if other._logits:
            self._check_fits(bool(other._weights), bool(other._groups))
        self._logits += other._logits
        self._labels += other._labels
        self._weights += other._weights
        self._groups += other._groups

    def _check_fits(self, weights: bool, groups: bool) -> None:
        if not self._logits:
            return
        for name, mine, theirs in (("weights", self._weights, weights), ("groups", self._groups, groups)):
            if bool(mine) != theirs:
                raise ValueError(f"either every update has {name} or none has")

    def compute(self) -> dict[str, float]:
        """The metrics of all rows so far; NaN what is undefined.

        Returns:
            `rows`, `rate` (mean label), `logloss`, `ne`, `auc`, `calibration`, `ece` (expected calibration error) and,
            where groups were given, `gauc`, `groups` and `groups_used` (those with both classes).

        Raises:
            ValueError: if there are no rows, or none of positive weight.
        """
        if not self._logits:
            raise ValueError("a metric needs at least one row")
        logits, labels = torch.cat(self._logits), torch.cat(self._labels)
        weights = torch.cat(self._weights) if self._weights else None
        loss = log_loss(logits, labels, weights)
        positive = labels.double() if weights is None else labels.double() * weights.double()
        rate = float(positive.sum()) / (len(labels) if weights is None else float(weights.double().sum()))
        entropy = binary_entropy(background_rate(self.background, rate, self.train_rate))
        result = {"rows": float(len(labels)), "rate": rate, "logloss": loss}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result["ne"] = loss / entropy if entropy else float("nan")
            result["auc"] = auc(logits, labels, weights)
            result["calibration"] = calibration(logits, labels, weights)
            result["ece"] = expected_calibration_error(logits, labels, weights)
            if self._groups:
                grouped = gauc(logits, labels, torch.cat(self._groups), weights, weighting=self.weighting)
                result |= {"gauc": grouped.value, "groups": grouped.groups, "groups_used": grouped.groups_used}
        return result
