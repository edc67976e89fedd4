"""Exact quantile regression in a few passes over a table of any size, by solving small problems only.

At the solution all but D residuals have a sign, and a row whose sign is known enters the problem only through the sum
of such rows. So:

1. a sample of rows is solved; its solution misses by about sqrt(D / sample);
2. Newton steps on all rows, for the loss smoothed over a window that shrinks with the miss, make the miss small;
3. rows with a residual near zero, the band, are collected, and all others are summed up with the sign they have now;
4. the band plus the sum is solved exactly, and
5. one more pass checks the signs. Where they hold, band and signs are a dual solution, which proves the optimum
   (`certificate`); rows whose sign was wrong join the band, and 4 and 5 are repeated.

Everything but the small problems is a sum over blocks of rows, so the table may be an array, Parquet files or a Dask
collection, and memory holds a sample and a band, each of at most 2**22 numbers (32 MiB) or 100 D rows, whatever the
data: where more rows tie, as zeros of a response do, the band is a part of them (`_Passes.through_ties`).

Source: Portnoy and Koenker, The Gaussian hare and the Laplacian tortoise, Statistical Science 1997, section 5.
Deviation: they go from the sample to the band at once, which needs samples and bands of n ** (2/3) rows. Step 2, the
one-step estimator of Bickel 1975 with a uniform kernel, costs two passes and makes both many times smaller.
"""

# Shapes: n rows, D coefficients (intercept first where there is one), m rows of a small problem, J projections.

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse
from scipy.linalg import LinAlgError, solve, solve_triangular

from fullrank.randomized.band import Band, Collected, Request, Smoothed, Verified, answers, ill_conditioned
from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.certificate import Certificate
from fullrank.randomized.engine import Executor
from fullrank.randomized.pinball import Objective, Rows, fitted, rho
from fullrank.randomized.sources import RowSource

WIDENINGS = 8  # bands tried before all rows are taken
BAND_CELLS = 2**22  # a band, 32 MiB of float64, or 100 D rows if these are more
SHRINKINGS = 20  # of the window around rows that tie
PROJECTIONS = 6  # Gaussian columns that estimate the length of a row: a band needs a rough length only


@dataclass(frozen=True)
class Start:
    """Where a solution in passes starts from.

    Attributes:
        rows: a sample of the table; weights include the inverse of a row's probability where that is not `share`.
        share: what part of the table's loss the rows stand for.
        R: shape (D, D), triangular factor of distinct weighted rows, for the certificate.
        spread: shape (D, D), triangular; spread' spread is about A'A / n.
    """

    rows: Rows
    share: float
    R: Array
    spread: Array

    def basis(self, objective: Objective) -> Array:
        """Columns in which the small problems are well-conditioned, (D, D); as they are where a penalty counts them."""
        eye = np.eye(len(self.R))
        if objective.absolute or objective.ridge or sparse.issparse(self.rows.A):
            return eye
        return np.asarray(solve_triangular(self.spread, eye))

    def delicate(self, coef: Array) -> bool:
        """Whether rounding of A coef could be seen in its loss, so that the proof takes long doubles."""
        lengths = np.linalg.norm(self.spread, axis=0)
        if np.linalg.cond(self.spread / np.where(lengths > 0, lengths, 1)) > 1e4:
            return True
        A, b = self.rows.A, self.rows.b
        terms = abs(A).mean(axis=0) @ np.abs(coef) + np.abs(b).mean()
        return bool(terms > 1e5 * np.abs(b - A @ coef).mean())


@dataclass(frozen=True)
class ExactResult:
    """The solution of a whole problem.

    Attributes:
        coef: shape (D,), intercept first where there is one.
        certificate: of the penalised loss over all rows.
        n_iter: Newton systems of the interior point method, over all small problems.
        n_sampled, n_band: rows of the sample and of the last band.
        converged: whether the gap of the certificate fell to the tolerance.
    """

    coef: Array
    certificate: Certificate
    n_iter: int
    n_sampled: int
    n_band: int
    converged: bool


