"""Optimisers of low-rank polynomials: L-BFGS in passes over the rows, Adam in shuffled batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.polynomial import Fit, Sums
from fullrank.randomized.sources import ArraySource, RowSource

_MEMORY = 100  # steps that L-BFGS remembers
_BATCH, _STEP = 512, 0.05  # of Adam; the step in deviations of the start


@dataclass(frozen=True)
class Rules:
    """Ridge, tolerance of the gradient, steps without a gain on rows held out that end a fit, and where passes run."""

    alpha: float
    tol: float
    patience: int
    executor: Executor


class Curve(NamedTuple):
    """Where a fit ended: parameters, objective at each step, loss on the rows held out, whether a rule was met."""

    flat: Array
    objective: list[float]
    held_out: list[float]
    converged: bool


def _objective(sums: Sums, flat: Array, alpha: float) -> tuple[float, Array, float]:
    """Mean loss plus ridge, its gradient, and the mean loss of the rows held out."""
    if not math.isfinite(sums.loss):
        raise ValueError(
            "the loss overflows: products of many dot products need rows of length about 1 "
            '(normalize="l2"), a smaller init_scale, or a lower degree'
        )
    value = sums.loss / sums.weight + alpha / 2 * float(flat[1:] @ flat[1:])
    gradient = sums.gradient / sums.weight
    gradient[1:] += alpha * flat[1:]
    return value, gradient, sums.held_out_loss / sums.held_out_weight if sums.held_out_weight else math.nan


def lbfgs(source: RowSource, fit: Fit, start: Array, iterations: int, rules: Rules) -> Curve:
    """Minimise by L-BFGS, one pass over the rows for each evaluation."""
    progress = _Progress(rules.patience if fit.held_out else None)

    def objective(flat: Array) -> tuple[float, Array]:
        sums = Sums(*map_reduce(source, partial(fit.sums, flat=flat), executor=rules.executor))
        value, gradient, held_out = _objective(sums, flat, rules.alpha)
        progress.seen = value, held_out
        source.tell(f"objective {value:.6g}" + (f", held out {held_out:.6g}" if fit.held_out else ""))
        return value, gradient

    options: dict[str, float] = {"maxiter": iterations, "maxfun": 10 * iterations, "maxcor": _MEMORY}
    options |= {"gtol": rules.tol, "ftol": 1e-3 * rules.tol}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", callback=progress, options=options)
    return progress.curve(found.x, converged=found.status != 1)


def adam(source: RowSource, fit: Fit, start: Array, epochs: int, rules: Rules) -> Curve:
    """Minimise by Adam (Kingma and Ba 2015) with a step that falls to zero, on batches of shuffled rows in memory."""
    assert isinstance(source, ArraySource) and source.y is not None
    draws = np.random.default_rng(fit.seed)
    progress = _Progress(rules.patience if fit.held_out else None)
    flat, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    train, on_batch = np.flatnonzero(fit.trains_on(0, source.n_rows)), replace(fit, held_out=0.0)
    batches = -(-len(train) // _BATCH)
    spread = float(np.std(fit.polynomial.vectors(start)[1:])) if fit.polynomial.degree > 1 else 1.0
    step = 0
    for _ in range(epochs):
        for rows in np.array_split(draws.permutation(train), batches):
            weight = None if source.sample_weight is None else source.sample_weight[rows]
            if weight is not None and not weight.any():
                continue
            block = Block(source.X[rows], source.y[rows], weight, 0)
            _, gradient, _ = _objective(Sums(*on_batch.sums(iter([block]), flat=flat)), flat, rules.alpha)
            step += 1
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            rate = _STEP * spread * (1 - (step - 1) / (epochs * batches)) / (1 - 0.9**step)
            flat -= rate * first / (np.sqrt(second / (1 - 0.999**step)) + 1e-12)
        sums = Sums(*map_reduce(source, partial(fit.sums, flat=flat), executor=rules.executor))
        value, _, held_out = _objective(sums, flat, rules.alpha)
        progress.seen = value, held_out
        source.tell(f"objective {value:.6g}" + (f", held out {held_out:.6g}" if fit.held_out else ""))
        try:
            progress(flat)
        except StopIteration:
            break
    return progress.curve(flat, converged=True)


class _Progress:
    """Hears every step of an optimiser: keeps the curves, and the best parameters where rows are held out."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.seen = (math.nan, math.nan)
        self.objective: list[float] = []
        self.held_out: list[float] = []
        self.best: tuple[float, Array | None] = math.inf, None
        self.waited = 0

    def __call__(self, flat: Array) -> None:
        objective, held_out = self.seen
        self.objective.append(objective)
        if self.patience is None:
            return
        self.held_out.append(held_out)
        self.waited += 1
        if held_out < self.best[0]:
            self.best, self.waited = (held_out, flat.copy()), 0
        if self.waited >= self.patience:
            raise StopIteration

    def curve(self, flat: Array, *, converged: bool) -> Curve:
        best = flat if self.best[1] is None else self.best[1]
        return Curve(best, self.objective, self.held_out, converged or self.patience is not None)
