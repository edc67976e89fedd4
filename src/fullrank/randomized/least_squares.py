"""Least squares for tall tables, in one or a few passes: min |b - A x|^2 + alpha |x|^2.

| method | passes | when |
| --- | --- | --- |
| normal | 1 | normal equations; loses twice the digits of the condition number |
| gram | 2 | a sketch gives N with A N well conditioned, the second pass the normal equations of A N |
| lsqr | 2 + iterations | conjugate gradients on A N: no product of all columns with all, for wide tables |
| chebyshev | 2 + iterations | as lsqr, with known bounds instead of inner products; for a Gaussian sketch (LSRN) |
| sketch | 1 | solves the sketch instead: a few per cent above the smallest residual |
| auto | 1, 2 or 3 | normal if the condition is below 1e4, its Cholesky factor for N below 1e6, else gram |

Where the residual is so small beside b that sums of squares do not show it, one more pass measures it.

Sources: Yang, Meng and Mahoney, Implementing Randomized Matrix Algorithms in Parallel and Distributed Environments,
arXiv 1502.03032; Meng, Saunders and Mahoney, LSRN, 2014 (chebyshev); Yamamoto et al., CholeskyQR2, 2015 (the middle of
auto).

Deviation: the papers iterate with LSQR, one or two passes for each of its steps. The product of the preconditioned
columns costs one pass, is exact, and shows whether the sketch was good; it is the default.
"""

# Shapes: n rows, d features, q = d plus the intercept, t targets, r rank.

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.conditioning import Preconditioner, preconditioner, triangular
from fullrank.randomized.engine import Executor, add, concatenate, map_reduce
from fullrank.randomized.parameters import FLAG, NONE, check, integer, number, one_of, random_seed
from fullrank.randomized.sampling import sample_rows
from fullrank.randomized.sketches import KINDS, Sketch, sketch_blocks
from fullrank.randomized.sources import ArraySource, RowSource, as_source

METHODS = ("auto", "normal", "gram", "lsqr", "chebyshev", "sketch")
SAMPLES = ("leverage", "uniform")
NORMAL_CONDITION = 1e4  # normal equations then err by about 1e-8 relative
CHOLESKY_CONDITION = 1e6
GOOD, HOPELESS = 100.0, 1e14  # condition of (A N)'(A N) above which it repairs N, and above which N is drawn anew
LOST = 1e-22  # |A null|^2 per column, whose norm is 1: what the sketch calls null is not
SEEN = 1e-9  # |b - A x|^2 over |b|^2 below which it is not computed from A'A, A'b and |b|^2
_DRAWS = 4
_DRAWN = 1000  # rows that are drawn at least: of few columns they cost nothing
_TINY = np.finfo(float).tiny


@dataclass(frozen=True)
class LstsqResult:
    """A least-squares solution and what is known of it.

    Attributes:
        x: shape (q,), or (q, t) for several targets; the first entry is the intercept if there is one.
        rank: of [1 | X] (of its sketch, for the sketched methods).
        cond_estimate: condition number of [1 | X], rows weighted: exact for normal, else the sketch's, within about 2.
        n_passes: passes over the table.
        n_iter: iterations of lsqr or chebyshev, else the number of small systems solved.
        residual_norm: |b - A x| at the solution, shape () or (t,); None where no pass has seen it (sketch).
        relative_gradient: |A'r| / (|A| |r|), largest over targets, measured by the last pass of `refine` before it
            corrects x; None without.
        method: what auto chose; "direct" for a table with no more rows than its sketch would have.
    """

    x: Array
    rank: int
    cond_estimate: float
    n_passes: int
    n_iter: int
    residual_norm: Array | None
    relative_gradient: float | None
    method: str


