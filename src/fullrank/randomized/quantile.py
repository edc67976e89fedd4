"""Linear quantile regression for tables of any size: exact with a proof, or from a sample of rows.

QuantileRegressor([0.1, 0.5, 0.9]).fit(X, y).predict(X)
QuantileRegressor(0.9).fit(ParquetSource("wins/", target="price")).dual_gap_
"""

# Shapes: n rows, d features, T quantiles, D coefficients of a solver (d, and one before them for the intercept).

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.base import RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import d2_pinball_score
from sklearn.utils.validation import check_is_fitted

from fullrank.randomized.blocks import Array, Block, block_size
from fullrank.randomized.certificate import Certificate
from fullrank.randomized.columns import ColumnSource
from fullrank.randomized.conditioning import L1_KINDS
from fullrank.randomized.engine import concatenate, map_reduce
from fullrank.randomized.inputs import TableEstimator, linear_values, on_rows, training_source
from fullrank.randomized.parameters import (
    FLAG,
    NONE,
    check_parameters,
    integer,
    number,
    numbers,
    one_of,
    random_seed,
    wrong,
)
from fullrank.randomized.pinball import Objective
from fullrank.randomized.preprocessing import ExactResult
from fullrank.randomized.quantile_solvers import Settings, cheaper, exact, in_memory_and_sparse, sketched
from fullrank.randomized.sources import ArraySource, RowSource, as_source
from fullrank.randomized.subsampling import ROW_NORMS, DependentColumnsError

CONDITIONINGS = (*L1_KINDS, "uniform")
RANK_POLICIES = ("drop", "raise")
SOLVERS = ("auto", "interior_point", "passes", "sketch")
_NOTHING = ExactResult(np.zeros(0), Certificate(0.0, 0.0, 0.0), 0, 0, 0, True)  # of a response that is all zero
_RULES = {
    "quantile": numbers("numbers in (0, 1)", lambda t: t.size > 0 and bool(((t > 0) & (t < 1)).all())),
    "alpha": number(least=0),
    "l1_ratio": number(least=0, most=1),
    "fit_intercept": FLAG,
    "solver": one_of(*SOLVERS),
    "conditioning": one_of(*CONDITIONINGS),
    "sketch_size": integer(1) | NONE,
    "embedding_size": integer(1) | NONE,
    "row_norms": one_of(*ROW_NORMS),
    "epsilon": number(above=0) | NONE,
    "tol": number(above=0),
    "max_iter": integer(1),
    "rank_policy": one_of(*RANK_POLICIES),
    "non_crossing": FLAG,
}


