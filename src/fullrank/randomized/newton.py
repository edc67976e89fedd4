"""Newton's method whose Hessian comes from a few rows, drawn by how much they matter, while the gradient is exact.

    problem = Problem(ParquetSource("clicks/", target="click"), LOSSES["logistic"], penalty=1.0)
    subsampled_newton(problem, sampling="leverage").coef

Source: Xu, Yang, Roosta, Ré and Mahoney, Sub-sampled Newton Methods with Non-uniform Sampling, arXiv 1607.00559.

Deviations: the paper is local and takes unit steps; here the first point solves the problem of a sample of rows,
stratified by the target, and steps are halved until the objective falls enough. The paper draws rows for every step;
here for every third, and between two draws the inverse Hessian is corrected by the last steps and changes of the
gradient, both exact (the two loops of L-BFGS): as few steps, most at the cost of a gradient. `refresh=1, memory=0` is
the paper's iteration. With an absolute penalty a step minimises the quadratic model plus that penalty (`elastic_net`).
"""

# Shapes: d columns, p = d + 1 with an intercept (its entry is last) else d.

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fullrank.randomized.blocks import Array
from fullrank.randomized.curvature import (
    HALVINGS,
    LARGEST_DENSE,
    Cholesky,
    Constant,
    Curvature,
    Problem,
    Sums,
    draw_by_target,
    evaluate,
    full_curvature,
    sampled_curvature,
    values_along,
)
from fullrank.randomized.draws import Draw, Sample, Sampling
from fullrank.randomized.elastic_net import minimiser, with_steps
from fullrank.randomized.sources import ArraySource

_ARMIJO = 1e-4
_TINY = np.finfo(float).tiny
_DIRECTIONS = 8  # of the random projection that estimates leverage scores
_ROWS_PER_UNKNOWN = 50
_FIRST_ROWS_PER_UNKNOWN = 20