def lstsq(
    A: Any,
    b: Any = None,
    *,
    precision: str = "high",
    method: str = "auto",
    sketch: str = "sparse_sign",
    sketch_size: int | None = None,
    alpha: float = 0.0,
    fit_intercept: bool = False,
    sample_weight: Any = None,
    refine: bool = False,
    tol: float = 1e-13,
    max_iter: int = 100,
    executor: Executor = "serial",
    random_state: Any = None,
) -> LstsqResult:
    """Minimise sum_i w_i (b_i - a_i x)^2 + alpha |x|^2; the smallest x where several minimise it.

    Args:
        A: shape (n, d), array or CSR; a `RowSource`, which then brings b and the weights; or a Dask collection.
        b: shape (n,) or (n, t).
        precision: "high", or "low", which is method "sketch".
        method: see the table above.
        sketch: a kind of `Sketch`; for method "sketch" also "leverage" or "uniform", which draw rows.
        sketch_size: rows of the sketch; 20 q when omitted, and 1,000 at least of "leverage" and "uniform".
        alpha: ridge penalty, not on the intercept.
        fit_intercept: put a column of ones before A.
        sample_weight: shape (n,), non-negative.
        refine: one more pass, which measures the gradient and corrects x.
        tol: lsqr and chebyshev stop when the gradient in the preconditioned basis is below tol * |r|.
        max_iter: of lsqr and chebyshev.
        executor: as in `map_reduce`.
        random_state: seed of the sketch.

    Raises:
        ValueError: an argument out of its range; no target; NaN or infinity in the table (the column is named).

    Warns:
        RuntimeWarning: the rank is below min(n, q).
        ConvergenceWarning: max_iter was reached.
    """
    check("precision", precision, one_of("high", "low"))
    check("method", method, one_of(*METHODS))
    sampled = method == "sketch" or precision == "low"
    check("sketch", sketch, one_of(*KINDS, *SAMPLES) if sampled else one_of(*KINDS))
    check("sketch_size", sketch_size, integer(1) | NONE)
    check("alpha", alpha, number(least=0))
    check("fit_intercept", fit_intercept, FLAG)
    check("refine", refine, FLAG)
    check("tol", tol, number(least=0))
    check("max_iter", max_iter, integer(1))
    # A product with NaN or infinity in it shows both: the table itself is searched only then.
    source = as_source(A, b, sample_weight) or ArraySource(A, b, sample_weight, check_finite=False)
    if source.n_targets == 0:
        raise ValueError("no target: give b, or a source with a target")
    solver = _Solver(source, fit_intercept, alpha, sketch, sketch_size, tol, max_iter, executor)
    seed = random_seed(random_state)
    result = solver.solve("sketch" if precision == "low" else method, refine, seed)
    if result.rank < min(source.n_rows, solver.q):
        warnings.warn(
            f"rank {result.rank} of {solver.q} columns: the smallest solution is returned", RuntimeWarning, stacklevel=2
        )
    if not source.single_target:
        return result
    norm = None if result.residual_norm is None else result.residual_norm[0]
    return LstsqResult(**{**vars(result), "x": result.x[:, 0], "residual_norm": norm})


