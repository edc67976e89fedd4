"""Newton's method whose Hessian comes from a few rows, drawn by how much they matter, while the gradient is exact.

    problem = Problem(ParquetSource("clicks/", target="click"), LOSSES["logistic"], penalty=1.0)
    subsampled_newton(problem, sampling="leverage").coef

Source: Xu, Yang, Roosta, Ré and Mahoney, Sub-sampled Newton Methods with Non-uniform Sampling, arXiv 1607.00559.

Deviations: the paper is local and takes unit steps; here the first point solves the problem of a uniform sample of rows, and
steps are halved until the objective falls enough. The last few steps and changes of the gradient, both exact, correct the
inverse of the sampled Hessian by L-BFGS's two loops: fewer iterations at no further pass.
"""

# Shapes: d columns, p = d + 1 with an intercept (its entry is last) else d.

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fullrank.randomized.curvature import (
    HALVINGS,
    Cholesky,
    Curvature,
    Draw,
    Problem,
    Sample,
    Sampling,
    Sums,
    draw_only,
    evaluate,
    full_curvature,
    sampled_curvature,
    values_along,
)
from fullrank.randomized.losses import Vector
from fullrank.randomized.sources import ArraySource

_ARMIJO = 1e-4
_DIRECTIONS = 16  # of the random projection that estimates leverage scores
_MEMORY = 5  # steps that correct a sampled Hessian


class Step(NamedTuple):
    """A line of the history: objective, largest entry of the gradient, rows of the Hessian, passes, CPU seconds so far."""

    value: float
    gradient: float
    rows: int
    passes: int
    seconds: float


@dataclass(frozen=True)
class NewtonResult:
    """Where the iteration ended.

    Attributes:
        coef: shape (p,), the intercept last.
        converged: whether both stopping rules were met.
        history: one `Step` per accepted point, the first included.
    """

    coef: Vector
    converged: bool
    history: list[Step]


def subsampled_newton(
    problem: Problem,
    start: Vector | None = None,
    *,
    sampling: Sampling = "leverage",
    sample_size: int | None = None,
    line_search: bool = True,
    memory: int = _MEMORY,
    tol: float = 1e-6,
    max_iter: int = 100,
    seed: int = 0,
    callback: Callable[[Vector], None] | None = None,
) -> NewtonResult:
    """Minimise a `Problem`.

    Args:
        start: shape (p,); the minimiser over a uniform sample of `sample_size` rows when omitted (zeros if that is no better,
            and if `sampling` is "none").
        sampling: how rows of the Hessian are drawn (see `Draw`); "none" takes all, which is Newton's method, and so does
            every other once `sample_size` comes to half the rows.
        sample_size: expected number of drawn rows, 50 p when omitted. It grows where steps fail or gain too little.
        line_search: halve steps that do not lower the objective enough; without, steps are of length one.
        memory: steps that correct a sampled Hessian; 0 is the paper's method.
        tol: stop when the gradient's largest entry is at most tol max(1, its first value), and half the Newton decrement,
            the distance to the minimum by the quadratic model, at most tol times the objective.
        max_iter: most steps.
        seed: of the draws.
        callback: told every accepted point.
    """
    return _Iteration(problem, sampling, sample_size, line_search, memory, seed).run(start, tol, max_iter, callback)


