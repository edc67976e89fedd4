"""Samples of rows that stand for the loss of all of them: uniform, and by scores in a well-conditioned basis.

Row i of [A b] is kept with probability min(1, s q_i / sum q) and weighted by the inverse, where q_i is the l1 norm of its
row in the basis [A b] R^-1. If the basis is well-conditioned in l1, the loss of the sample is within a factor 1 +- eps of
the loss of the table for all coefficients at once, so that one sample serves every quantile.

| conditioning | R |
| --- | --- |
| spc1 | QR of a sparse Cauchy sketch |
| spc2 | ellipsoidal rounding of a sample drawn by spc1's scores |
| spc3 | QR of a sample drawn by spc1's scores |
| cauchy | QR of a dense Cauchy sketch |
| none | identity: scores are the norms of the rows themselves |
| uniform | no scores |

Source: Yang, Meng and Mahoney, Quantile Regression for Large-scale Applications, arXiv 1305.0087.

Deviation: the paper sketches to 2 D^2 ln^2 D rows and draws 2 D^3 ln^2 D for spc2 and spc3, which is no sampling at all at
D = 50; here 20 D and 100 D, with the rank checked after every QR and a new draw where a Cauchy variable hid a column.
"""

# Shapes: n rows, D coefficients (intercept first where there is one), E = D + 1 columns of [A b].

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.interior_point import Array
from fullrank.randomized.pinball import Objective, Rows, combine_rows, take
from fullrank.randomized.preprocessing import Start
from fullrank.randomized.sketches import Sketch, row_uniforms, sketch_blocks
from fullrank.randomized.sources import Block, RowSource

CONDITIONINGS = ("spc3", "spc1", "spc2", "cauchy", "none", "uniform")
ROW_NORMS = ("auto", "exact", "estimated")
DRAWS = 3  # sketches tried before a rank below D is believed
# Streams of random numbers for one seed.
_UNIFORM, _SKETCH, _INNER, _SCORES = 11, 20, 40, 60


class RankDeficientError(np.linalg.LinAlgError, ValueError):
    """Some columns are combinations of others, so that the coefficients are not unique."""


def dependent_columns(R: Array) -> NDArray[np.intp]:
    """Columns that the columns before them span up to rounding."""
    return np.flatnonzero(np.abs(np.diag(R)) <= 1e-11 * np.maximum(np.linalg.norm(R, axis=0), 1e-300))


