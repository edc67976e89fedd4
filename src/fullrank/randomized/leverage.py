"""Leverage scores: how far each row of a table could pull a fit towards itself; exact, or approximate in two passes."""

# Shapes: n rows, d features.

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import ceil, log
from typing import Any

import numpy as np

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.conditioning import exact_factor, l1_conditioner, preconditioner, triangular
from fullrank.randomized.engine import Executor, concatenate, map_reduce
from fullrank.randomized.parameters import NONE, check, integer, number, one_of, random_generator
from fullrank.randomized.sampling import row_scores
from fullrank.randomized.sketches import Sketch, sketch_blocks
from fullrank.randomized.sources import ArraySource, as_source


def leverage_scores(
    A: Any,
    p: int = 2,
    method: str = "exact",
    *,
    ridge: float = 0.0,
    sketch: str = "sparse_sign",
    sketch_size: int | None = None,
    random_state: Any = None,
    executor: Executor = "serial",
) -> Array:
    """Scores |e_i' A R^-1|_p ** p of all rows, with R from a QR factorisation, or from a sketch of A.

    For p = 2 and the exact method these are the leverage scores: each in [0, 1], with sum rank(A), or, with a ridge,
    the effective degrees of freedom.

    Args:
        A: shape (n, d), array or CSR, a `RowSource`, or a Dask collection; weights of a source count as repeated rows.
        p: 2 or 1.
        method: "exact": R of A itself. "approx": R of a sketch, and row norms through log(n) random directions where
            that is cheaper; two passes, O(nnz(A) log n).
        ridge: scores of A with sqrt(ridge) I below; p = 2 only.
        sketch: kind of the sketch; p = 1 has its own, the sparse Cauchy one.
        sketch_size: its rows; 20 d when omitted.
        random_state: seed.
        executor: as in `map_reduce`.

    Returns:
        shape (n,).

    Raises:
        ValueError: p or method unknown, ridge < 0 or with p = 1; NaN or infinity in the table.

    Source: Drineas et al., Fast approximation of matrix coherence and statistical leverage, 2012; arXiv 1305.0087,
        section 3.2 (p = 1).
    Deviation: the papers always estimate row norms; below 4 log n columns (p = 2), or 15 log(40 n) (p = 1), the exact
    ones cost less.
    """
    if p not in (1, 2):
        raise ValueError(f"p is {p}, expected 1 or 2")
    check("method", method, one_of("exact", "approx"))
    check("ridge", ridge, number(least=0))
    check("sketch_size", sketch_size, integer(1) | NONE)
    if ridge and p == 1:
        raise ValueError(f"ridge is {ridge} with p = {p}, expected 0 for p = 1")
    source = as_source(A) or ArraySource(A)
    d, n = source.n_cols, source.n_rows
    generator = random_generator(random_state)
    seed = int(generator.randint(2**31))
    size = 20 * d if sketch_size is None else sketch_size
    if method == "exact":
        R = exact_factor(source, weight_power=1 / p, executor=executor)
    elif p == 1:
        R = l1_conditioner(source, "spc1", sketch_size=size, target=False, seed=seed, executor=executor)
    else:
        S = Sketch(sketch, size, seed, min(4, size), n)
        R = triangular(map_reduce(source, partial(sketch_blocks, S=S), executor=executor))
    if ridge:
        R = triangular(np.vstack([R, np.sqrt(ridge) * np.eye(d)]))
    N = preconditioner(R).N
    directions = ceil(4 * log(n + 1)) if p == 2 else ceil(15 * log(40 * n))
    if method == "exact" or directions >= N.shape[1]:
        scores = partial(_scores, N=N, p=p)
    elif p == 2:
        N = N @ generator.standard_normal((N.shape[1], directions)) / np.sqrt(directions)
        scores = partial(_scores, N=N, p=2)
    else:
        scores = partial(_median_scores, N=N @ generator.standard_cauchy((N.shape[1], directions)))
    found: Array = map_reduce(source, scores, concatenate, executor)
    return found


def _scores(blocks: Iterator[Block], N: Array, p: int) -> Array:
    return np.concatenate([row_scores(block, N, p) for block in blocks])


def _median_scores(blocks: Iterator[Block], N: Array) -> Array:
    """A combination of Cauchy variables is Cauchy; its scale, and median size, is the l1 norm of the coefficients."""
    parts = []
    for block in blocks:
        medians = np.median(np.abs(block.fitted(N)), axis=1)
        parts.append(medians if block.weight is None else medians * block.weight)
    return np.concatenate(parts)