class QuantileRegressor(RegressorMixin, TableEstimator):  # type: ignore[misc]
    """Linear model of one or several conditional quantiles.

    Minimises, for each quantile t, the weighted mean of rho_t(y - X w - w0) plus
    alpha * (l1_ratio * |w|_1 + (1 - l1_ratio) / 2 * |w|_2 ** 2), with rho_t(r) = max(t r, (t - 1) r).

    Args:
        quantile: in (0, 1), a number or several.
        alpha: strength of the penalty, none by default.
        l1_ratio: share of the absolute penalty.
        fit_intercept: whether w0 is fitted; it is not penalised.
        solver: "interior_point" solves all rows at once, sparse ones as they are; "passes" solves samples and bands of
            them and proves the optimum in about five passes, out of memory too; "sketch" solves a sample drawn by
            scores, in three to five passes, to a few digits and without a proof. "auto" is the cheaper of the first
            two.
        conditioning: of the scores: "spc3", "spc1", "spc2", "cauchy", "none", or "uniform" for a sample without them.
        sketch_size: rows of the sample; max(5000, 400 D) when omitted, or 2 sqrt(n D) by "passes".
        embedding_size: rows of the Cauchy sketch; 20 D when omitted.
        row_norms: scores "exact", "estimated" from Cauchy projections, or "auto": whichever is cheaper.
        epsilon: makes "sketch" double its sample until its estimated relative excess is at most this.
        tol: relative duality gap at which an exact solver stops.
        max_iter: most Newton systems of an interior point method.
        rank_policy: what to do with columns that those before them span: "drop" gives them a coefficient of zero and
            warns, "raise" refuses them.
        non_crossing: sort predictions over quantiles, so that a higher quantile is never below a lower one: the
            monotone rearrangement, whose pinball loss over all quantiles is never larger.
        verbose: whether to tell of steps and slow passes on standard error.
        executor: as in `map_reduce`: "serial", "threads", "dask" or a `distributed.Client`.
        random_state: seed of samples and sketches. Exact solvers give the same result for every seed, to `tol`.

    Attributes:
        coef_: shape (d,), or (T, d) for several quantiles, which share their passes, as all others: a leading T.
        intercept_: float or (T,).
        objective_: the minimum, on all rows.
        dual_gap_: proved bound on (objective_ - optimum) / objective_; None by "sketch", which proves nothing.
        n_iter_: Newton systems; n_sampled_, n_band_: rows of the small problems; n_passes_: over the table, in all.
        solver_used_: what "auto" chose.
        n_features_in_, feature_names_in_: of the last fit, to a source too; predictions refuse columns of other names.

    Raises:
        ValueError: parameters out of range, NaN or infinity, weights that are negative or all zero.
        RankDeficientError: by rank_policy="raise", columns that depend on each other.

    Sources: Yang, Meng and Mahoney, arXiv 1305.0087; Portnoy and Koenker, Statistical Science 1997; Chernozhukov,
    Fernández-Val and Galichon, Quantile and Probability Curves Without Crossing, Econometrica 2010.

    Deviation: for `epsilon`, the paper computes a sample size from constants too large for practice. Here two
    independent samples are solved. Half the sum of their objectives, less that of their mean, has the distribution of
    what the mean misses; so the sample grows until that, times the 0.99 quantile of the ratio of two such variables, is
    at most epsilon.
    """

    def __init__(
        self,
        quantile: Any = 0.5,
        *,
        alpha: float = 0.0,
        l1_ratio: float = 1.0,
        fit_intercept: bool = True,
        solver: str = "auto",
        conditioning: str = "spc3",
        sketch_size: int | None = None,
        embedding_size: int | None = None,
        row_norms: str = "auto",
        epsilon: float | None = None,
        tol: float = 1e-8,
        max_iter: int = 50,
        rank_policy: str = "drop",
        non_crossing: bool = False,
        verbose: bool | int = False,
        executor: Any = "serial",
        random_state: Any = None,
    ) -> None:
        self.quantile = quantile
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.conditioning = conditioning
        self.sketch_size = sketch_size
        self.embedding_size = embedding_size
        self.row_norms = row_norms
        self.epsilon = epsilon
        self.tol = tol
        self.max_iter = max_iter
        self.rank_policy = rank_policy
        self.non_crossing = non_crossing
        self.verbose = verbose
        self.executor = executor
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> QuantileRegressor:
        """Fit.

        Args:
            X: shape (n, d), dense or sparse; a `RowSource` with one target, and then no y; or a Dask collection.
            y: shape (n,).
            sample_weight: shape (n,), at least 0.
        """
        quantiles = self._checked()
        source = training_source(self, X, y, sample_weight, block_rows=_block_rows)
        seed = random_seed(self.random_state)
        passes = source.n_passes
        weight, largest = self._weight_and_size(source)
        penalty = self.alpha * weight
        objectives = [
            Objective(float(t), self.fit_intercept, penalty * self.l1_ratio, penalty * (1 - self.l1_ratio))
            for t in quantiles
        ]
        D = source.n_cols + self.fit_intercept
        self.solver_used_ = cheaper(source, D) if self.solver == "auto" else self.solver
        settings = Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})
        solve = partial(sketched, settings)
        if self.solver_used_ != "sketch":
            solve = partial(exact, settings, everything=self.solver_used_ == "interior_point")
        kept = np.arange(D)
        try:
            results = [_NOTHING] * len(objectives) if largest == 0 else solve(source, objectives, seed)
        except DependentColumnsError as error:
            if self.rank_policy == "raise":
                raise
            warnings.warn(f"{error}: their coefficients are zero", stacklevel=2)
            kept = np.delete(kept, error.columns)
            columns = kept[int(self.fit_intercept) :] - int(self.fit_intercept)
            reduced: RowSource = ColumnSource(source, columns)
            if in_memory_and_sparse(source):
                X = source.X[:, columns]
                reduced = ArraySource(X, source.y, source.sample_weight, block_rows=_block_rows(X), check_finite=False)
                reduced.progress = source.progress
            results = solve(reduced, objectives, seed)
        scalar = np.ndim(self.quantile) == 0

        def shaped(values: list[Any]) -> Any:
            return values[0] if scalar else np.array(values)

        coefs = np.zeros((len(results), D))
        if largest > 0:
            coefs[:, kept] = [result.coef for result in results]
        intercept = int(self.fit_intercept)
        self.coef_ = shaped(list(coefs[:, intercept:]))
        self.intercept_ = shaped(coefs[:, 0].tolist() if intercept else [0.0] * len(results))
        self.objective_ = shaped([result.certificate.objective / weight for result in results])
        proved = self.solver_used_ != "sketch"
        self.dual_gap_ = shaped([result.certificate.relative_gap for result in results]) if proved else None
        self.n_iter_ = shaped([result.n_iter for result in results])
        self.n_sampled_ = shaped([result.n_sampled for result in results])
        self.n_band_ = shaped([result.n_band for result in results])
        self.n_passes_ = source.n_passes - passes
        for t, result in zip(quantiles, results, strict=True):
            if not result.converged:
                warnings.warn(
                    f"quantile {t}: relative gap {result.certificate.relative_gap:.1e} after {result.n_iter} "
                    f"iterations, tol is {self.tol:.1e}; raise max_iter or tol",
                    ConvergenceWarning,
                    stacklevel=2,
                )
        return self

    def predict(self, X: Any) -> Array:
        """Quantiles for whatever `fit` takes as X: shape (n,), or (n, T) for several."""
        check_is_fitted(self)
        fitted = on_rows(self, X, partial(linear_values, coef=np.transpose(self.coef_), intercept=self.intercept_))
        return np.sort(fitted, axis=1) if self.non_crossing and fitted.ndim == 2 else fitted

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """D2, the share of the pinball loss of the best constant that the model saves: 1 at best, 0 for that constant;
        the mean over several quantiles. Model selection, as by `GridSearchCV`, maximises it.

        Args:
            X, y, sample_weight: as in `fit`.
        """
        fitted = self.predict(X)
        source = as_source(X, y, sample_weight)
        if source is not None:
            y, sample_weight = map_reduce(source.without_features(), _targets_of, concatenate, self.executor)
        quantiles = np.atleast_1d(np.asarray(self.quantile, dtype=np.float64))
        columns = fitted.reshape(len(fitted), len(quantiles)).T
        shares = [
            d2_pinball_score(y, column, sample_weight=sample_weight, alpha=t)
            for t, column in zip(quantiles, columns, strict=True)
        ]
        return float(np.mean(shares))

    def _checked(self) -> Array:
        """The quantiles; parameters out of range raise ValueError."""
        check_parameters(self, _RULES)
        quantiles = np.atleast_1d(np.asarray(self.quantile, dtype=np.float64))
        if self.non_crossing and (np.diff(quantiles) <= 0).any():
            raise wrong("quantile", self.quantile, "ascending numbers for non_crossing=True")
        return quantiles

    def _weight_and_size(self, source: RowSource) -> tuple[float, float]:
        """The sum of all weights, and the largest |y| of a row that has one; X is not read."""
        sums, sizes = map_reduce(source.without_features(), _target_blocks, _join_targets, self.executor)
        return sums, sizes