def refuse_rank(source: RowSource, R: Array, intercept: bool) -> None:
    """Raise a RankDeficientError that names the columns, if there are any."""
    found = dependent_columns(R)
    if len(found):
        names = ["the intercept"] if intercept else []
        names += [f'"{name}"' for name in source.feature_names]
        listed = ", ".join(names[j] for j in found[:10]) + (", ..." if len(found) > 10 else "")
        raise RankDeficientError(
            f"{source.n_rows} rows have rank {R.shape[1] - len(found)} in {R.shape[1]} columns: {listed} "
            "depend on the columns before them; drop them, or set alpha > 0"
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
    rows = map_reduce(source, draw, combine_rows, executor)
    R = objective.triangular(rows)
    penalised = objective.absolute or objective.ridge
    spread = objective.triangular(rows, share) if penalised and share < 1 else R
    return Start(rows, share, R, spread / np.sqrt(max(len(rows), 1)))


def scores(columns: Array, T: Array, estimate: bool) -> Array:
    """l1 norms of the rows of [A b] T, or their estimate where T has Cauchy columns; shape (rows,)."""
    image = np.abs(columns @ T)
    return np.median(image, axis=1) if estimate else image.sum(axis=1)


def score_blocks(
    blocks: Iterator[Block], T: Array, size: float, seed: int, stream: int, intercept: bool, estimate: bool
) -> tuple[float, Rows]:
    """Sum of scores, and every row whose score over its uniform variable, its key, exceeds the sum so far over `size`.

    The sum only rises, so the rows that exceed it at the end of the table are among those kept; `dual` holds the keys.
    """
    total, kept = 0.0, Rows.gather([], len(T) - 1)
    for block in blocks:
        q = scores(block.columns(intercept=intercept, target=True, weight_power=1.0), T, estimate)
        total += float(q.sum())
        keys = q / row_uniforms(seed, block.start, block.stop, stream)
        found = np.flatnonzero(keys * size > total)
        kept = Rows.gather(
            [kept.pick(kept.dual * size > total), take(block, found, intercept, keys[found])], len(T) - 1
        )
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
    if estimate:
        T = T @ np.random.default_rng([seed, stream]).standard_cauchy((len(R), count))
    score = partial(score_blocks, T=T, size=size, seed=seed, stream=stream, intercept=intercept, estimate=estimate)
    total, kept = map_reduce(source, score, combine_rows, executor)
    rows = kept.pick(kept.dual * size > total)
    q = scores(np.column_stack([rows.A, rows.b]) * rows.weight[:, None], T, estimate)
    return rows, np.maximum(1.0, total / (size * q))


def condition(
    source: RowSource,
    kind: str,
    intercept: bool,
    embedding_size: int | None,
    seed: int,
    executor: Executor,
    row_norms: str = "auto",
) -> Array:
    """R such that [A b] R^-1 is well-conditioned in l1, shape (E, E).

    Raises:
        RankDeficientError: if columns of A depend on each other.
    """
    E = source.n_cols + intercept + 1
    if kind == "none":
        return np.eye(E)
    sketched = "cauchy" if kind == "cauchy" else "sparse_cauchy"
    size = embedding_size or (int(np.ceil(2 * E * np.log(E + 1))) if kind == "cauchy" else 20 * E)
    R = _full_rank(source, sketched, size, intercept, seed, executor)
    if kind in ("spc2", "spc3"):
        for draw in range(DRAWS):
            rows, inverse = score_sample(source, R, 100 * E, intercept, seed, _INNER + draw, executor, row_norms)
            joined = np.column_stack([rows.A, rows.b]) * (rows.weight * inverse)[:, None]
            inner = _square(joined)
            if not len(dependent_columns(inner[:-1, :-1])):
                return _usable(inner)
    return R


def _full_rank(source: RowSource, kind: str, size: int, intercept: bool, seed: int, executor: Executor) -> Array:
    """R of a sketch of [A b] that lost no column; after three that did, of one that cannot hide a column."""
    for stream in range(DRAWS + 1):
        S = Sketch(kind if stream < DRAWS else "sparse_sign", size, seed, n_rows=source.n_rows, stream=_SKETCH + stream)
        columns = partial(sketch_blocks, S=S, intercept=intercept, target=True, weight_power=1.0)
        R = _square(map_reduce(source, columns, executor=executor))
        if not len(dependent_columns(R[:-1, :-1])):
            return _usable(R)
    refuse_rank(source, R[:-1, :-1], intercept)
    return R


def _square(rows: Array) -> Array:
    R = np.linalg.qr(rows, mode="r")
    return np.vstack([R, np.zeros((rows.shape[1] - len(R), rows.shape[1]))])


def _usable(R: Array) -> Array:
    """R with a last diagonal entry that is not zero: b may be a combination of the columns of A."""
    floor = 1e-12 * max(float(np.linalg.norm(R[:, -1])), 1e-300)
    R[-1, -1] = max(abs(R[-1, -1]), floor)
    return R


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
        RankDeficientError: if three draws lost a column.
    """
    intercept = objective.intercept
    for draw in range(DRAWS):
        number = _SCORES + 10 * stream + draw
        rows, inverse = score_sample(source, R, size, intercept, seed, number, executor, row_norms)
        own = objective.triangular(rows)
        if not len(dependent_columns(own)) or draw == DRAWS - 1:
            break
    refuse_rank(source, own, intercept)
    weighted = rows.reweighted(rows.weight * inverse)
    half = objective.triangular(rows.reweighted(rows.weight * np.sqrt(inverse)))
    return Start(weighted, 1.0, own, half / np.sqrt(source.n_rows))