def solve_rows(
    source: RowSource, start: Start, objective: Objective, *, tol: float = 1e-8, max_iter: int = 50
) -> ExactResult:
    """Minimise the objective over the rows of a start that holds all those of the source."""
    basis = start.basis(objective)
    rows = start.rows.in_basis(basis)
    m, D = rows.A.shape
    pivots: int | None = 20 * D if m * D < 10**6 else 0
    if sparse.issparse(rows.A) and m * D >= 2 * 10**6:
        pivots = None  # a first vertex may need all rows, and dense
    small = objective.solve(rows, tol=0.1 * tol, max_iter=max_iter, pivots=pivots)
    coef = basis @ small.coef
    precise = start.delicate(coef)
    r = (rows.b - fitted(start.rows.A, coef, np.longdouble if precise else np.float64)) * rows.weight
    loss = float(rho(r, objective.quantile).sum())
    certificate = objective.certificate(coef, loss, 0.0, start.rows, small, np.zeros(D), basis, start.R, precise)
    converged = certificate.relative_gap <= tol or certificate.objective <= nothing(start)
    return told(source, objective, ExactResult(coef, certificate, small.n_iter, m, m, converged))


def told(source: RowSource, objective: Objective, result: ExactResult) -> ExactResult:
    """The result, once a fit with `verbose` has told of it."""
    gap = result.certificate.relative_gap
    source.tell(f"quantile {objective.quantile:g}: relative gap {gap:.1e}, {result.n_band} rows in the last problem")
    return result


