"""Post-hoc calibration: a rising function of a model's log-odds that makes its probabilities match what happened."""

# Shapes: n rows, K knots.

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solveh_banded
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from fullrank.randomized.blocks import Array
from fullrank.randomized.curvature import Problem
from fullrank.randomized.losses import LOSSES
from fullrank.randomized.newton import subsampled_newton
from fullrank.randomized.parameters import check_parameters, integer, number, one_of
from fullrank.randomized.sources import ArraySource

METHODS = ("piecewise", "affine", "temperature")
_RULES = {"method": one_of(*METHODS), "n_knots": integer(2), "smoothing": number(above=0)}
_LOGISTIC = LOSSES["logistic"]


class LogitCalibrator(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Calibrated log-odds as a function of log-odds, of the largest likelihood on held-out rows.

    A transformer of one column: (n,) gives (n,), and (n, 1), as in a pipeline, gives (n, 1).

    Args:
        method: "piecewise": linear between knots at quantiles of the log-odds, never falling, and of slope 1 outside of
            the knots. "affine": slope and shift (Platt). "temperature": a slope alone.
        n_knots: of "piecewise", at least 2; knots that coincide count once.
        smoothing: of "piecewise": rows' worth of doubt that a knot's log-odds should move away from the affine fit.

    Attributes:
        knots_, values_: shape (K,): log-odds before and after; two knots for the affine methods.

    Raises:
        ValueError: a parameter out of range; NaN or infinity; a target outside of [0, 1], or the same in all rows.

    Sources: Platt, Probabilistic Outputs for Support Vector Machines, 1999; Zadrozny and Elkan, Transforming Classifier
    Scores into Accurate Multiclass Probability Estimates, 2002 (isotonic regression).
    Deviation: isotonic regression is a staircase of probabilities, which ties candidates and says 0 and 1; here the
    function is linear in log-odds between quantiles.
    """

    knots_: Array
    values_: Array

    def __init__(self, method: str = "piecewise", *, n_knots: int = 20, smoothing: float = 10.0) -> None:
        self.method = method
        self.n_knots = n_knots
        self.smoothing = smoothing

    def fit(self, logits: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit.

        Args:
            logits: shape (n,) or (n, 1), log-odds by the model, of rows that it was not trained on.
            y: shape (n,), what happened: 0 or 1, or anything between.
            sample_weight: shape (n,), at least 0.
        """
        check_parameters(self, _RULES)
        self.n_features_in_ = 1
        z, y = _column(logits), _vector(y, "y")
        weight = np.ones(len(z)) if sample_weight is None else _vector(sample_weight, "sample_weight")
        if not len(z) == len(y) == len(weight):
            raise ValueError(f"{len(z)} logits, {len(y)} targets, {len(weight)} weights: expected as many of each")
        if weight.min(initial=0.0) < 0:
            raise ValueError(f"weight of row {int(weight.argmin())} is {weight.min()}, expected 0 or more")
        _LOGISTIC.check_target(y)
        z, y, weight = z[weight > 0], y[weight > 0], weight[weight > 0]
        if not len(y) or not 0 < np.average(y, weights=weight) < 1:
            raise ValueError("all targets are the same: there is nothing to calibrate to")
        shift, slope = self._affine(z, y, weight)
        # The knots of a function without bends only need to differ.
        ends = np.array([z.min(), max(z.max(), z.min() + 1.0)])
        self.knots_, self.values_ = ends, shift + slope * ends
        if self.method == "piecewise":
            knots = _weighted_quantiles(z, weight, int(self.n_knots))
            if len(knots) > 1:
                self.knots_ = knots
                self.values_ = _rising_fit(z, y, weight, knots, shift + slope * knots, float(self.smoothing))
        return self

    def transform(self, logits: Any) -> Array:
        """Calibrated log-odds, in the shape of the logits."""
        check_is_fitted(self)
        z = _column(logits)
        knots, values = self.knots_, self.values_
        calibrated: Array
        if self.method == "piecewise":
            calibrated = np.interp(z, knots, values) + np.minimum(z - knots[0], 0.0) + np.maximum(z - knots[-1], 0.0)
        else:
            calibrated = values[0] + (values[-1] - values[0]) / (knots[-1] - knots[0]) * (z - knots[0])
        return calibrated.reshape(np.shape(logits))

    def predict_proba(self, logits: Any) -> Array:
        """Calibrated probabilities, shape (n,)."""
        calibrated = np.ravel(self.transform(logits))
        return _LOGISTIC(calibrated, np.zeros(len(calibrated))).slope

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array = True, False
        tags.target_tags.required, tags.requires_fit = True, True
        return tags

    def _affine(self, z: Array, y: Array, weight: Array) -> tuple[float, float]:
        """Shift and slope; a slope below 0 would turn the ranking round, and becomes 0."""
        free = self.method != "temperature"
        source = ArraySource(z[:, None], y, weight, check_finite=False)
        # A row's worth of doubt keeps slope and shift finite where the classes do not overlap.
        *slopes, last = subsampled_newton(Problem(source, _LOGISTIC, 1.0, free), sampling="none", tol=1e-9).coef
        if not free:
            return 0.0, max(float(last), 0.0)
        if slopes[0] > 0:
            return float(last), float(slopes[0])
        rate = np.average(y, weights=weight)
        return float(np.log(rate / (1 - rate))), 0.0


def _rising_fit(z: Array, y: Array, weight: Array, knots: Array, start: Array, smoothing: float) -> Array:
    """Values at the knots that maximise the likelihood and never fall; neighbours that would fall are made equal."""
    cell = np.clip(np.searchsorted(knots, z, side="right") - 1, 0, len(knots) - 2)
    share = (z - knots[cell]) / np.diff(knots)[cell]
    rate = np.average(y, weights=weight)
    doubt = smoothing * rate * (1 - rate)  # the curvature of so many rows at the mean rate
    groups: NDArray[np.intp] = np.arange(len(knots))
    while True:
        values = _fit_at_knots(cell, share, y, weight, groups, start, doubt)
        rises = np.diff(values)
        if rises.min(initial=0.0) >= 0:
            return values[groups]
        # As in isotonic regression, the two groups that violate the order most are pooled, and all is fitted again.
        groups = groups - (groups > rises.argmin())


def _fit_at_knots(
    cell: NDArray[np.intp],
    share: Array,
    y: Array,
    weight: Array,
    groups: NDArray[np.intp],
    start: Array,
    doubt: float,
) -> Array:
    """Newton's method for one value per group of knots; a row sees two neighbours, so the Hessian is tridiagonal."""
    size = int(groups[-1]) + 1
    left, right = groups[cell], groups[cell + 1]
    count = np.bincount(groups, minlength=size)
    centre = np.bincount(groups, start, size) / count

    def summed(places: NDArray[np.intp], terms: Array) -> Array:
        return np.asarray(np.bincount(places, terms, size), dtype=np.float64)

    def objective(values: Array) -> float:
        margin = values[left] * (1 - share) + values[right] * share
        return float(weight @ _LOGISTIC.value(margin, y)) + 0.5 * doubt * float(count @ np.square(values - centre))

    values = centre.copy()
    best = objective(values)
    for _ in range(50):
        loss = _LOGISTIC(values[left] * (1 - share) + values[right] * share, y)
        slope, curvature = weight * loss.slope, weight * loss.curvature
        gradient = summed(left, slope * (1 - share)) + summed(right, slope * share)
        gradient += doubt * count * (values - centre)
        same = left == right
        banded = np.zeros((2, size))
        banded[1] = summed(left, curvature * np.where(same, 1.0, (1 - share) ** 2)) + doubt * count
        banded[1] += summed(right, curvature * np.where(same, 0.0, share**2))
        banded[0, 1:] = summed(left, np.where(same, 0.0, curvature * share * (1 - share)))[:-1]
        step: Array = solveh_banded(banded, gradient) if size > 1 else gradient / banded[1]
        length = 1.0
        while (value := objective(values - length * step)) > best + 1e-12 * abs(best) and length > 1e-6:
            length /= 2
        values, gained = values - length * step, best - value
        best = value
        if gained <= 1e-12 * abs(best):
            break
    return values


def _weighted_quantiles(z: Array, weight: Array, count: int) -> Array:
    """Distinct values of z at evenly spaced shares of the weight, the ends included."""
    order = np.argsort(z)
    total = np.cumsum(weight[order])
    places = np.searchsorted(total, np.linspace(0, 1, count) * total[-1], side="left")
    return np.unique(z[order][np.minimum(places, len(z) - 1)])


def _column(logits: Any) -> Array:
    """(n,) of (n,) or (n, 1)."""
    values = np.asarray(logits)
    return _vector(values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values, "logits")


def _vector(values: Any, name: str) -> Array:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} are no numbers, expected (n,)") from None
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected (n,)")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: NaN or infinity, first in row {int(np.argmin(np.isfinite(array)))}")
    return array