@dataclass
class _Solver:
    source: RowSource
    intercept: bool
    alpha: float
    kind: str
    sketch_size: int | None
    tol: float
    max_iter: int
    executor: Executor

    def __post_init__(self) -> None:
        self.q = self.source.n_cols + self.intercept
        least = _DRAWN if self.kind in SAMPLES else 0
        self.size = max(20 * self.q, least) if self.sketch_size is None else self.sketch_size
        if self.size < self.q:
            raise ValueError(f"sketch_size is {self.size}, expected at least the {self.q} columns")
        self.penalty_Q = np.full(self.q, float(self.alpha))
        if self.intercept:
            self.penalty_Q[0] = 0.0
        self.first_pass = self.source.n_passes

    def map(self, function: Any, combine: Any = None, **arguments: Any) -> Any:
        function = partial(function, intercept=self.intercept, **arguments)
        extra = {} if combine is None else {"combine": combine}
        return map_reduce(self.source, function, executor=self.executor, **extra)

    def solve(self, method: str, refine: bool, seed: int) -> LstsqResult:
        short = self.source.n_rows <= self.size
        if method in ("auto", "normal"):
            result = self.normal_equations(method, refine, use_cholesky=not short)
            if result is not None:
                return result
            method = "gram"
        if short:
            rows = self.map(_joined, concatenate)
            basis, x = self.small_problem(rows)
            residual = rows[:, self.q :] - rows[:, : self.q] @ x
            return self.result("direct", x, basis, residual_norm=np.linalg.norm(residual, axis=0))
        if method == "sketch":
            basis, x = self.small_problem(self.sketched_rows(self.kind, 4, seed, 0))
            return self.result(method, x, basis)
        return self.preconditioned(method, refine, seed)

    def result(self, method: str, x: Array, basis: Preconditioner, **known: Any) -> LstsqResult:
        # The intercept is free, so where x is not unique the smallest coefficients are found without it.
        if basis.null.shape[1]:
            i = int(self.intercept)
            x = x + basis.null @ np.linalg.lstsq(basis.null[i:], -x[i:], rcond=None)[0]
        defaults = {"n_iter": 1, "residual_norm": None, "relative_gradient": None}
        passes = self.source.n_passes - self.first_pass
        known = {**defaults, **known}
        return LstsqResult(x, basis.N.shape[1], basis.condition, passes, method=method, **known)

    def refuse_non_finite(self) -> None:
        if isinstance(self.source, ArraySource):
            self.source.check_finite()

    # The small problems: a sketch, or the whole of a short table.

    def sketched_rows(self, kind: str, nnz: int, seed: int, stream: int) -> Array:
        """Sketch, or sample, of [1 | X | y]."""
        common: dict[str, Any] = {"intercept": self.intercept, "target": True}
        if kind == "leverage":
            S = Sketch("sparse_sign", 20 * self.q, seed, stream=stream)
            N = preconditioner(triangular(self.map(sketch_blocks, S=S))).N
            # Scores sum to about the rank: the pass that would add them up is saved.
            common |= {"N": N, "total": float(N.shape[1])}
        if kind in SAMPLES:
            return sample_rows(self.source, self.size, seed=seed, stream=100, executor=self.executor, **common)
        S = Sketch(kind, self.size, seed, min(nnz, self.size), self.source.n_rows, stream=stream)
        sketched: Array = self.map(sketch_blocks, S=S, target=True)
        return sketched

    def small_problem(self, rows: Array) -> tuple[Preconditioner, Array]:
        """Basis and solution of the problem whose rows are [1 | X | y]."""
        if not np.isfinite(rows).all():
            self.refuse_non_finite()
            raise ValueError("the products of the table overflow")
        if self.alpha:
            below = np.hstack([np.diag(np.sqrt(self.penalty_Q)), np.zeros((self.q, rows.shape[1] - self.q))])
            rows = np.vstack([rows, below])
        R = triangular(rows)
        basis = preconditioner(R[: self.q, : self.q])
        # R[: q] holds the factor of [1 | X] and, beside it, the projected targets.
        projected = R[: self.q, : self.q] @ basis.N
        return basis, basis.N @ np.linalg.lstsq(projected, R[: self.q, self.q :], rcond=None)[0]

    # One pass: normal equations, with one more if they make a good preconditioner.

    def normal_equations(self, method: str, refine: bool, use_cholesky: bool) -> LstsqResult | None:
        with np.errstate(all="ignore"):
            XX, cross, other = self.map(_moments)
        i = int(self.intercept)
        gram = np.empty((self.q, self.q))
        gram[i:, i:] = XX
        if i:
            gram[0, 0], gram[0, 1:] = other[0, 0], cross[:, 0]
            gram[1:, 0] = cross[:, 0]
        rhs = np.vstack([other[:1, i:], cross[:, i:]]) if i else cross
        norms2 = np.diag(other)[i:]
        penalised = gram + np.diag(self.penalty_Q)
        scale = np.sqrt(np.diag(penalised))
        finite = np.isfinite(gram).all() and np.isfinite(rhs).all() and np.isfinite(norms2).all()
        if not finite:
            self.refuse_non_finite()
        if not (finite and (scale > 0).all()):
            if method == "normal":
                raise np.linalg.LinAlgError("the normal equations have a zero or overflowing column; use method auto")
            return None
        scaled = penalised / np.outer(scale, scale)
        eigenvalues = np.linalg.eigvalsh(scaled)
        condition = np.sqrt(eigenvalues[-1] / eigenvalues[0]) if eigenvalues[0] > 0 else np.inf
        limit = 1e7 if method == "normal" else CHOLESKY_CONDITION if use_cholesky else NORMAL_CONDITION
        if condition > limit:
            if method == "normal":
                raise np.linalg.LinAlgError(f"condition {condition:.1e} of the scaled columns; use method auto")
            return None
        L = np.linalg.cholesky(scaled)
        x = scipy.linalg.cho_solve((L, True), rhs / scale[:, None]) / scale[:, None]
        basis = Preconditioner(
            scipy.linalg.solve_triangular(L, np.eye(self.q), lower=True).T / scale[:, None],
            np.empty((self.q, 0)),
            float(np.linalg.cond(L.T * scale)),
        )
        if method == "auto" and condition > NORMAL_CONDITION:
            return self.gram_passes("cholesky", basis, x, passes=2, always=refine)
        squares = norms2 - 2 * np.einsum("qt,qt->t", x, rhs) + np.einsum("qt,qp,pt->t", x, gram, x)
        if not refine:
            return self.result("normal", x, basis, residual_norm=self.residual_norm(x, squares, norms2))
        return self.gram_passes("normal", basis, x, passes=1)

    # A sketch for the basis, then normal equations or iterations in it.

    def preconditioned(self, method: str, refine: bool, seed: int) -> LstsqResult:
        for stream in range(_DRAWS):
            # What a sketch has lost once, one with more entries a column keeps.
            kind, nnz = (self.kind, 4) if stream == 0 else ("sparse_sign", 8)
            basis, x = self.small_problem(self.sketched_rows(kind, nnz, seed, stream))
            if method == "gram":
                result = self.gram_passes("gram", basis, x, passes=2, always=refine)
            else:
                result = self.iterate(method, basis, x)
            if result is not None:
                return result
        raise np.linalg.LinAlgError(f"{_DRAWS} sketches have lost a direction of the column space; use a larger one")

    def gram_passes(
        self, method: str, basis: Preconditioner, x: Array, passes: int, always: bool = True
    ) -> LstsqResult | None:
        """Newton steps in the basis, later ones if asked for or if the basis was bad; None if it lost a direction."""
        r, t = basis.N.shape[1], x.shape[1]
        for k in range(passes):
            M = np.hstack([basis.N, basis.null, x])
            P = self.map(_preconditioned_moments, M=M, targets=t)
            UU, Ur, rr = P[:r, :r], P[:r, -t:], np.diag(P)[-t:]
            penalised = UU + basis.N.T @ (self.penalty_Q[:, None] * basis.N)
            gradient = Ur - basis.N.T @ (self.penalty_Q[:, None] * x)
            eigenvalues = np.linalg.eigvalsh(penalised) if r else np.ones(1)
            if np.trace(P[r:-t, r:-t]) > LOST * self.q or not eigenvalues[0] * HOPELESS > eigenvalues[-1]:
                return None
            measured = self.relative_gradient(basis, gradient, rr) if k == passes - 1 else None
            step = np.linalg.solve(penalised, gradient)
            x = x + basis.N @ step
            unlucky = eigenvalues[-1] > GOOD * eigenvalues[0]
            if not (always or unlucky):
                break
            if unlucky:
                L = np.linalg.cholesky(penalised)
                basis = basis._replace(N=scipy.linalg.solve_triangular(L, basis.N.T, lower=True).T)
        squares = rr - 2 * np.einsum("rt,rt->t", step, Ur) + np.einsum("rt,rs,st->t", step, UU, step)
        norm = self.residual_norm(x, squares, rr)
        return self.result(method, x, basis, n_iter=k + 1, residual_norm=norm, relative_gradient=measured)

    def residual_norm(self, x: Array, squares: Array, terms: Array) -> Array:
        """Roots of `squares`, (t,), sums of terms of this size; one more pass where the sum has lost its digits."""
        if (squares < SEEN * terms).any():
            squares = self.map(_gradient, x=x)[1]
        return np.sqrt(squares)

    def relative_gradient(self, basis: Preconditioner, gradient: Array, squares: Array) -> float:
        full = np.linalg.lstsq(basis.N.T, gradient, rcond=None)[0]
        size = 1 / np.linalg.norm(basis.N, -2)
        return float((np.linalg.norm(full, axis=0) / (size * np.sqrt(np.maximum(squares, _TINY)))).max())

    def iterate(self, method: str, basis: Preconditioner, x: Array) -> LstsqResult | None:
        """Solve (A N)'(A N) z = (A N)'(b - A x) by conjugate gradients or Chebyshev's iteration, a pass for each step.

        No vector of length n is kept: a step needs A'(A v) only. The error of a step is that of LSQR, because A N is
        well conditioned.
        """
        N, penalty = basis.N, self.penalty_Q[:, None]
        if basis.null.shape[1]:
            P = self.map(_preconditioned_moments, M=np.hstack([basis.null, x]), targets=x.shape[1])
            if np.trace(P[: -x.shape[1], : -x.shape[1]]) > LOST * self.q:
                return None
        Ar, rr = self.map(_gradient, x=x)
        residual = start = N.T @ (Ar - penalty * x)
        z, direction, n_iter = np.zeros_like(start), start, 0
        target = self.tol * np.sqrt(rr)
        distortion = min(np.sqrt(N.shape[1] / self.size) + 1.5 / np.sqrt(self.size), 0.95)
        low, high = (1 + distortion) ** -2, (1 - distortion) ** -2
        middle, radius = (high + low) / 2, (high - low) / 2
        alpha: Any = 0.0
        beta: Any = 0.0
        while (np.linalg.norm(residual, axis=0) > target).any():
            if n_iter == self.max_iter:
                warnings.warn(f"{method} has not converged in {n_iter} iterations", ConvergenceWarning, stacklevel=4)
                break
            v = N @ direction
            product = N.T @ (self.map(_normal_product, v=v) + penalty * v)
            before = (residual**2).sum(axis=0)
            if method == "lsqr":
                alpha = before / np.maximum((direction * product).sum(axis=0), _TINY)
                z, residual = z + alpha * direction, residual - alpha * product
                beta = (residual**2).sum(axis=0) / np.maximum(before, _TINY)
            else:
                alpha = 1 / (middle - beta / alpha) if n_iter else 1 / middle
                z, residual = z + alpha * direction, residual - alpha * product
                beta = (radius * alpha) ** 2 / (4 if n_iter else 2)
            direction, n_iter = residual + beta * direction, n_iter + 1
            self.source.tell(f"iteration {n_iter}: gradient {np.linalg.norm(residual):.2e}")
        Nz = N @ z
        fitted2 = (z * (start - residual)).sum(axis=0) - (penalty * Nz**2).sum(axis=0)
        squares = rr - 2 * (Nz * Ar).sum(axis=0) + fitted2
        norm = self.residual_norm(x + Nz, squares, rr)
        return self.result(method, x + Nz, basis, n_iter=max(n_iter, 1), residual_norm=norm)


