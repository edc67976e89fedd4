"""Rows drawn by their norm in a conditioned basis, each by a coin of its own.

With R such that A R^-1 is well conditioned, the norms of the rows of A R^-1 say which rows a small sample must not
miss: for p = 2 they are leverage scores, for p = 1 their counterpart in quantile regression.
"""

# Shapes: n rows, q columns of [1 | X], k rows of a block, t targets, r columns of N = R^-1.

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.engine import Executor, concatenate, map_reduce
from fullrank.randomized.sketches import poisson_sample
from fullrank.randomized.sources import RowSource


def row_scores(block: Block, N: Array, p: int, *, intercept: bool = False) -> Array:
    """sum_j |[1 | X | y] N|_ij ** p, shape (k,); rows of a weighted block count weight times.

    N has a row for each column of [1 | X], and may have rows for the targets.
    """
    if N.shape[0] > block.X.shape[1] + intercept:
        conditioned = block.columns(intercept=intercept, target=True, weight_power=0) @ N
    else:
        conditioned = block.fitted(N, intercept=intercept)
    scores: Array = np.einsum("kr,kr->k", conditioned, conditioned) if p == 2 else np.abs(conditioned).sum(axis=1)
    return scores if block.weight is None else scores * block.weight


def score_total(blocks: Iterator[Block], N: Array, p: int, intercept: bool) -> float:
    """Sum of the scores of a fragment; for `map_reduce`."""
    return sum(float(row_scores(block, N, p, intercept=intercept).sum()) for block in blocks)


def sampled_rows(
    blocks: Iterator[Block],
    N: Array | None,
    scale: float,
    p: int,
    seed: int,
    stream: int,
    intercept: bool,
    target: bool,
) -> Array:
    """Rows [1 | X | y] kept with probability min(1, scale * score), or min(1, scale) without N; for `map_reduce`.

    A row comes times (weight / probability) ** (1 / p): sums over the sample then estimate sums over the table.
    """
    kept_rows = []
    for block in blocks:
        wanted = row_scores(block, N, p, intercept=intercept) if N is not None else 1.0
        kept, weights = poisson_sample(np.broadcast_to(scale * wanted, block.X.shape[0]), seed, block.start, stream)
        if block.weight is not None:
            weights = weights * block.weight[kept]
        y = None if block.y is None else block.y[kept]
        rows = Block(block.X[kept], y, weights, block.start)
        kept_rows.append(rows.columns(intercept=intercept, target=target, weight_power=1 / p))
    return np.concatenate(kept_rows)


def sample_rows(
    source: RowSource,
    size: float,
    N: Array | None = None,
    *,
    p: int = 2,
    total: float | None = None,
    seed: int = 0,
    stream: int = 0,
    intercept: bool = False,
    target: bool = False,
    executor: Executor = "serial",
) -> Array:
    """A Poisson sample of about `size` rows of [1 | X | y], scaled so that it estimates sums of p-th powers.

    Args:
        source: the table.
        size: expected number of rows; the actual number is random.
        N: shape (columns, r): rows are drawn by the p-norm of [1 | X] N, or [1 | X | y] N, to the p-th power; uniformly
            when omitted.
        p: 1 or 2.
        total: sum of all scores where it is known; else one more pass finds it.
        seed, stream: of the coins.
        intercept, target: which columns the rows have.
        executor: as in `map_reduce`.

    Returns:
        shape (rows kept, columns).

    Raises:
        ValueError: every score is zero.
    """
    if N is None:
        scale = size / source.n_rows
    else:
        if total is None:
            count: Any = partial(score_total, N=N, p=p, intercept=intercept)
            total = map_reduce(source, count, executor=executor)
        if not total > 0:
            raise ValueError("every row has score zero: there is nothing to draw")
        scale = size / total
    draw = partial(sampled_rows, N=N, scale=scale, p=p, seed=seed, stream=stream, intercept=intercept, target=target)
    rows: Array = map_reduce(source, draw, concatenate, executor)
    return rows
