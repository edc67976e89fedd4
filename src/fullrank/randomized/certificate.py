"""How far a quantile regression can be from the optimum, proved by a dual solution rather than estimated.

Let f be the penalised loss, z_i in w_i [t - 1, t] a number for each row, and e = A'z - (slope of the penalty at
beta). For the unknown optimum beta*, convexity gives

    f(beta) - f(beta*) <= sum_i (w_i rho_t(r_i) - z_i r_i) + e'(beta* - beta).

Every term of the sum is non-negative, and zero where z_i is at the bound of r_i's sign. The vector e is rounding and
what a solver left over; its product with the unknown beta* is bounded through any part S of the weighted rows,
A_S = QR:

    e'(beta* - beta) <= |R^-T e|_2 |A_S (beta* - beta)|_2,
    |A_S (beta* - beta)|_2 <= |A_S (beta* - beta)|_1
                           <= (f(beta*) + f(beta)) / min(t, 1 - t) <= 2 f(beta) / min(t, 1 - t).

Absolute penalties are rows of S like others. Rows sqrt(l) beta_j of a ridge add 2 sqrt(2 f(beta)), because
l / 2 |beta|_2 ** 2 is at most f(beta), for beta* too.

So the bound holds whatever z and beta are, and is small only at the optimum. It is exact up to the rounding of sums
over the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular

from fullrank.randomized.blocks import Array


@dataclass(frozen=True)
class Certificate:
    """Proof that the optimum is at least `lower_bound`.

    Attributes:
        objective: f(beta), the penalised sum over all rows.
        lower_bound: no coefficients have a smaller objective.
        infeasibility: the part of the difference that is due to e, relative to the objective.
    """

    objective: float
    lower_bound: float
    infeasibility: float

    @property
    def relative_gap(self) -> float:
        """(objective - lower bound) / objective; 0 where the objective is 0."""
        return (self.objective - self.lower_bound) / self.objective if self.objective > 0 else 0.0


def certify(
    objective: float, complementarity: float, imbalance: Array, R: Array, quantile: float, ridge: bool = False
) -> Certificate:
    """Bound the optimum from below.

    Args:
        objective: f(beta).
        complementarity: the sum above, over all rows and absolute penalties.
        imbalance: e, shape (D,).
        R: shape (D, D), upper triangular factor of some of the weighted rows, none of them twice, and of penalties.
        quantile: t, in (0, 1).
        ridge: whether a ridge is among the penalties.
    """
    diagonal = np.abs(np.diag(R))
    if not diagonal.min() > 0 or not objective > 0:
        return Certificate(objective, 0.0, np.inf)
    price = float(np.linalg.norm(solve_triangular(R, imbalance, trans="T")))
    reach = 2 * objective / min(quantile, 1 - quantile) + (2 * np.sqrt(2 * objective) if ridge else 0.0)
    missing = max(complementarity, 0.0) + price * reach
    return Certificate(objective, max(objective - missing, 0.0), price * reach / objective)
