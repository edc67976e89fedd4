"""Losses of generalised linear models: value, slope and curvature in the margin, and what a target must look like."""

# Shapes: n rows. A margin is x'w + intercept.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fullrank.randomized.blocks import Array


class Derivatives(NamedTuple):
    """A loss row by row: value, first and second derivative in the margin, each of shape (n,)."""

    value: Array
    slope: Array
    curvature: Array


class Loss(Protocol):
    """A loss that is convex and twice differentiable in the margin."""

    def __call__(self, margin: Array, target: Array) -> Derivatives: ...

    def value(self, margin: Array, target: Array) -> Array: ...

    def margin_of(self, mean: float) -> float:
        """The margin that all rows have under the best model without features, whose targets have this mean; 0 if no
        margin is the best."""

    def check_target(self, target: Array, first_row: int = 0) -> None:
        """Raises:
        ValueError: if a target is impossible under this loss; names its row, counted from `first_row`.
        """


class Logistic:
    """log(1 + exp(z)) - y z, for y in [0, 1]: cross-entropy of the probability 1 / (1 + exp(-z))."""

    def __call__(self, margin: Array, target: Array) -> Derivatives:
        small = np.exp(-np.abs(margin))  # one exponential that cannot overflow serves all three
        larger = 1.0 / (1.0 + small)
        probability = np.where(margin >= 0, larger, small * larger)
        value = np.maximum(margin, 0.0) + np.log1p(small) - target * margin
        return Derivatives(value, probability - target, small * larger * larger)

    def value(self, margin: Array, target: Array) -> Array:
        return np.maximum(margin, 0.0) + np.log1p(np.exp(-np.abs(margin))) - target * margin

    def margin_of(self, mean: float) -> float:
        return float(np.log(mean) - np.log1p(-mean)) if 0 < mean < 1 else 0.0

    def check_target(self, target: Array, first_row: int = 0) -> None:
        _require((target >= 0) & (target <= 1), target, first_row, "between 0 and 1")


class Squared:
    """(z - y)^2 / 2."""

    def __call__(self, margin: Array, target: Array) -> Derivatives:
        residual = margin - target
        return Derivatives(0.5 * residual * residual, residual, np.ones_like(residual))

    def value(self, margin: Array, target: Array) -> Array:
        return 0.5 * np.square(margin - target)

    def margin_of(self, mean: float) -> float:
        return mean

    def check_target(self, target: Array, first_row: int = 0) -> None:
        """Every number will do."""


class Poisson:
    """exp(z) - y z, for y >= 0: negative log-likelihood of a count with mean exp(z), without log(y!)."""

    def __call__(self, margin: Array, target: Array) -> Derivatives:
        # Overflow to infinity is meant: the line search turns such a step down.
        with np.errstate(over="ignore"):
            mean = np.exp(margin)
        return Derivatives(mean - target * margin, mean - target, mean)

    def value(self, margin: Array, target: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.exp(margin) - target * margin

    def margin_of(self, mean: float) -> float:
        return float(np.log(mean)) if mean > 0 else 0.0

    def check_target(self, target: Array, first_row: int = 0) -> None:
        _require(target >= 0, target, first_row, "0 or more")


class Gamma:
    """y exp(-z) + z - log(y) - 1, for y > 0: half the deviance of a gamma variable with mean exp(z)."""

    def __call__(self, margin: Array, target: Array) -> Derivatives:
        ratio = self._ratio(margin, target)
        return Derivatives(ratio + margin - np.log(target) - 1.0, 1.0 - ratio, ratio)

    def value(self, margin: Array, target: Array) -> Array:
        return self._ratio(margin, target) + margin - np.log(target) - 1.0

    def _ratio(self, margin: Array, target: Array) -> Array:
        with np.errstate(over="ignore"):
            return target * np.exp(-margin)

    def margin_of(self, mean: float) -> float:
        return float(np.log(mean))

    def check_target(self, target: Array, first_row: int = 0) -> None:
        _require(target > 0, target, first_row, "above 0")


@dataclass(frozen=True)
class Tweedie:
    """exp((2 - p) z) / (2 - p) + y exp((1 - p) z) / (p - 1), for y >= 0: half the deviance of a variable with mean
    exp(z) and variance proportional to its power p, without what y alone adds. Between 1 and 2 it is a sum of as many
    gamma variables as a Poisson variable says: mostly 0, else a value.

    Args:
        power: p, between 1 and 2.
    """

    power: float = 1.5

    def __call__(self, margin: Array, target: Array) -> Derivatives:
        p = self.power
        up, down = self._powers(margin, target)
        return Derivatives(up / (2 - p) + down / (p - 1), up - down, (2 - p) * up + (p - 1) * down)

    def value(self, margin: Array, target: Array) -> Array:
        up, down = self._powers(margin, target)
        return up / (2 - self.power) + down / (self.power - 1)

    def _powers(self, margin: Array, target: Array) -> tuple[Array, Array]:
        with np.errstate(over="ignore"):
            # A target of 0 times an exponential that overflows is 0.
            down = target * np.minimum(np.exp((1 - self.power) * margin), np.finfo(float).max)
            return np.exp((2 - self.power) * margin), down

    def margin_of(self, mean: float) -> float:
        return float(np.log(mean)) if mean > 0 else 0.0

    def check_target(self, target: Array, first_row: int = 0) -> None:
        _require(target >= 0, target, first_row, "0 or more")


@dataclass(frozen=True)
class Softmax:
    """log(sum_k exp(z_k)) - z_y, for a class y of 0 ... K - 1: cross-entropy of the probabilities exp(z_k) / sum.

    A row has K margins: margins and slopes have shape (n, K), and `curvature` is the trace of a row's matrix of second
    derivatives, diag(probability) - probability probability', shape (n,).

    Args:
        classes: K.
    """

    classes: int

    def __call__(self, margin: Array, target: Array) -> Derivatives:
        slope = self.probability(margin)
        curvature = 1.0 - np.einsum("ij,ij->i", slope, slope)
        slope[np.arange(len(target)), target.astype(np.intp)] -= 1.0
        return Derivatives(self.value(margin, target), slope, curvature)

    def probability(self, margin: Array) -> Array:
        """Of every class, shape (n, K)."""
        powers: Array = np.exp(margin - margin.max(axis=1, keepdims=True))
        powers /= powers.sum(axis=1, keepdims=True)
        return powers

    def value(self, margin: Array, target: Array) -> Array:
        largest = margin.max(axis=1)
        own = margin[np.arange(len(target)), target.astype(np.intp)]
        values: Array = np.log(np.exp(margin - largest[:, None]).sum(axis=1)) + (largest - own)
        return values

    def margin_of(self, mean: Any) -> Any:
        if not (mean > 0).all():
            return np.zeros(self.classes)
        return np.log(mean) - np.log(mean).mean()

    def check_target(self, target: Array, first_row: int = 0) -> None:
        holds = (target >= 0) & (target < self.classes) & (target == np.floor(target))
        _require(holds, target, first_row, f"a class, 0 to {self.classes - 1}")


LOSSES: dict[str, Loss] = {
    "logistic": Logistic(),
    "squared": Squared(),
    "poisson": Poisson(),
    "gamma": Gamma(),
    "tweedie": Tweedie(),
}
LOG_LINK = ("poisson", "gamma", "tweedie")  # their mean is the exponential of the margin


def _require(holds: NDArray[np.bool_], target: Array, first_row: int, expected: str) -> None:
    if not holds.all():
        row = int(np.argmin(holds))
        raise ValueError(f"target of row {first_row + row} is {target[row]}, expected {expected}")
