"""What of a foundation model reaches a served one, and what a history of its embeddings is worth: with intervals."""

# Shapes: n rows.

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fullrank.metrics import BinaryRows, Bootstrap, bootstrap

# Difference of normalised entropies below which a teacher has gained nothing that could be passed on.
LEAST_GAIN = 1e-9


class Estimate(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def transfer_ratio(ne_vm_before: float, ne_vm_after: float, ne_fm_before: float, ne_fm_after: float) -> float:
    """What share of a foundation model's gain in normalised entropy the served model made.

    Raises:
        ValueError: if the foundation model has gained nothing, or a number is not finite.
    """
    if not all(map(math.isfinite, (ne_vm_before, ne_vm_after, ne_fm_before, ne_fm_after))):
        raise ValueError("normalised entropies have NaN or infinity, expected finite numbers")
    gained = ne_fm_before - ne_fm_after
    if abs(gained) < LEAST_GAIN:
        raise ValueError("the foundation model has gained nothing that could be passed on")
    return (ne_vm_before - ne_vm_after) / gained


class Compared:
    """Predictions of several models of the same labelled rows, resampled together by user.

    Args:
        logits: by model, shape (n,).
        labels: shape (n,), 0 or 1.
        users: shape (n,), whole numbers: rows of a user are drawn together.
        replicates: of the bootstrap; default as `metrics.bootstrap`.

    Raises:
        ValueError: as `BinaryRows`.
    """

    def __init__(
        self,
        logits: Mapping[str, Tensor],
        labels: Tensor,
        users: Tensor | None = None,
        *,
        replicates: int | None = None,
    ) -> None:
        self.resampled: dict[str, Bootstrap] = {
            name: bootstrap(BinaryRows(logit_n, labels, clusters=users), replicates=replicates)
            for name, logit_n in logits.items()
        }

    def metric(self, name: str, metric: str) -> Estimate:
        """Of one model: `ne`, `auc`, `calibration`, `logloss`."""
        found = self.resampled[name]
        return Estimate(found.estimate[metric], *found.interval(metric))

    def minus(self, name: str, other: str, metric: str = "ne") -> Estimate:
        """The difference of two models, paired."""
        found = self.resampled[name].minus(self.resampled[other])
        return Estimate(found.estimate[metric], *found.interval(metric))

    def transfer_ratio(self, before: str, after: str, fm_after: str, fm_before: str | None = None) -> Estimate:
        """`transfer_ratio` of models by name.

        Args:
            fm_before: default `before`: the foundation model is new, and what was there is the served model.

        Raises:
            ValueError: if the foundation model has gained nothing, or no more than noise: its interval is not above 0.
        """
        fm_before = before if fm_before is None else fm_before
        gained = self.minus(fm_before, fm_after)
        if not gained.low > 0:
            raise ValueError(
                f"the gain of the foundation model, {gained.value:.5f} NE, is within noise or a loss "
                f"({gained.low:.5f} to {gained.high:.5f}): there is no ratio to it"
            )
        ne = {name: self.resampled[name].resampled["ne"] for name in (before, after, fm_before, fm_after)}
        ratios = (ne[before] - ne[after]) / (ne[fm_before] - ne[fm_after])
        low, high = np.quantile(ratios[np.isfinite(ratios)], [0.025, 0.975])
        four = (self.resampled[name].estimate["ne"] for name in (before, after, fm_before, fm_after))
        return Estimate(transfer_ratio(*four), float(low), float(high))

    def gain_report(self, x: str, xh: str, xs: str, xhs: str) -> dict[str, dict[str, Any]]:
        """What a history of embeddings S is worth beside features x and raw history h, from four models' held-out loss.

            temporal = LL(x) - LL(x+h)       what the raw history tells
            cross    = LL(x+h) - LL(x+h+S)   what only the foundation model's features tell
            residual = LL(x+S) - LL(x+h+S)   what the raw history tells that S has lost
            total    = LL(x) - LL(x+S) = temporal + cross - residual

        Returns:
            By term: `nats` and `ne`, each an `Estimate`.

        Source: LoopFM, arXiv 2605.29280, with each mutual information replaced by a difference of losses.
        """
        terms = {"temporal": (x, xh), "cross": (xh, xhs), "residual": (xs, xhs), "total": (x, xs)}
        return {
            term: {"nats": self.minus(more, less, "logloss"), "ne": self.minus(more, less)}
            for term, (more, less) in terms.items()
        }