class _Iteration:
    """What changes from step to step: size of the sample, passes, remembered steps."""

    def __init__(
        self, problem: Problem, sampling: Sampling, size: int | None, line_search: bool, memory: int, seed: int
    ) -> None:
        self.problem, self.sampling, self.line_search, self.seed = problem, sampling, line_search, seed
        self.size = 50 * problem.size if size is None else size
        self.ridge = problem.ridge()
        self.pairs: deque[tuple[Vector, Vector]] = deque(maxlen=memory)
        self.started, self.first_pass = time.process_time(), problem.source.n_passes
        self.stream = 0
        self.at_zero = 0.0
        self._exact_when_large()

    def _exact_when_large(self) -> None:
        if 2 * self.size >= self.problem.source.n_rows:
            self.sampling = "none"

    def run(
        self, start: Vector | None, tol: float, max_iter: int, callback: Callable[[Vector], None] | None
    ) -> NewtonResult:
        coef, sums = self._begin(start)
        history: list[Step] = []
        largest = float(np.abs(sums.gradient).max(initial=0.0))
        while True:
            curvature = self._curvature(sums, coef)
            gradient = float(np.abs(sums.gradient).max(initial=0.0))
            passes = self.problem.source.n_passes - self.first_pass
            history.append(Step(sums.value, gradient, curvature.n_rows, passes, time.process_time() - self.started))
            if callback is not None:
                callback(coef)
            direction = self._direction(
                curvature, sums.gradient, forcing=min(0.1, np.sqrt(gradient / largest)) if largest else 0.1
            )
            fall = -float(sums.gradient @ direction)  # the squared Newton decrement
            small = abs(sums.value) * tol + np.finfo(float).tiny
            if gradient <= tol * max(1.0, largest) and fall / 2 <= small:
                return NewtonResult(coef, True, history)
            if len(history) > max_iter:
                return NewtonResult(coef, False, history)
            step, following = self._step(coef, sums, direction, fall, curvature)
            if following is None:
                # Rounding hides what is left to gain, or the sample is too small for a direction.
                if self.sampling == "none":
                    return NewtonResult(coef, fall <= 1e-10 * abs(sums.value), history)
                self._enlarge(2.0)
                self.pairs.clear()
                sums = self._evaluate(coef, self._draw(sums.mass, curvature))
                continue
            if self.sampling != "none":
                self.pairs.append((step, following.gradient - sums.gradient))
            coef, sums = coef + step, following
            if len(history) > 2 and gradient > 0.5 * history[-3].gradient:
                self._enlarge(1.5)

    def _begin(self, start: Vector | None) -> tuple[Vector, Sums]:
        zeros = np.zeros(self.problem.size)
        if self.sampling == "none":
            coef = zeros if start is None else start
            return coef, self._evaluate(coef, None)
        n = self.problem.source.n_rows
        parts = self.problem.total(draw_only, draw=Draw("uniform", self.size, n, self.seed, self._next_stream()))
        sample = Sample.joined(parts)
        coef = self._solved(sample) if start is None else start
        sums = self._evaluate(coef, self._draw_like(sample, coef), at_zero=True)
        if start is None and not sums.value <= sums.at_zero:
            coef, sums = zeros, self._evaluate(zeros, self._draw_like(sample, zeros))
        return coef, sums

    def _solved(self, sample: Sample) -> Vector:
        """The minimiser over sampled rows alone."""
        d = self.problem.source.n_cols
        source = ArraySource(sample.rows[:, :d], sample.target, sample.weight, check_finite=False)
        within = replace(self.problem, source=source, executor="serial")
        return subsampled_newton(within, sampling="none", tol=1e-3, max_iter=20).coef

    def _draw_like(self, sample: Sample, coef: Vector) -> Draw:
        """The first draw of a run, by what a uniform sample tells of the scores."""
        rows, target, weight = sample
        draw = self._draw(0.0, sampled_curvature(self.problem, sample, coef))
        curvature = self.problem.loss(rows @ coef, target).curvature
        if self.sampling == "uniform":
            return draw._replace(mass=self.problem.source.n_rows)
        odds = self.size / self.problem.source.n_rows
        return draw._replace(mass=float(draw.scores(rows, False, curvature * weight * odds).sum() / odds))

    def _draw(self, mass: float, curvature: Curvature) -> Draw | None:
        if self.sampling == "none":
            return None
        basis = None
        stream = self._next_stream()
        if self.sampling == "leverage":
            assert isinstance(curvature, Cholesky)
            basis = curvature.basis(_DIRECTIONS, np.random.default_rng([self.seed, stream]))
        return Draw(self.sampling, self.size, mass, self.seed, stream, basis)

    def _next_stream(self) -> int:
        self.stream += 1
        return self.stream

    def _evaluate(self, coef: Vector, draw: Draw | None, at_zero: bool = False) -> Sums:
        sums = self.problem.total(evaluate, coef=coef, draw=draw, at_zero=at_zero)
        sums.value += 0.5 * float(self.ridge @ np.square(coef))
        sums.gradient += self.ridge * coef
        return sums

    def _curvature(self, sums: Sums, coef: Vector) -> Curvature:
        if self.sampling == "none" or not sums.sample:
            return full_curvature(self.problem, coef)
        return sampled_curvature(self.problem, Sample.joined(sums.sample), coef)

    def _direction(self, curvature: Curvature, gradient: Vector, forcing: float) -> Vector:
        """Minus the inverse Hessian times the gradient; remembered steps enter by L-BFGS's two loops."""
        vector = gradient.copy()
        shares = []
        for step, change in reversed(self.pairs):
            share = (step @ vector) / (step @ change)
            shares.append(share)
            vector -= share * change
        vector = curvature.solve(vector, forcing)
        for (step, change), share in zip(self.pairs, reversed(shares), strict=True):
            vector += (share - (change @ vector) / (step @ change)) * step
        return -vector

    def _step(
        self, coef: Vector, sums: Sums, direction: Vector, fall: float, curvature: Curvature
    ) -> tuple[Vector, Sums | None]:
        """A step that lowers the objective enough, and the sums where it leads; None if there is none."""
        following = self._evaluate(coef + direction, self._draw(sums.mass, curvature))
        if not self.line_search or following.value <= self._bound(sums.value, fall, 1.0):
            return direction, following
        values = self.problem.total(values_along, coef=coef, direction=direction)
        for length, value in zip(HALVINGS, values, strict=True):
            value += 0.5 * float(self.ridge @ np.square(coef + length * direction))
            if value <= self._bound(sums.value, fall, length):
                step = length * direction
                return step, self._evaluate(coef + step, self._draw(sums.mass, curvature))
        return direction, None

    @staticmethod
    def _bound(value: float, fall: float, length: float) -> float:
        rounding = 4 * np.finfo(float).eps * abs(value)
        return value - _ARMIJO * length * fall + rounding

    def _enlarge(self, factor: float) -> None:
        self.size = int(factor * self.size)
        self._exact_when_large()