def most_rows(D: int) -> int:
    """Rows of a sample or a band that memory is to hold."""
    return max(BAND_CELLS // D, 100 * D)


def nothing(start: Start) -> float:
    """A loss that is zero up to rounding: the response is a combination of the columns, and there is no ratio to it."""
    return 1e-12 * float(np.abs(start.rows.b) @ start.rows.weight) / start.share


Answer = tuple[Any, Array]  # own sums of a request, and A'z in the basis


def solve_in_passes(
    source: RowSource,
    objectives: Sequence[Objective],
    start: Start,
    *,
    tol: float = 1e-8,
    max_iter: int = 50,
    seed: int = 0,
    executor: Executor = "serial",
) -> list[ExactResult]:
    """Minimise each objective over all rows of a source: four passes where the first bands hold the optima.

    Each solution goes its own way, and each pass answers what all of those that are not done ask next.

    Args:
        source: with one target.
        objectives: quantiles, with the same intercept and penalties.
        start: from `uniform_start` or `conditioned_start`.
        tol: relative gap to certify.
        max_iter: most Newton systems of a small problem.
        seed: of the projection.
        executor: as in `map_reduce`.
    """
    basis = start.basis(objectives[0])
    draws = np.random.default_rng(seed).standard_normal((len(basis), PROJECTIONS)) / np.sqrt(PROJECTIONS)
    projection = solve_triangular(start.spread, draws)
    solutions = [
        _Passes(source.n_rows, objective, start, basis, projection, tol, max_iter, seed) for objective in objectives
    ]
    middle = solutions[len(solutions) // 2]
    first = middle.of_sample()
    runs = [each.solve(first if each is middle else each.of_sample(first)) for each in solutions]
    asked = {i: next(run) for i, run in enumerate(runs)}
    results: dict[int, ExactResult] = {}
    while asked:
        source.tell(f"pass {source.n_passes + 1}: {len(asked)} of {len(runs)} quantiles to go")
        found = answers(source, list(asked.values()), basis, objectives[0].intercept, executor)
        for i, answer in zip(list(asked), found, strict=True):
            try:
                asked[i] = runs[i].send(answer)
            except StopIteration as end:
                results[i] = told(source, objectives[i], end.value)
                del asked[i]
    return [results[i] for i in range(len(runs))]


class _Passes:
    """One solution: its methods yield what they ask of the next pass; `best` is the best so far, with its proof."""

    def __init__(
        self,
        n_rows: int,
        objective: Objective,
        start: Start,
        basis: Array,
        projection: Array,
        tol: float,
        max_iter: int,
        seed: int,
    ) -> None:
        self.n_rows, self.objective, self.start, self.basis, self.projection = (
            n_rows,
            objective,
            start,
            basis,
            projection,
        )
        self.tol, self.max_iter, self.seed = tol, max_iter, seed
        self.D = len(self.basis)
        self.limit = most_rows(self.D)
        self.inner = basis if ill_conditioned(basis) else None
        self.n_iter = 0
        self.best: ExactResult | None = None

    def of_sample(self, near: Array | None = None) -> Array:
        """Coefficients that are good for the sample; `near` are those of another quantile."""
        objective, start = self.objective, self.start
        if near is not None and not (objective.absolute or objective.ridge):
            coef = self.smoothed_sample(near)
            if coef is not None:
                return coef
        first = objective.solve(start.rows.in_basis(self.basis), share=start.share, tol=1e-3, max_iter=self.max_iter)
        self.n_iter += first.n_iter
        return self.basis @ first.coef

    def smoothed_sample(self, coef: Array) -> Array | None:
        """Coefficients that minimise the sample's smoothed loss; None where Newton steps do not lead there soon."""
        rows, quantile = self.start.rows, self.objective.quantile
        if self.objective.intercept:
            coef = coef.copy()
            coef[0] += np.quantile(rows.b - rows.A @ coef, quantile)
        objective = Objective(quantile, False)
        block = Block(rows.A, rows.b, rows.weight, 0)
        window = self.first_window(coef)
        for _ in range(6):
            (hessian, _, _), z = Smoothed(coef, window, objective, self.basis).of_block(
                block, (rows.A @ coef)[None], None
            )
            hessian += 1e-3 * len(rows) / window * np.eye(self.D)
            move = -solve(hessian, self.basis.T @ (z @ rows.A), assume_a="pos")
            self.n_iter += 1
            coef = coef + self.basis @ move
            if np.linalg.norm(move) <= 0.1 * window:
                return coef
        return None

    def first_window(self, coef: Array) -> float:
        """Of rows whose sign the miss of a sample's solution leaves open, and no more than the smaller tail holds."""
        rows, D, t = self.start.rows, self.D, self.objective.quantile
        r = np.abs(rows.b - rows.A @ coef)
        inside = min(4 * np.sqrt(D * t * (1 - t) / len(r)), t, 1 - t)
        return float(np.quantile(r, min(1.0, inside + D / len(r)))) + 1e-300

    def solve(self, coef: Array) -> Generator[Request, Answer, ExactResult]:
        """The solution, from coefficients that are good for the sample."""
        D = self.D
        self.precise = self.start.delicate(coef)
        center, previous, width = yield from self.newton_steps(coef)
        for attempt in itertools.count():
            if attempt == WIDENINGS:
                width = np.inf
            if np.isinf(width) and self.n_rows > self.limit:
                return (yield from self.through_ties(center, previous[2]))
            band = Band(center, self.projection, width, np.empty(0, dtype=np.int64))
            rows, outside, loss, count = yield from self.collect(band)
            everything = bool(np.isinf(width))
            if self.best is None and loss > previous[1] and not everything:
                # The last Newton step was too long, and so are the widths that came from it and led to it.
                center, previous, width = previous[0], (previous[0], np.inf, previous[2]), previous[2] / 4
                continue
            if count > self.limit:
                return (yield from self.through_ties(center, width))
            if count < 5 * D and not everything:
                width *= 4
                continue
            if count > self.n_rows / 2 and not everything:
                width = np.inf
                continue
            for _ in range(4):
                try:
                    sums, wrong = yield from self.attempt(band, rows, outside, loss)
                except LinAlgError:
                    # No row of some feature is in the band.
                    if everything:
                        raise
                    break
                assert self.best is not None
                if self.best.converged or everything:
                    return self.best
                if sums[2] > len(rows) or sums[2] == 0:
                    break
                outside = outside - (wrong.A @ self.basis).T @ wrong.dual
                rows = Rows.gather([rows, wrong], D)
                band = replace(band, released=np.union1d(band.released, wrong.index))
            if self.best is not None and self.best.certificate.objective < loss:
                center = self.best.coef
            width *= 4
        raise AssertionError("a band of all rows is the last one")

    def through_ties(self, center: Array, width: float) -> Generator[Request, Answer, ExactResult]:
        """The solution where more rows tie than memory holds, as of a target that is often zero.

        The loss smoothed over a window is minimised; its slopes balance all rows. Then the problem of some rows in the
        window is solved, with the z of the others fixed at these slopes: any z in [t - 1, t] is right for a row that
        the solution passes through. Rows that only come near cost z a little, less in a smaller window.
        """
        D = self.D
        window = 2 * width * np.sqrt(D) + 1e-300
        for _ in range(SHRINKINGS):
            center, count = yield from self.smoothed(center, window)
            share = min(1.0, 0.5 * self.limit / max(count, 1))
            band = Band(center, np.empty((D, 0)), 0.0, np.empty(0, dtype=np.int64), window, share, self.seed)
            rows, outside, loss, _ = yield from self.collect(band)
            with suppress(LinAlgError):  # no row of some feature is in the window
                yield from self.attempt(band, rows, outside, loss)
            if self.best is not None:
                if self.best.converged:
                    return self.best
                if self.best.certificate.objective < loss:
                    center = self.best.coef
            window /= 8
        assert self.best is not None, "rows in a window span the columns that the smoothed loss sees"
        return self.best

    def smoothed(self, coef: Array, window: float) -> Generator[Request, Answer, tuple[Array, int]]:
        """The minimum of the loss smoothed over a window, near `coef`, and how many rows are in the window."""
        reach, length, before = np.inf, 1.0, coef
        for _ in range(8):
            gradient, hessian, _, count = yield from self.newton_sums(coef, window)
            move = -solve(hessian, gradient, assume_a="pos")
            fall = -float(gradient @ move)
            if fall > 2 * reach:
                length /= 4
                coef = before + length * (coef - before)
                continue
            small = np.linalg.norm(self.start.spread @ self.basis @ move) <= 1e-3 * window
            reach, length, before = fall, 1.0, coef
            coef = coef + self.basis @ move
            if small:
                break
        return coef, count

    def newton_steps(self, coef: Array) -> Generator[Request, Answer, tuple[Array, tuple[Array, float, float], float]]:
        """Coefficients after two steps; those before the last step with their loss and width; the width after."""
        objective, start, D = self.objective, self.start, self.D
        window = self.first_window(coef)
        mask = objective.penalised(D)
        points: list[tuple[Array, float, float]] = []
        for _ in range(2):
            gradient, hessian, loss, count = yield from self.newton_sums(coef, window)
            if points and loss > points[-1][1]:
                return points[-1][0], points[-1], 2 * points[-1][2]
            mean, spread = max(count, 1) / (2 * window), start.spread @ self.basis
            free = np.ones(D, dtype=bool)
            if objective.absolute:
                free = (mask == 0) | (np.abs(coef) * np.linalg.norm(start.spread, axis=0) > 1e-6 * window)
            move = np.zeros(D)
            move[free] = -solve(hessian[np.ix_(free, free)], gradient[free], assume_a="pos")
            # Three times the step, spread over D directions; at least what holds some 20 D rows.
            miss = max(3 * float(np.linalg.norm(spread @ move)), 20 * D / mean / 2) / np.sqrt(D)
            points.append((coef, loss, miss))
            coef = coef + self.basis @ move
            if count > 80 * D:
                window /= 4
        return coef, points[-1], points[-1][2]

    def newton_sums(self, coef: Array, window: float) -> Generator[Request, Answer, tuple[Array, Array, float, int]]:
        """Gradient and Hessian of the smoothed loss in the basis, with the penalties, the loss itself, and the rows in
        the window."""
        own, gradient = yield Smoothed(coef, window, self.objective, self.inner)
        hessian, loss, count = own
        if self.inner is None:
            hessian = self.basis.T @ hessian @ self.basis
        objective, mask = self.objective, self.objective.penalised(self.D)
        # A column without rows in the window has no curvature of its own: it is lent a little of the mean one.
        spread = self.start.spread @ self.basis
        hessian += 0.02 * max(count, 1) / (2 * window) * spread.T @ spread + np.diag(objective.ridge * mask)
        gradient = gradient + objective.ridge * mask * coef + objective.absolute * mask * np.sign(coef)
        return gradient, hessian, loss + objective.penalty(coef), count

    def collect(self, band: Band) -> Generator[Request, Answer, tuple[Rows, Array, float, int]]:
        (parts, loss, count), outside = yield Collected(band, self.objective, self.limit)
        return Rows.gather(parts, self.D), outside, loss + self.objective.penalty(band.center), count

    def attempt(
        self, band: Band, rows: Rows, outside: Array, loss: float
    ) -> Generator[Request, Answer, tuple[Array, Rows]]:
        """Solve the band and see what all rows say: the sums and the rows of `verify_blocks`."""
        near: Array = np.asarray(np.linalg.solve(self.basis, band.center), dtype=np.float64)
        small = self.objective.solve(
            rows.in_basis(self.basis),
            linear=outside,
            start=near,
            tol=0.1 * self.tol,
            scale=loss,
            max_iter=self.max_iter,
            pivots=2 * self.D,
        )
        self.n_iter += small.n_iter
        coef = self.basis @ small.coef
        own, _ = yield Verified(band, coef, self.objective, len(rows), self.precise)
        sums, exact, wrong = own
        # In the columns of the table again.
        outside = exact if self.precise else np.asarray(np.linalg.solve(self.basis.T, outside))
        certificate = self.objective.certificate(
            coef, float(sums[0]), float(sums[1]), rows, small, outside, self.basis, self.start.R, self.precise
        )
        if self.best is None or certificate.objective < self.best.certificate.objective:
            converged = certificate.relative_gap <= self.tol or certificate.objective <= nothing(self.start)
            self.best = ExactResult(coef, certificate, self.n_iter, len(self.start.rows), len(rows), converged)
        # Of too many rows nobody needs any.
        turned = Rows.gather(wrong if sums[2] <= len(rows) else [], self.D)
        return sums, turned
