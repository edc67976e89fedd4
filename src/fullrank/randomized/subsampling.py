"""Samples of rows that stand for the loss of all of them: uniform, and by scores in a well-conditioned basis.

Row i of [A b] is kept with probability min(1, s q_i / sum q) and weighted by the inverse, where q_i is the l1 norm of
its row in the basis [A b] R^-1 of `l1_conditioner`. If that is well-conditioned in l1, the loss of the sample is within
1 +- eps of the loss of the table for all coefficients at once, so that one sample serves every quantile.

Source: Yang, Meng and Mahoney, Quantile Regression for Large-scale Applications, arXiv 1305.0087.

Deviation: the paper needs the sum of the scores before it can draw, one more pass. Here a row is kept where its score
over a uniform variable of its own exceeds the sum so far over s: the sum only rises, so no row is missed.
"""

# Shapes: n rows, D coefficients (intercept first where there is one), E = D + 1 columns of [A b].

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.conditioning import RankDeficientError, l1_conditioner, triangular
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.pinball import Objective, Rows, take
from fullrank.randomized.preprocessing import Start
from fullrank.randomized.sketches import Sketch, row_uniforms, sketch_blocks
from fullrank.randomized.sources import ArraySource, RowSource

ROW_NORMS = ("auto", "exact", "estimated")
_DRAWS = 3  # samples drawn before one that has lost a column is an error
_UNIFORM, _RANK, _SCORES = 11, 12, 200  # streams of random numbers of one seed


class DependentColumnsError(RankDeficientError):
    """Some columns are combinations of others: `columns`, positions among those of [1 | X] or X."""

    def __init__(self, message: str, columns: NDArray[np.intp]) -> None:
        super().__init__(message)
        self.columns = columns


def spanned_columns(R: Array) -> NDArray[np.intp]:
    """Columns that the columns before them span up to rounding."""
    return np.flatnonzero(np.abs(np.diag(R)) <= 1e-13 * np.maximum(np.linalg.norm(R, axis=0), 1e-300))


def refuse_rank(source: RowSource, R: Array, intercept: bool) -> None:
    """Raise a DependentColumnsError where columns of R are spanned by others."""
    found = spanned_columns(R)
    if len(found):
        names = ["the intercept"] if intercept else []
        names += [f'"{name}"' for name in source.feature_names]
        listed = ", ".join(names[j] for j in found[:10]) + (", ..." if len(found) > 10 else "")
        raise DependentColumnsError(
            f"rank {R.shape[1] - len(found)} of {R.shape[1]} columns in {source.n_rows} rows; {listed} depend on the "
            "columns before them",
            found,
        )


def sample_blocks(blocks: Iterator[Block], share: float, seed: int, intercept: bool, D: int) -> Rows:
    """Every row of positive weight with probability `share`."""
    parts = []
    for block in blocks:
        drawn = row_uniforms(seed, block.start, block.stop, _UNIFORM) < share
        if block.weight is not None:
            drawn &= block.weight > 0
        parts.append(take(block, np.flatnonzero(drawn), intercept))
    return Rows.gather(parts, D)


def uniform_start(source: RowSource, objective: Objective, size: float, seed: int, executor: Executor) -> Start:
    """About `size` rows, each as likely as any other; one pass. All rows of positive weight where size >= n."""
    D = source.n_cols + objective.intercept
    share = min(1.0, size / source.n_rows)
    draw = partial(sample_blocks, share=share, seed=seed, intercept=objective.intercept, D=D)
    rows = map_reduce(source, draw, executor=executor)
    R = objective.triangular(rows)
    penalised = objective.absolute or objective.ridge
    spread = objective.triangular(rows, share) if penalised and share < 1 else R
    return Start(rows, share, R, spread / np.sqrt(max(len(rows), 1)))


def sparse_start(source: ArraySource, objective: Objective) -> Start:
    """All rows of positive weight of a CSR table, as they are."""
    n = source.n_rows
    source.n_passes += 1
    X = source.X.astype(np.float64, copy=False)
    A: Any = sp.hstack([np.ones((n, 1)), X], format="csr") if objective.intercept else X.copy()
    A.sum_duplicates()
    weight = np.ones(n) if source.sample_weight is None else source.sample_weight
    assert source.y is not None
    rows = Rows(A, source.y.astype(np.float64, copy=False), weight, np.zeros(n), np.arange(n))
    if not weight.all():
        rows = rows.pick(np.flatnonzero(weight))
    R = objective.triangular(rows)
    return Start(rows, 1.0, R, R / np.sqrt(max(len(rows), 1)))


