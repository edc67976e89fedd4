"""How sure a metric is: bootstrap intervals, with rows resampled in clusters (users), and paired differences."""

# Shapes: n rows, C clusters, R resamples, V sums of each cluster, P rows with a positive part.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fullrank.metrics.area import run_starts
from fullrank.metrics.binary import cross_entropy
from fullrank.metrics.rows import checked

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Resamples up to a million rows; beyond, as many as cost the same, but no fewer than the second number.
REPLICATES, FEWEST_REPLICATES = 200, 50
ROWS_OF_ALL_REPLICATES = 1_000_000
# Share of resamples in which a metric may be undefined (one class only) before it has no interval.
MOST_UNDEFINED = 0.05


@dataclass(frozen=True)
class Bootstrap:
    """Metrics of the rows as they are, and of each resample.

    Attributes:
        estimate: by metric; NaN what is undefined.
        resampled: by metric, shape (R,).
        clusters: what was resampled: that many users, or rows.
    """

    estimate: dict[str, float]
    resampled: dict[str, Doubles]
    clusters: int

    def interval(self, metric: str, level: float = 0.95) -> tuple[float, float]:
        """The middle `level` of the resamples (percentile interval); NaN if it is undefined in more than 5 % of them,
        or if there is but one cluster."""
        values = self.resampled[metric]
        defined = values[np.isfinite(values)]
        if self.clusters < 2 or len(defined) < (1 - MOST_UNDEFINED) * len(values):
            return math.nan, math.nan
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def minus(self, other: Bootstrap) -> Bootstrap:
        """The differences, metric by metric and resample by resample.

        Both have to be of the same rows in the same clusters, with the same seed: a resample then holds the same rows
        on either side, and what makes them hard or easy for both cancels.

        Raises:
            ValueError: if the numbers of clusters or of resamples differ.
        """
        if self.clusters != other.clusters:
            raise ValueError(f"{self.clusters} clusters and {other.clusters} cannot be paired")
        shared = [metric for metric in self.estimate if metric in other.estimate]
        if any(self.resampled[metric].shape != other.resampled[metric].shape for metric in shared):
            raise ValueError("different numbers of resamples cannot be paired")
        return Bootstrap(
            {metric: self.estimate[metric] - other.estimate[metric] for metric in shared},
            {metric: self.resampled[metric] - other.resampled[metric] for metric in shared},
            self.clusters,
        )


class Resampleable(ABC):
    """Rows in clusters, ready to be weighed by how often each cluster was drawn.

    Attributes:
        rows: n.
        clusters: C.
        cluster_n: the cluster of each row, from 0.
    """

    def __init__(self, rows: int, clusters: Tensor | None) -> None:
        """Args:
            clusters: shape (n,), integer key of each row's cluster; default: each row is its own.

        Raises:
            ValueError: if the clusters are not integers, or not one for each row.
        """
        self.rows = rows
        if clusters is None:
            self.clusters, self.cluster_n = rows, np.arange(rows)
            return
        if clusters.shape != (rows,) or clusters.is_floating_point():
            raise ValueError(f"clusters must be {rows} integers, got {clusters.dtype} of shape {tuple(clusters.shape)}")
        keys, self.cluster_n = np.unique(clusters.cpu().numpy(), return_inverse=True)
        self.clusters = len(keys)

    @abstractmethod
    def metrics(self, count_C: Integers) -> dict[str, float]:
        """The metrics if cluster c, with all its rows, is in the data `count_C[c]` times."""

    def estimate(self) -> dict[str, float]:
        """The metrics of the rows as they are."""
        return self.metrics(np.ones(self.clusters, dtype=np.int64))

    def _sums(self, *values: Doubles) -> Doubles:
        """Sums of each cluster, shape (V, C)."""
        return np.stack([np.bincount(self.cluster_n, value, self.clusters) for value in values])


class BinaryRows(Resampleable):
    """Predictions of a binary label; metrics as in the functions of their names, undefined ones NaN.

    `ne` (against the resample's own rate), `auc`, `calibration`, `calibration_error` (its distance from 1), `logloss`,
    `rate`.

    Args:
        logits, labels, weights: as for `log_loss`.
        clusters: shape (n,), integers; default: each row is its own.

    Raises:
        ValueError: as `log_loss`, or if the clusters are not integers, one for each row.
    """

    def __init__(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, clusters: Tensor | None = None
    ) -> None:
        scores, label_n, weight_n = checked(logits, labels, weights)
        super().__init__(len(scores), clusters)
        z, y, w = scores.numpy(), label_n.numpy(), weight_n.numpy()
        loss, p = cross_entropy(scores, label_n).numpy(), torch.sigmoid(scores.double()).numpy()
        self._sums_VC = self._sums(w, w * y, w * (1 - y), w * loss, w * p)
        # One sort for all resamples. A positive row wins against the negatives below the first row of its tie, and half
        # of those from there to its last one: the mean of two running sums.
        order = np.argsort(z, kind="stable")
        z, positive, self._negative_n = z[order], (w * y)[order], (w * (1 - y))[order]
        self._cluster_n = self.cluster_n[order]
        starts = run_starts(z)
        (rows_P,) = np.nonzero(positive)
        tie_P = np.searchsorted(starts, rows_P, side="right") - 1
        self._below_P, self._upto_P = starts[tie_P], np.append(starts, len(z))[tie_P + 1]
        self._positive_P, self._cluster_P = positive[rows_P], self._cluster_n[rows_P]
        self._running = np.zeros(len(z) + 1)

    def metrics(self, count_C: Integers) -> dict[str, float]:
        mass, positive, negative, loss, predicted = (self._sums_VC @ count_C).tolist()
        result = dict.fromkeys(("ne", "auc", "calibration", "calibration_error", "logloss", "rate"), math.nan)
        if mass > 0:
            result["logloss"], result["rate"] = loss / mass, positive / mass
        if positive > 0:
            result["calibration"] = predicted / positive
            result["calibration_error"] = abs(predicted / positive - 1)
        if positive > 0 and negative > 0:
            entropy = -positive * math.log(positive / mass) - negative * math.log(negative / mass)
            result["ne"] = loss / entropy
            result["auc"] = self._won(count_C) / (positive * negative)
        return result

    def _won(self, count_C: Integers) -> float:
        """Weight of the pairs in which the positive stands above the negative, ties half."""
        count_C = count_C.astype(np.float64)
        mass_n = count_C[self._cluster_n]
        mass_n *= self._negative_n
        np.cumsum(mass_n, out=self._running[1:])
        below_P = self._running[self._below_P]
        below_P += self._running[self._upto_P]
        return 0.5 * float(np.dot(count_C[self._cluster_P] * self._positive_P, below_P))


