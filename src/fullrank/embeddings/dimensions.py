"""How wide the vectors of a block of ids should be, from how often they are looked up."""

# Shapes: K blocks.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Rounding = Literal["int", "pow2"] | int
DEFAULT_TEMPERATURE = 0.3


def mixed_dimensions(
    cardinalities: Sequence[int],
    base_dim: int,
    *,
    popularity: Sequence[float] | None = None,
    temperature: float | None = None,
    budget: int | None = None,
    round_to: Rounding = "int",
) -> list[int]:
    """Widths of blocks of ids by the popularity rule d_i = d̄ (p_i / max p)^α, rounded, at least 1 and at most d̄.

    The block whose ids are looked up most often has width d̄ exactly.

    Args:
        cardinalities: n, ids of each block, shape (K,); a block is a table, or a range of the ids of one.
        base_dim: d̄.
        popularity: p, how often an id of each block is looked up on average, in any unit, shape (K,); default 1 / n,
            which is a log in which each row looks one id of each table up.
        temperature: α, from 0, all blocks alike, to 1, widths in proportion to p; default 0.3.
        budget: instead of α: take the widths of the lowest α whose blocks have at most this many numbers, projections
            included (`num_parameters`). Found by bisection on the rounded widths.
        round_to: `int`; `pow2`, the nearest power of two by its logarithm; or the nearest multiple of this number.

    Raises:
        ValueError: if an argument is not as said, or if the budget is below what the blocks have at α = 1.

    Source: Ginart et al., Mixed Dimension Embeddings, ISIT 2021, arXiv 1909.11810, popularity-based sizing.
    """
    if base_dim < 1:
        raise ValueError(f"expected base_dim >= 1, got {base_dim}")
    if not cardinalities or min(cardinalities) < 1:
        raise ValueError(f"expected cardinalities >= 1, got {list(cardinalities)}")
    if temperature is not None and budget is not None:
        raise ValueError("temperature and budget both say how wide blocks are: give one of them")
    if temperature is not None and not 0 <= temperature <= 1:
        raise ValueError(f"expected a temperature from 0 to 1, got {temperature}")
    if isinstance(round_to, int) and round_to < 1:
        raise ValueError(f"expected round_to >= 1, got {round_to}")
    relative_K = _relative(cardinalities, popularity)

    def at(alpha: float) -> list[int]:
        exact_K = base_dim * relative_K**alpha
        return [
            base_dim if p == 1 else _rounded(d, base_dim, round_to) for d, p in zip(exact_K, relative_K, strict=True)
        ]

    if budget is None:
        return at(DEFAULT_TEMPERATURE if temperature is None else temperature)
    low, high = 0.0, 1.0
    if num_parameters(cardinalities, at(low), base_dim) <= budget:
        return at(low)
    least = num_parameters(cardinalities, at(high), base_dim)
    if least > budget:
        raise ValueError(f"a budget of {budget:,} numbers is too small: at temperature 1 there are {least:,}")
    while low < (middle := (low + high) / 2) < high:
        if num_parameters(cardinalities, at(middle), base_dim) <= budget:
            high = middle
        else:
            low = middle
    return at(high)


def num_parameters(cardinalities: Sequence[int], dims: Sequence[int], base_dim: int) -> int:
    """Numbers that blocks store: n_i rows of d_i each, and d_i times d̄ of the projection where d_i is below d̄."""
    return sum(n * d + (d * base_dim if d < base_dim else 0) for n, d in zip(cardinalities, dims, strict=True))


def equal_count_blocks(counts: npt.ArrayLike, num_blocks: int) -> list[int]:
    """Ids in each of at most `num_blocks` ranges whose sums of counts are about equal.

    Args:
        counts: of ids in their order.

    Raises:
        ValueError: if no id was counted.
    """
    sums = np.cumsum(np.asarray(counts, dtype=np.float64))
    if not len(sums) or not sums[-1] > 0:
        raise ValueError("no id was ever counted")
    ends = np.searchsorted(sums, sums[-1] * np.arange(1, num_blocks) / num_blocks) + 1
    ends = np.unique(np.append(ends[ends < len(sums)], len(sums)))
    return [int(size) for size in np.diff(ends, prepend=0)]


def _relative(cardinalities: Sequence[int], popularity: Sequence[float] | None) -> npt.NDArray[np.float64]:
    """p_i / max p."""
    if popularity is None:
        return np.asarray(min(cardinalities) / np.asarray(cardinalities, dtype=np.float64))
    if len(popularity) != len(cardinalities):
        raise ValueError(f"there are {len(cardinalities)} blocks and the popularity of {len(popularity)}")
    found_K = np.asarray(popularity, dtype=np.float64)
    if not np.isfinite(found_K).all() or (found_K < 0).any() or not found_K.any():
        raise ValueError(f"expected popularities >= 0, not all of them 0, got {list(popularity)}")
    return np.asarray(found_K / found_K.max())


def _rounded(exact: float, base_dim: int, round_to: Rounding) -> int:
    if round_to == "pow2":
        # Of the rounded width, so that what is 1 as an integer is not half of it here.
        nearest = 1 << round(math.log2(max(1, round(exact))))
    else:
        step = 1 if round_to == "int" else round_to
        nearest = max(1, round(exact / step)) * step
    return min(nearest, base_dim)
