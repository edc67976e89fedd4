"""The loss of quantile regression over rows of a table, its penalties, and small problems of some of its rows."""

# Shapes: D coefficients (intercept first where there is one), m rows of a small problem, k rows of a block.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.certificate import Certificate, certify
from fullrank.randomized.conditioning import sparse_triangular, triangular
from fullrank.randomized.crossover import vertex
from fullrank.randomized.interior_point import CHUNK, InteriorPointResult, balanced, frisch_newton


def rho(residual: Array, quantile: float | Array) -> Array:
    """t r for r >= 0, (t - 1) r below."""
    return np.maximum(quantile * residual, (quantile - 1) * residual)


@dataclass(frozen=True)
class Rows:
    """Some rows of a table.

    Attributes:
        A: shape (m, D), with the intercept's column of ones; dense, or CSR where all rows of a table are taken.
        b, weight: shape (m,).
        dual: shape (m,), z that a row had before it was taken; zero for others.
        index: shape (m,), numbers of the rows.
    """

    A: Any
    b: Array
    weight: Array
    dual: Array
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.b)

    def __add__(self, below: Rows) -> Rows:
        """These rows with others under them; for `map_reduce`."""
        return Rows.gather([self, below], self.A.shape[1])

    def pick(self, which: NDArray[Any]) -> Rows:
        """Some of the rows, by mask or position."""
        return Rows(*(getattr(self, field.name)[which] for field in fields(self)))

    def in_basis(self, basis: Array) -> Rows:
        """The same rows as combinations of other columns, A @ basis; sparse rows stay as they are."""
        return self if sp.issparse(self.A) else replace(self, A=self.A @ basis)

    def weighted(self) -> Any:
        """A with rows times their weight."""
        if (self.weight == 1).all():
            return self.A
        return sp.diags_array(self.weight) @ self.A if sp.issparse(self.A) else self.A * self.weight[:, None]

    def reweighted(self, weight: Array) -> Rows:
        return replace(self, weight=weight)

    @classmethod
    def gather(cls, parts: Sequence[Rows], D: int) -> Rows:
        """All rows of the parts, in order."""
        if not parts:
            return cls(np.empty((0, D)), np.empty(0), np.empty(0), np.empty(0), np.empty(0, dtype=np.int64))
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def take(block: Block, index: NDArray[np.intp], intercept: bool, dual: Array | None = None) -> Rows:
    """Some rows of a block."""
    X = block.X[index]
    X = X.toarray() if sp.issparse(X) else X
    A = np.empty((len(index), X.shape[1] + intercept))
    A[:, int(intercept) :] = X
    if intercept:
        A[:, 0] = 1
    weight = np.ones(len(index)) if block.weight is None else block.weight[index]
    return Rows(A, block.target[index], weight, np.zeros(len(index)) if dual is None else dual, block.start + index)