class NumberRows(Resampleable):
    """Predictions of a number: `rmse`, `mae`, `mse`, `mean` of the labels, `predicted` (mean prediction).

    Args:
        predictions, labels: shape (n,).
        weights: shape (n,), non-negative.
        clusters: shape (n,), integers; default: each row is its own.

    Raises:
        ValueError: if there are no rows, shapes differ, or a number is not finite.
    """

    def __init__(
        self, predictions: Tensor, labels: Tensor, weights: Tensor | None = None, clusters: Tensor | None = None
    ) -> None:
        x, y = predictions.detach().cpu().double().numpy(), labels.detach().cpu().double().numpy()
        w = np.ones_like(y) if weights is None else weights.detach().cpu().double().numpy()
        if x.ndim != 1 or not x.shape == y.shape == w.shape:
            raise ValueError(f"predictions, labels and weights have shapes {x.shape}, {y.shape}, {w.shape}")
        if not len(x):
            raise ValueError("a metric needs at least one row")
        if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(w).all() and (w >= 0).all()):
            raise ValueError("predictions, labels and weights must be finite, and no weight negative")
        super().__init__(len(x), clusters)
        self._sums_VC = self._sums(w, w * (x - y) ** 2, w * np.abs(x - y), w * y, w * x)

    def metrics(self, count_C: Integers) -> dict[str, float]:
        mass, squares, distance, labels, predictions = (self._sums_VC @ count_C).tolist()
        if mass <= 0:
            return dict.fromkeys(("rmse", "mae", "mse", "mean", "predicted"), math.nan)
        return {
            "rmse": math.sqrt(squares / mass),
            "mae": distance / mass,
            "mse": squares / mass,
            "mean": labels / mass,
            "predicted": predictions / mass,
        }


class MeanRows(Resampleable):
    """Means of several values of each row (whether a list had the item, say).

    Args:
        values: by name, each of shape (n,).
        clusters: shape (n,), integers; default: each row is its own.

    Raises:
        ValueError: if there are no values or no rows, or the shapes differ.
    """

    def __init__(self, values: Mapping[str, Tensor], clusters: Tensor | None = None) -> None:
        columns = {name: value.detach().cpu().double().numpy() for name, value in values.items()}
        lengths = {column.shape for column in columns.values()}
        if len(lengths) != 1 or (rows := next(iter(lengths))[0]) == 0:
            raise ValueError(f"means need values of one length, at least 1; the shapes are {sorted(lengths)}")
        super().__init__(rows, clusters)
        self._names = tuple(columns)
        self._sums_VC = self._sums(np.ones(rows), *columns.values())

    def metrics(self, count_C: Integers) -> dict[str, float]:
        rows, *sums = (self._sums_VC @ count_C).tolist()
        return {name: total / rows for name, total in zip(self._names, sums, strict=True)}


def bootstrap(rows: Resampleable, *, replicates: int | None = None, seed: int = 0) -> Bootstrap:
    """Metrics of the rows and of resamples: as many clusters as there are, drawn with replacement.

    A user's rows are alike, so resampling single rows would say too little; resampling users keeps them together. The
    same seed draws the same clusters, which is what pairs two of them for `Bootstrap.minus`.

    Args:
        replicates: number of resamples; default 200 up to a million rows, and beyond as many as cost the same, at
            least 50.

    Raises:
        ValueError: if `replicates` is below 2.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; Field and Welsh, Bootstrapping
    clustered data, JRSS B 2007.
    """
    if replicates is None:
        replicates = min(REPLICATES, max(FEWEST_REPLICATES, REPLICATES * ROWS_OF_ALL_REPLICATES // rows.rows))
    if replicates < 2:
        raise ValueError(f"replicates is {replicates}, expected at least 2")
    estimate = rows.estimate()
    resampled = {metric: np.empty(replicates) for metric in estimate}
    random = np.random.default_rng(seed)
    for place in range(replicates):
        drawn = random.integers(rows.clusters, size=rows.clusters)
        for metric, value in rows.metrics(np.bincount(drawn, minlength=rows.clusters)).items():
            resampled[metric][place] = value
    return Bootstrap(estimate, resampled, rows.clusters)
