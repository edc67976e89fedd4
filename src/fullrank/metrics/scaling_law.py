"""How a metric falls with compute: NE(C) = NE_0 - η ln(C / C_0)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class ScalingLaw(NamedTuple):
    """A fitted law.

    Attributes:
        ne0: the metric at `reference`.
        eta: how much it falls per unit of ln(compute); positive when more compute helps.
        r2: share of the variance that the law explains.
        reference: C_0, the smallest compute fitted.
    """

    ne0: float
    eta: float
    r2: float
    reference: float

    def __call__(self, flops: float) -> float:
        return self.ne0 - self.eta * float(np.log(flops / self.reference))


def fit_scaling_law(flops: Sequence[float], ne: Sequence[float]) -> ScalingLaw:
    """Least squares of the metric on ln(compute), with C_0 the smallest compute.

    Warns if there are fewer than 4 points, or if the law explains less than 90 % of the variance.

    Raises:
        ValueError: if there are fewer than 2 different amounts of compute, the numbers of values differ, a value is not
            finite, or an amount is not positive.

    Source: Kunlun, arXiv 2602.10016.
    """
    x, y = np.asarray(flops, float), np.asarray(ne, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"flops and ne must be equally many, got {len(flops)} and {len(ne)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all()):
        raise ValueError("flops must be positive and all values finite")
    if len(np.unique(x)) < 2:
        raise ValueError("a law needs at least 2 different amounts of compute")
    if len(x) < 4:
        warnings.warn(f"a law from {len(x)} points says little: use 4 or more", stacklevel=2)
    reference = float(x.min())
    logs = np.log(x / reference)
    slope, level = np.polyfit(logs, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float(((y - level - slope * logs) ** 2).sum()) / spread if spread else 1.0
    if r2 < 0.9:
        warnings.warn(f"the points are not on a line in ln(compute): r² is {r2:.2f}", stacklevel=2)
    return ScalingLaw(float(level), -float(slope), r2, reference)


def scaling_efficiency(law: ScalingLaw, baseline: ScalingLaw) -> float:
    """η over the baseline's η: how many times faster the metric falls per unit of ln(compute).

    Raises:
        ValueError: if the baseline does not improve with compute.
    """
    if baseline.eta <= 0:
        raise ValueError(f"the baseline does not improve with compute: its slope is {baseline.eta:.3g}")
    return law.eta / baseline.eta