class LADRegressor(QuantileRegressor):
    """Linear model of the conditional median: least absolute deviations, which outliers of y cannot pull.

    The same as `QuantileRegressor(quantile=0.5)`: the objective is half the mean absolute error, plus penalties.
    Parameters and attributes are described there.
    """

    quantile = 0.5
    non_crossing = False

    def __init__(
        self,
        *,
        alpha: float = 0.0,
        l1_ratio: float = 1.0,
        fit_intercept: bool = True,
        solver: str = "auto",
        conditioning: str = "spc3",
        sketch_size: int | None = None,
        embedding_size: int | None = None,
        row_norms: str = "auto",
        epsilon: float | None = None,
        tol: float = 1e-8,
        max_iter: int = 50,
        rank_policy: str = "drop",
        verbose: bool | int = False,
        executor: Any = "serial",
        random_state: Any = None,
    ) -> None:
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.conditioning = conditioning
        self.sketch_size = sketch_size
        self.embedding_size = embedding_size
        self.row_norms = row_norms
        self.epsilon = epsilon
        self.tol = tol
        self.max_iter = max_iter
        self.rank_policy = rank_policy
        self.verbose = verbose
        self.executor = executor
        self.random_state = random_state


def _block_rows(X: Any) -> int:
    """Rows of a dense block that stays in the cache, or of a sparse one."""
    return block_size(X.shape[1]) if sparse.issparse(X) else max(256, 2**18 // X.shape[1])


def _target_blocks(blocks: Iterator[Block]) -> tuple[float, float]:
    weight, largest = 0.0, 0.0
    for block in blocks:
        weight += len(block) if block.weight is None else float(block.weight.sum())
        y = np.abs(block.target)
        largest = max(largest, float((y if block.weight is None else y[block.weight > 0]).max(initial=0.0)))
    return weight, largest


def _targets_of(blocks: Iterator[Block]) -> tuple[Array, Array]:
    targets, weights = zip(*((block.target, block.weights()) for block in blocks), strict=True)
    return np.concatenate(targets), np.concatenate(weights)


def _join_targets(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    return first[0] + second[0], max(first[1], second[1])
