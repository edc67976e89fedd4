"""How a quantile regression is solved: all rows at once, a sample and bands in passes, or a sample alone."""

# Shapes: n rows, D coefficients of a solver (d features, and one before them for the intercept).

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import numpy as np
from scipy import sparse, stats

from fullrank.randomized.certificate import Certificate
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.interior_point import MOST_PAIRS
from fullrank.randomized.pinball import Objective, objective_blocks
from fullrank.randomized.preprocessing import ExactResult, most_rows, solve_in_passes, solve_rows
from fullrank.randomized.sources import ArraySource, RowSource
from fullrank.randomized.subsampling import (
    conditioned_start,
    conditioner,
    refuse_rank,
    spanned_columns,
    sparse_start,
    uniform_start,
)


@dataclass(frozen=True)
class Settings:
    """Parameters of `QuantileRegressor` that solvers look at, by their names there."""

    conditioning: str
    sketch_size: int | None
    embedding_size: int | None
    row_norms: str
    epsilon: float | None
    tol: float
    max_iter: int
    executor: Executor


def in_memory_and_sparse(source: RowSource) -> TypeGuard[ArraySource]:
    """Whether a table in memory is sparse, and stays so by the interior point method."""
    return isinstance(source, ArraySource) and sparse.issparse(source.X)


def cheaper(source: RowSource, D: int) -> str:
    """The exact solver with the smaller cost, "interior_point" or "passes", from what a step of each takes."""
    n = source.n_rows
    if not in_memory_and_sparse(source):
        return "interior_point" if n < max(2000, 35 * D) else "passes"
    # In nanoseconds: steps on all pairs of entries of a row, against dense steps on a sample and on a band.
    X: Any = source.X
    counts = np.diff(X.indptr) + 1
    pairs = float(np.square(counts, dtype=np.float64).sum())
    everything = 15 * ((4 if pairs <= MOST_PAIRS else 15) * pairs + 60 * n + 0.1 * D**3)
    passes = 100 * float(counts.sum()) + 1.2 * (2 * np.sqrt(n * D) + 40 * D) * D**2
    # Below 2,000 rows both cost much the same, and some tables need more passes than others.
    return "interior_point" if n <= 2000 or everything < passes else "passes"


def exact(
    settings: Settings, source: RowSource, objectives: list[Objective], seed: int, everything: bool
) -> list[ExactResult]:
    """One result for each objective: from all rows at once, or from one sample of them in passes."""
    first, executor = objectives[0], settings.executor
    D = source.n_cols + first.intercept
    size: float = source.n_rows
    if not everything:
        size = settings.sketch_size or min(2 * np.sqrt(source.n_rows * D), most_rows(D))
    if everything and in_memory_and_sparse(source):
        start = sparse_start(source, first)
    else:
        start = uniform_start(source, first, size, seed, executor)
    if len(spanned_columns(start.R)):
        if start.share == 1:
            refuse_rank(source, start.R, first.intercept)
        # Rare features: a uniform sample has missed some, scores do not.
        kind = "spc3" if settings.conditioning == "uniform" else settings.conditioning
        R = conditioner(source, kind, first.intercept, settings.embedding_size, seed, executor)
        start = conditioned_start(source, first, R, 2 * size, seed, executor, settings.row_norms)
    tol, most = settings.tol, settings.max_iter
    if everything:
        return [solve_rows(source, start, objective, tol=tol, max_iter=most) for objective in objectives]
    return solve_in_passes(source, objectives, start, tol=tol, max_iter=most, seed=seed, executor=executor)


def sketched(settings: Settings, source: RowSource, objectives: list[Objective], seed: int) -> list[ExactResult]:
    """One result for each objective, from one sample of the rows, or from two that grow until their mean is good."""
    first, executor = objectives[0], settings.executor
    D = source.n_cols + first.intercept
    size: float = settings.sketch_size or max(5000, 400 * D)
    uniform = settings.conditioning == "uniform"
    R = None
    if not uniform:
        R = conditioner(source, settings.conditioning, first.intercept, settings.embedding_size, seed, executor)
    tol = max(settings.tol, 1e-6)  # a sample misses by more
    round_ = 0
    while True:
        starts = []
        for half in range(1 if settings.epsilon is None else 2):
            if R is None:
                starts.append(uniform_start(source, first, size, seed + 2 * round_ + half, executor))
            else:
                number = 2 * round_ + half
                starts.append(conditioned_start(source, first, R, size, seed, executor, settings.row_norms, number))
            refuse_rank(source, starts[-1].R, first.intercept)
        solved = [
            [objective.solve(start.rows, share=start.share, tol=tol, max_iter=settings.max_iter) for start in starts]
            for objective in objectives
        ]
        points = [[small.coef for small in halves] for halves in solved]
        points = [[np.mean(halves, axis=0), *halves] for halves in points]
        values = map_reduce(source, partial(objective_blocks, points=points, objectives=objectives), executor=executor)
        values = [
            [value + objective.penalty(point) for value, point in zip(row, rows, strict=True)]
            for objective, row, rows in zip(objectives, values, points, strict=True)
        ]
        excess = max((row[1] + row[-1]) / 2 / row[0] - 1 if row[0] > 0 else 0.0 for row in values)
        excess *= float(stats.f.ppf(0.99, D, D))
        if settings.epsilon is None or excess <= settings.epsilon or size >= source.n_rows:
            break
        size, round_ = 2 * size, round_ + 1
    m = sum(len(start.rows) for start in starts)
    return [
        ExactResult(
            rows[0],
            Certificate(row[0], 0.0, np.inf),
            sum(small.n_iter for small in halves),
            m,
            0,
            all(small.converged for small in halves),
        )
        for rows, row, halves in zip(points, values, solved, strict=True)
    ]