# One pass each; for `map_reduce`.


def _joined(blocks: Iterator[Block], intercept: bool) -> Array:
    return np.concatenate([block.columns(intercept=intercept, target=True) for block in blocks])


def _weighted(block: Block) -> tuple[Any, Array, Array]:
    """X, ones and y, with rows times the root of their weight."""
    X, y, ones = block.X, block.targets(), np.ones((block.X.shape[0], 1))
    if block.weight is None:
        return X, ones, y
    root = np.sqrt(block.weight)[:, None]
    X = sp.csr_array(X.multiply(root)) if sp.issparse(X) else X * root
    return X, root, y * root


def _moments(blocks: Iterator[Block], intercept: bool) -> tuple[Array, Array, Array] | None:
    """X'X, X'H and H'H with H = [1 | y]."""
    total: tuple[Array, Array, Array] | None = None
    for block in blocks:
        X, ones, y = _weighted(block)
        H = np.hstack([ones, y]) if intercept else y
        XX = X.T @ X
        part = (XX.toarray() if sp.issparse(XX) else XX, X.T @ H, H.T @ H)
        total = part if total is None else add(total, part)
    return total


def _preconditioned_moments(blocks: Iterator[Block], intercept: bool, M: Array, targets: int) -> Array:
    """P'P with P = [1 | X] M, whose last columns, fitted values, are turned into residuals."""
    total = np.zeros((M.shape[1], M.shape[1]))
    for block in blocks:
        P = block.product(M, intercept=intercept)
        y = block.targets()
        P[:, -targets:] = (y if block.weight is None else y * np.sqrt(block.weight)[:, None]) - P[:, -targets:]
        total += P.T @ P
    return total


def _gradient(blocks: Iterator[Block], intercept: bool, x: Array) -> tuple[Array, Array] | None:
    """[1 | X]'r and |r|^2 of r = b - [1 | X] x."""
    total: tuple[Array, Array] | None = None
    for block in blocks:
        r = block.targets() - block.fitted(x, intercept=intercept)
        weighted = r if block.weight is None else r * block.weight[:, None]
        part = (block.transposed(weighted, intercept=intercept), (r * weighted).sum(axis=0))
        total = part if total is None else add(total, part)
    return total


def _normal_product(blocks: Iterator[Block], intercept: bool, v: Array) -> Array:
    """[1 | X]'[1 | X] v."""
    total = np.zeros_like(v)
    for block in blocks:
        total += block.transposed(block.product(v, intercept=intercept, weight_power=1), intercept=intercept)
    return total
