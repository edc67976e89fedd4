"""Samples of rows that stand for the loss of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.interior_point import Array
from fullrank.randomized.pinball import Objective, Rows, combine_rows, take
from fullrank.randomized.preprocessing import Start
from fullrank.randomized.sketches import row_uniforms
from fullrank.randomized.sources import Block, RowSource


def sample_blocks(blocks: Iterator[Block], share: float, seed: int, intercept: bool, D: int) -> Rows:
    """Every row of positive weight with probability `share`."""
    parts = []
    for block in blocks:
        drawn = row_uniforms(seed, block.start, block.stop) < share
        if block.weight is not None:
            drawn &= block.weight > 0
        parts.append(take(block, np.flatnonzero(drawn), intercept))
    return Rows.gather(parts, D)


def triangular(rows: Rows) -> Array:
    """R of the weighted rows, padded with zeros to a square where there are fewer rows than columns."""
    D = rows.A.shape[1]
    R = np.linalg.qr(rows.A * rows.weight[:, None], mode="r")
    return np.vstack([R, np.zeros((D - len(R), D))])


def dependent(R: Array) -> np.ndarray:
    """Columns that the columns before them span, up to rounding."""
    return np.flatnonzero(np.abs(np.diag(R)) <= 1e-11 * np.maximum(np.linalg.norm(R, axis=0), 1e-300))


def uniform_start(source: RowSource, objective: Objective, size: float, seed: int, executor: Executor) -> Start:
    D = source.n_cols + objective.intercept
    share = min(1.0, size / source.n_rows)
    draw = partial(sample_blocks, share=share, seed=seed, intercept=objective.intercept, D=D)
    rows = map_reduce(source, draw, combine_rows, executor)
    R = triangular(rows)
    return Start(rows, share, R, R / np.sqrt(max(len(rows), 1)))