def scores(columns: Array, T: Array, estimate: bool) -> Array:
    """l1 norms of the rows of [A b] T, or their estimate where T has Cauchy columns; shape (rows,)."""
    image = np.abs(columns @ T)
    return np.median(image, axis=1) if estimate else image.sum(axis=1)


def score_blocks(
    blocks: Iterator[Block],
    T: Array,
    size: float,
    seed: int,
    stream: int,
    intercept: bool,
    target: bool,
    estimate: bool,
) -> tuple[float, Rows]:
    """Sum of scores, and every row whose score over its uniform variable, its key, exceeds the sum so far over `size`.

    The sum only rises, so the rows that exceed it at the end of the table are among those kept; `dual` holds the keys.
    """
    D = len(T) - target
    total, kept = 0.0, Rows.gather([], D)
    for block in blocks:
        q = scores(block.columns(intercept=intercept, target=target, weight_power=1.0), T, estimate)
        total += float(q.sum())
        keys = q / row_uniforms(seed, block.start, block.stop, stream)
        found = np.flatnonzero(keys * size > total)
        kept = Rows.gather([kept.pick(kept.dual * size > total), take(block, found, intercept, keys[found])], D)
    return total, kept


def score_sample(
    source: RowSource,
    R: Array,
    size: float,
    intercept: bool,
    seed: int,
    stream: int,
    executor: Executor,
    row_norms: str = "auto",
) -> tuple[Rows, Array]:
    """Rows of [A b] drawn by their l1 norms in the basis R, with their own weights, and 1 / probability, (m,)."""
    count = int(np.ceil(15 * np.log(40 * source.n_rows)))
    estimate = row_norms == "estimated" or (row_norms == "auto" and len(R) > count)
    T = solve_triangular(R, np.eye(len(R)))
    target = len(R) > source.n_cols + intercept
    if estimate:
        T = T @ np.random.default_rng([seed, stream]).standard_cauchy((len(R), count))
    score = partial(
        score_blocks,
        T=T,
        size=size,
        seed=seed,
        stream=stream,
        intercept=intercept,
        target=target,
        estimate=estimate,
    )
    total, kept = map_reduce(source, score, executor=executor)
    rows = kept.pick(kept.dual * size > total)
    columns = np.column_stack([rows.A, rows.b]) if target else rows.A
    q = scores(columns * rows.weight[:, None], T, estimate)
    return rows, np.maximum(1.0, total / (size * q))


def conditioner(
    source: RowSource, kind: str, intercept: bool, embedding_size: int | None, seed: int, executor: Executor
) -> Array:
    """R of [A b], or of A where b is a combination of its columns.

    Raises:
        DependentColumnsError: columns of A depend on each other.
    """
    condition = partial(
        l1_conditioner, source, kind, sketch_size=embedding_size, intercept=intercept, seed=seed, executor=executor
    )
    try:
        return condition(target=True)
    except RankDeficientError:
        pass
    try:
        return condition(target=False)
    except RankDeficientError:
        D = source.n_cols + intercept
        S = Sketch("sparse_sign", 20 * D, seed, nnz=min(8, 20 * D), stream=_RANK)
        columns = partial(sketch_blocks, S=S, intercept=intercept, weight_power=1.0)
        refuse_rank(source, triangular(map_reduce(source, columns, executor=executor)), intercept)
        raise


def conditioned_start(
    source: RowSource,
    objective: Objective,
    R: Array,
    size: float,
    seed: int,
    executor: Executor,
    row_norms: str = "auto",
    stream: int = 0,
) -> Start:
    """About `size` rows drawn by their l1 norms in the basis R; one pass.

    Raises:
        DependentColumnsError: if three draws lost a column.
    """
    intercept = objective.intercept
    for draw in range(_DRAWS):
        number = _SCORES + 10 * stream + draw
        rows, inverse = score_sample(source, R, size, intercept, seed, number, executor, row_norms)
        own = objective.triangular(rows)
        if not len(spanned_columns(own)) or draw == _DRAWS - 1:
            break
    refuse_rank(source, own, intercept)
    weighted = rows.reweighted(rows.weight * inverse)
    half = objective.triangular(rows.reweighted(rows.weight * np.sqrt(inverse)))
    return Start(weighted, 1.0, own, half / np.sqrt(source.n_rows))