class Step(NamedTuple):
    """A point of the history: objective, largest entry of the gradient, rows of the Hessian that led there, passes and
    CPU seconds so far."""

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
        excess: what is left to gain, relative to the objective, by the quadratic model.
        history: one `Step` per accepted point, the first included.
    """

    coef: Array
    converged: bool
    excess: float
    history: list[Step]


def subsampled_newton(
    problem: Problem,
    start: Array | None = None,
    *,
    sampling: Sampling = "leverage",
    sample_size: int | None = None,
    refresh: int = 3,
    memory: int = 10,
    line_search: bool = True,
    tol: float = 1e-6,
    max_iter: int = 100,
    seed: int = 0,
    callback: Callable[[Array], None] | None = None,
) -> NewtonResult:
    """Minimise a `Problem`.

    Args:
        start: shape (p,). When omitted, the minimiser over a sample of at most 20 p rows, as many of them with rare
            targets as with common ones; or the best model without features if that is no better or `sampling` is
            "none".
        sampling: how rows of the Hessian are drawn (see `Draw`); "none" takes all, which is Newton's method, and so
            does every other once `sample_size` comes to half the rows.
        sample_size: expected number of drawn rows; 50 p when omitted. It grows where steps fail or gain too little.
        refresh: steps that share one draw.
        memory: last steps that correct a sampled Hessian.
        line_search: halve steps that do not lower the objective enough; without, all steps have length one.
        tol: stop when the gradient's largest entry is at most tol max(1, its first value), and half the squared Newton
            decrement, the fall to the minimum by the quadratic model, at most tol times the objective.
        max_iter: most steps.
        seed: of the draws.
        callback: told every accepted point.
    """
    iteration = _Iteration(problem, sampling, sample_size, refresh, memory, seed)
    return iteration.run(start, line_search, tol, max_iter, callback)


class _Iteration:
    """What changes from step to step: the stand-in for the Hessian, the size of its sample, remembered steps."""

    def __init__(
        self, problem: Problem, sampling: Sampling, size: int | None, refresh: int, memory: int, seed: int
    ) -> None:
        self.problem, self.sampling, self.refresh, self.seed = problem, sampling, refresh, seed
        self.per_output = problem.size // problem.outputs
        self.size = _ROWS_PER_UNKNOWN * self.per_output if size is None else size
        self.ridge = problem.ridge()
        # With an absolute penalty and too many unknowns for a matrix, steps change some features' weights only.
        self.partly = bool(problem.absolute) and problem.size > LARGEST_DENSE
        self.features: NDArray[np.intp] | None = None
        self.pairs: deque[tuple[Array, Array]] = deque(maxlen=0 if self.partly else memory)
        self.curvature: Curvature | None = None
        self.age = 0  # steps taken with this curvature
        self.mass = 0.0
        self.stream = 0
        self.started, self.first_pass = time.process_time(), problem.source.n_passes
        self._exact_when_large()

    def run(
        self,
        start: Array | None,
        line_search: bool,
        tol: float,
        max_iter: int,
        callback: Callable[[Array], None] | None,
    ) -> NewtonResult:
        coef, sums = self._begin(start)
        history: list[Step] = []
        falls: list[float] = []
        largest = self._largest(coef, sums)
        rows = 0
        while True:
            gradient = self._largest(coef, sums)
            passes = self.problem.source.n_passes - self.first_pass
            history.append(Step(sums.value, gradient, rows, passes, time.process_time() - self.started))
            self.problem.source.tell(
                f"step {len(history) - 1}: objective {sums.value:.9g}, gradient {gradient:.2e}, pass {passes}"
            )
            if callback is not None:
                callback(coef)
            # An objective that falls to 0 is compared with its first value in the end.
            scale = abs(sums.value) + 1e-10 * abs(history[0].value)
            forcing = min(0.1, np.sqrt(gradient / largest)) if largest else 0.1
            flat = gradient <= tol * max(1.0, largest)
            # The last Hessian will do to see that nothing is left to gain.
            last = len(history) > max_iter
            if self.curvature is not None and (flat or last):
                fall = self._direction(coef, sums.gradient, forcing)[1]
                if (flat and fall / 2 <= tol * scale) or last:
                    return NewtonResult(coef, not last, fall / max(2 * scale, _TINY), history)
            self._renew_curvature(coef, sums)
            while True:
                direction, fall = self._direction(coef, sums.gradient, forcing)
                if flat and fall / 2 <= tol * scale:
                    return NewtonResult(coef, True, fall / max(2 * scale, _TINY), history)
                step, following = self._step(coef, sums, direction, fall, line_search)
                if following is not None:
                    break
                # What is left to gain drowns in rounding, or the sample is too small to give a direction.
                if self.sampling == "none" or fall <= 1e-13 * scale:
                    return NewtonResult(coef, fall <= 1e-10 * scale, fall / max(2 * scale, _TINY), history)
                if self.age == 0:
                    self._enlarge(2.0)
                self._redraw(coef, sums)
            assert self.curvature is not None
            rows = self.curvature.n_rows
            self.age += 1
            if self.sampling != "none":
                self.pairs.append((step, following.gradient - sums.gradient))
            falls.append(fall)
            if len(falls) > 2 and fall > 0.25 * falls[-3]:
                self._enlarge(1.5)
            coef, sums = coef + step, following

    def _begin(self, start: Array | None) -> tuple[Array, Sums]:
        constant = Constant.of(self.problem)
        plain = np.zeros(self.problem.size)
        plain[self.problem.n_penalised :] = constant.margin
        if self.sampling == "none":
            coef = plain if start is None else start
            return coef, self._evaluate(coef, None)
        size = min(self.size, _FIRST_ROWS_PER_UNKNOWN * self.per_output)
        draw = Draw("uniform", size, constant.weight, self.seed, self._next_stream())
        parts = self.problem.total(draw_by_target, draw=draw, constant=constant)
        if not parts:
            self.sampling = "none"
            return self._begin(start)
        sample = Sample.joined(parts)
        coef = self._solved(sample) if start is None else start
        sums = self._evaluate(coef, self._draw_like(sample, coef))
        if start is None and not sums.value <= constant.value:
            coef, sums = plain, self._evaluate(plain, self._draw_like(sample, plain))
        return coef, sums

    def _solved(self, sample: Sample) -> Array:
        """The minimiser over sampled rows alone, as exactly as it can tell of the whole."""
        d = self.problem.source.n_cols
        rows, target, weight = sample.rows[:, :d], sample.target, sample.weight
        source = ArraySource(rows, target, weight, offset=sample.offset, check_finite=False)
        within = replace(self.problem, source=source, executor="serial")
        return subsampled_newton(within, sampling="none", tol=1e-2, max_iter=20).coef

    def _draw_like(self, sample: Sample, coef: Array) -> Draw:
        """The first draw of a run, by what a first sample tells of the scores."""
        if not self.partly:
            self.curvature = sampled_curvature(self.problem, sample, coef)
        draw = self._draw()
        if self.sampling == "uniform":
            return draw
        derivatives = self.problem.loss(sample.margin(self.problem.shaped(coef)), sample.target)
        curvature = derivatives.curvature * sample.weight * sample.odds
        scores = draw.scores(sample.rows, False, curvature)
        draw = draw._replace(mass=float((scores / sample.odds).sum()))
        for _ in range(20):  # towards the mass that makes the expected number of rows right
            draw = draw._replace(mass=float((np.minimum(scores, draw.certain) / sample.odds).sum()))
        return draw

    def _draw(self) -> Draw:
        stream, basis = self._next_stream(), None
        mass = float(self.problem.source.n_rows) if self.sampling == "uniform" else self.mass
        if self.sampling == "leverage":
            assert isinstance(self.curvature, Cholesky)
            basis = self.curvature.basis(_DIRECTIONS, np.random.default_rng([self.seed, stream]))
        return Draw(self.sampling, self.size, mass, self.seed, stream, basis)

    def _next_stream(self) -> int:
        self.stream += 1
        return self.stream

    def _evaluate(self, coef: Array, draw: Draw | None) -> Sums:
        sums: Sums = self.problem.total(evaluate, coef=self.problem.shaped(coef), draw=draw)
        sums.value += self.problem.penalties(coef)
        sums.gradient += self.ridge * coef
        if draw is not None:
            # A point whose rows hardly curve must not make the next draw take most of the table.
            self.mass = max(sums.mass, draw.mass / 4)
        return sums

    def _renew_curvature(self, coef: Array, sums: Sums) -> None:
        if self.partly:
            self.features = self._worth_changing(coef, sums)
        if self.sampling == "none" or (self.partly and not sums.sample):
            self.curvature = full_curvature(self.problem, coef, self.features)
        elif sums.sample:
            sample = Sample.joined(sums.sample)
            self.curvature, self.age = sampled_curvature(self.problem, sample, coef, self.features), 0

    def _worth_changing(self, coef: Array, sums: Sums) -> NDArray[np.intp]:
        """Features whose weights are not zero or would not stay so, at most as many as a matrix may have."""
        n, K = self.problem.n_penalised, self.problem.outputs
        steep = np.abs(self.problem.subgradient(coef, sums.gradient)[:n]).reshape(-1, K).max(axis=1)
        wanted = np.flatnonzero((steep > 0) | coef[:n].reshape(-1, K).any(axis=1))
        most = LARGEST_DENSE // K
        return wanted if len(wanted) <= most else np.sort(wanted[np.argsort(-steep[wanted])[:most]])

    def _redraw(self, coef: Array, sums: Sums) -> None:
        """New rows for the same point, without the steps remembered."""
        self.pairs.clear()
        draw = None if self.sampling == "none" else self._draw()
        self._renew_curvature(coef, sums if draw is None else self._evaluate(coef, draw))

    def _direction(self, coef: Array, gradient: Array, forcing: float) -> tuple[Array, float]:
        """The step to the minimum of the quadratic model, and twice what the model falls by: without an absolute
        penalty the squared Newton decrement."""
        if self.problem.absolute:
            return self._penalised_direction(coef, gradient)
        direction = -self._solved_for(gradient, forcing)
        return direction, -float(gradient @ direction)

    def _penalised_direction(self, coef: Array, gradient: Array) -> tuple[Array, float]:
        assert isinstance(self.curvature, Cholesky)
        matrix, problem = with_steps(self.curvature.matrix, self.pairs), self.problem
        n, places = problem.n_penalised, np.arange(problem.size)
        if self.features is not None:
            chosen = self.features[:, None] * problem.outputs + np.arange(problem.outputs)
            places = np.append(chosen, np.arange(n, problem.size))
        new = minimiser(matrix, gradient[places], coef[places], problem.absolute, problem.size - n)
        step = new - coef[places]
        direction = np.zeros_like(coef)
        direction[places] = step
        rise = problem.absolute * float(np.abs((coef + direction)[:n]).sum() - np.abs(coef[:n]).sum())
        return direction, -2 * (float(gradient @ direction) + rise) - float(step @ matrix @ step)

    def _solved_for(self, gradient: Array, forcing: float) -> Array:
        """The inverse Hessian times the gradient; remembered steps enter by L-BFGS's two loops."""
        assert self.curvature is not None
        vector = gradient.copy()
        shares = []
        for step, change in reversed(self.pairs):
            share = (step @ vector) / (step @ change)
            shares.append(share)
            vector -= share * change
        vector = self.curvature.solve(vector, forcing)
        for (step, change), share in zip(self.pairs, reversed(shares), strict=True):
            vector += (share - (change @ vector) / (step @ change)) * step
        return vector

    def _step(
        self, coef: Array, sums: Sums, direction: Array, fall: float, line_search: bool
    ) -> tuple[Array, Sums | None]:
        """A step that lowers the objective enough, and the sums where it leads; None if there is none."""

        def enough(value: float, length: float) -> bool:
            rounding = 4 * np.finfo(float).eps * abs(sums.value)
            return bool(value <= sums.value - _ARMIJO * length * fall + rounding)

        draw, mass = self._draw() if self.sampling != "none" and self.age + 1 >= self.refresh else None, self.mass
        following = self._evaluate(coef + direction, draw)
        if not line_search or enough(following.value, 1.0):
            return direction, following
        self.mass = mass
        # A sample that gives no such step is drawn anew; with all rows there is one, however short.
        for shorter in range(4 if self.sampling == "none" else 1):
            lengths = HALVINGS * HALVINGS[-1] ** shorter
            way = {"coef": self.problem.shaped(coef), "direction": self.problem.shaped(direction)}
            values = self.problem.total(values_along, **way, lengths=lengths)
            for length, value in zip(lengths, values, strict=True):
                step = length * direction
                if enough(value + self.problem.penalties(coef + step), length):
                    return step, self._evaluate(coef + step, draw)
        return direction, None

    def _enlarge(self, factor: float) -> None:
        self.size = int(factor * self.size)
        self._exact_when_large()

    def _exact_when_large(self) -> None:
        if 2 * self.size >= self.problem.source.n_rows:
            self.sampling = "none"
            self.pairs.clear()

    def _largest(self, coef: Array, sums: Sums) -> float:
        """Largest entry of the gradient, with an absolute penalty of the smallest subgradient."""
        return float(np.abs(self.problem.subgradient(coef, sums.gradient)).max(initial=0.0))