@dataclass(frozen=True)
class Objective:
    """Sum of w rho_t(b - A beta), plus absolute * |beta|_1 + ridge / 2 * |beta|_2 ** 2 without the intercept."""

    quantile: float
    intercept: bool
    absolute: float = 0.0
    ridge: float = 0.0

    def loss(self, r: Array, weight: Array | None) -> float:
        """Sum of w rho_t(r), without penalties, of residuals (k,)."""
        value = rho(r, self.quantile)
        return float(value.sum() if weight is None else value @ weight)

    def penalised(self, D: int) -> Array:
        """1 for coefficients with a penalty, 0 for the intercept; shape (D,)."""
        mask = np.ones(D)
        if self.intercept:
            mask[0] = 0
        return mask

    def penalty(self, coef: Array) -> float:
        part = coef[int(self.intercept) :]
        return float(self.absolute * np.abs(part).sum() + 0.5 * self.ridge * part @ part)

    def solve(
        self,
        rows: Rows,
        *,
        share: float = 1.0,
        linear: Array | None = None,
        start: Array | None = None,
        tol: float = 1e-8,
        scale: float | None = None,
        max_iter: int = 50,
        pivots: int | None = None,
    ) -> InteriorPointResult:
        """Minimise over some rows, with penalties times `share` and `-linear' beta` for the rest of the table.

        The dual has one entry for each row, then one for each coefficient with an absolute penalty. With `pivots`, and
        without a ridge, the solution is moved to a vertex if that takes no more exchanges of rows.
        """
        A, b = rows.weighted(), rows.b * rows.weight
        t: float | Array = self.quantile
        mask = self.penalised(A.shape[1])
        if self.absolute:
            extra = 2 * share * self.absolute * np.eye(len(mask))[mask > 0]
            A = sp.csr_array(sp.vstack([A, sp.csr_array(extra)])) if sp.issparse(A) else np.vstack([A, extra])
            b = np.append(b, np.zeros(len(extra)))
            t = np.append(np.full(len(rows), self.quantile), np.full(len(extra), 0.5))
        result = frisch_newton(
            A,
            b,
            t,
            linear=None if linear is None else -linear,
            ridge=share * self.ridge * mask if self.ridge else None,
            start=start,
            tol=tol,
            scale=scale,
            max_iter=max_iter,
        )
        if pivots is None or self.ridge:
            return result
        rising = (np.arange(len(b)) < len(rows)).astype(np.float64)
        quantiles = np.broadcast_to(t, len(b))
        moved = vertex(A, b, quantiles, np.zeros(len(mask)) if linear is None else -linear, result.coef, rising, pivots)
        if moved is None:
            return result
        return InteriorPointResult(moved[0], np.clip(moved[1], quantiles - 1, quantiles), 0.0, result.n_iter, True)

    def triangular(self, rows: Rows, share: float = 1.0) -> Array:
        """R of the weighted rows and of the penalties times `share`, shape (D, D); zeros below where rows are few."""
        A = rows.weighted()
        mask = self.penalised(A.shape[1])
        for strength in (share * self.absolute, np.sqrt(share * self.ridge)):
            if strength:
                extra = strength * np.diag(mask)
                A = sp.vstack([A, sp.csr_array(extra)]) if sp.issparse(A) else np.vstack([A, extra])
        if sp.issparse(A):
            return sparse_triangular(sp.csr_array(A))
        return triangular(np.vstack([A, np.zeros((max(0, A.shape[1] - len(A)), A.shape[1]))]))

    def certificate(
        self,
        coef: Array,
        loss: float,
        missing: float,
        rows: Rows,
        small: InteriorPointResult,
        outside: Array,
        basis: Array,
        R: Array,
        precise: bool,
    ) -> Certificate:
        """The proof for `coef`: `loss` over all rows, `missing` and `outside` = A'z of those not in `rows`.

        Args:
            coef: shape (D,), as returned: basis @ small.coef, rounded.
            rows: of the small problem, in the columns of the table.
            small: its solution, in the basis.
            outside: in the columns of the table.
            basis, R: shape (D, D); R is the factor of some rows in the columns of the table.
            precise: whether rows are evaluated in long double, and the dual is moved until its sums agree there.
        """
        m = len(rows)
        wide: Any = np.longdouble if precise else np.float64
        z = small.dual[:m].copy()
        r = (rows.b - fitted(rows.A, coef, wide)) * rows.weight
        balance: Any = outside.astype(wide)
        part = coef[int(self.intercept) :]
        balance[int(self.intercept) :] -= self.ridge * part
        if self.absolute:
            extra = 2 * self.absolute * small.dual[m:]
            missing += float((self.absolute * np.abs(part) + extra * part).sum())
            balance[int(self.intercept) :] += extra
        A = rows.in_basis(basis).weighted() if precise else np.empty((0, 0))
        for correction in range(4 if precise else 1):
            imbalance = np.asarray(basis.T.astype(wide) @ (balance + transposed(rows.A, rows.weight * z, wide)))
            if correction == 3 or not precise:
                break
            z = balanced(A, z, self.quantile, -imbalance.astype(np.float64))
        missing += float((rho(r, self.quantile) - z * r).sum())
        price = imbalance.astype(np.float64)
        return certify(loss + self.penalty(coef), missing, price, R @ basis, self.quantile, ridge=self.ridge > 0)


def fitted(A: Any, coef: Array, wide: Any = np.float64) -> Any:
    """A @ coef for rows A (k, D), in the type `wide`."""
    return A @ coef if wide is np.float64 else A.astype(wide) @ coef.astype(wide)


def transposed(A: Any, z: Array, wide: Any = np.float64) -> Any:
    """A' z, in the type `wide`, without a copy of all of A in it."""
    if wide is np.float64:
        return A.T @ z
    parts = (slice(low, low + CHUNK) for low in range(0, max(A.shape[0], 1), CHUNK))
    return sum(A[part].T.astype(wide) @ z[part].astype(wide) for part in parts)


def objective_blocks(
    blocks: Iterator[Block], points: Sequence[Sequence[Array]], objectives: Sequence[Objective]
) -> Array:
    """Loss of each objective, without penalties, at each of its points; shape (objectives, points)."""
    intercept = objectives[0].intercept
    flat = np.column_stack([point for row in points for point in row])
    t = np.repeat([objective.quantile for objective in objectives], len(points[0]))
    total = np.zeros(flat.shape[1])
    for block in blocks:
        value = rho(block.target[:, None] - block.fitted(flat, intercept=intercept), t)
        total += value.sum(axis=0) if block.weight is None else block.weight @ value
    return total.reshape(len(objectives), -1)
