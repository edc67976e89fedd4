"""Blocks of consecutive rows: what a table is read in, how large they are, and what is refused in them."""

# Shapes: d features, k rows of one block, t targets.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLOCK_CELLS = 2**21  # a block of float64 is at most about 16 MiB
BLOCK_ROWS = 32768


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a table.

    Attributes:
        X: shape (k, d), float64, dense or CSR.
        y: shape (k,) or (k, t), float64; None where the source has no target.
        weight: shape (k,), float64, non-negative; None means ones.
        start: number of the block's first row in the whole table.
        offset: shape (k,), float64: what a linear model adds to x'w; None where the source has none.
    """

    X: Any
    y: Array | None
    weight: Array | None
    start: int
    offset: Array | None = None

    @property
    def stop(self) -> int:
        return self.start + len(self)

    def __len__(self) -> int:
        return int(self.X.shape[0])

    @property
    def target(self) -> Array:
        """y, of a source that has one.

        Raises:
            ValueError: if it has none.
        """
        if self.y is None:
            raise ValueError("the source has no target")
        return self.y

    def columns(self, *, intercept: bool = False, target: bool = False, weight_power: float = 0.5) -> Array:
        """Dense [1 | X | y], each part if asked for, with rows times weight ** weight_power; shape (k, columns)."""
        X = self.X.toarray() if sp.issparse(self.X) else self.X
        parts = [np.ones((X.shape[0], 1)), X] if intercept else [X]
        if target:
            parts.append(self.targets())
        joined: Array = X if len(parts) == 1 else np.hstack(parts)
        return joined if self.weight is None else joined * (self.weight**weight_power)[:, None]

    def fitted(self, coef: Array, *, intercept: bool = False) -> Array:
        """[1 | X] coef, without forming [1 | X], for coef of shape (columns,) or (columns, J)."""
        values: Array = self.X @ coef[1:] + coef[0] if intercept else self.X @ coef
        return values

    def product(self, M: Array, *, intercept: bool = False, weight_power: float = 0.5) -> Array:
        """`fitted` of a matrix with rows times weight ** weight_power, shape (k, columns of M)."""
        result = self.fitted(M, intercept=intercept)
        return result if self.weight is None else result * (self.weight**weight_power)[:, None]

    def transposed(self, r: Array, *, intercept: bool = False) -> Array:
        """[1 | X]' r, for r of shape (k,) or (k, J)."""
        sums: Array = self.X.T @ r
        return np.concatenate([r.sum(axis=0, keepdims=True), sums]) if intercept else sums

    def targets(self) -> Array:
        """y as a matrix, shape (k, t)."""
        y = self.target
        return y[:, None] if y.ndim == 1 else y

    def weights(self) -> Array:
        """Weights of the rows, ones where there are none, shape (k,)."""
        return np.ones(len(self)) if self.weight is None else self.weight


def squared(X: Any) -> Any:
    """Squares of the entries of a dense or sparse matrix."""
    return X.multiply(X) if sp.issparse(X) else np.square(X)


def block_size(n_cols: int, block_rows: int | None = None) -> int:
    """Rows of a block: what the caller asks for, else at most 16 MiB of float64 and 32,768 rows."""
    if block_rows is None:
        return max(256, min(BLOCK_ROWS, BLOCK_CELLS // max(n_cols, 1)))
    if block_rows < 1:
        raise ValueError(f"block_rows is {block_rows}, expected at least 1")
    return block_rows


def check_block(block: Block, feature_names: Sequence[str], place: str) -> None:
    """Refuse NaN and infinity by the name of the column, and negative weights.

    Raises:
        ValueError: names the place, the columns and the first row.
    """
    X = block.X
    cells = X.data if sp.issparse(X) else X
    # A sum is finite unless a term is not, or it overflows: only then is every cell looked at.
    with np.errstate(over="ignore"):
        total = cells.sum()
    if not np.isfinite(total) and not np.isfinite(cells).all():
        rows, columns = (~np.isfinite(X.toarray() if sp.issparse(X) else X)).nonzero()
        names = ", ".join(f'"{feature_names[j]}"' for j in np.unique(columns))
        raise ValueError(f"{place}: NaN or infinity in column {names}, first in row {block.start + rows[0]}")
    if block.y is not None and not np.isfinite(block.y).all():
        row = block.start + int(np.argmin(np.isfinite(block.y).reshape(len(block.y), -1).all(axis=1)))
        raise ValueError(f"{place}: NaN or infinity in the target, first in row {row}")
    if block.weight is not None:
        check_weights(block.weight, block.start, place)
    if block.offset is not None:
        check_offset(block.offset, block.start, place)


def check_weights(weight: Array, start: int, place: str) -> None:
    """Raises ValueError, which names the row, at a weight that is negative, NaN or infinite."""
    fine = np.isfinite(weight) & (weight >= 0)
    if not fine.all():
        row = int(np.argmin(fine))
        raise ValueError(f"{place}: the weight of row {start + row} is {weight[row]}, expected >= 0")


def check_offset(offset: Array, start: int, place: str) -> None:
    """Raises ValueError, which names the row, at an offset that is NaN or infinite."""
    if not np.isfinite(offset).all():
        row = int(np.argmin(np.isfinite(offset)))
        raise ValueError(f"{place}: the offset of row {start + row} is {offset[row]}, expected a finite number")


def log_exposure(exposure: Array, start: int, place: str) -> Array:
    """Logarithms of exposures; raises ValueError, which names the row, at one that is not positive and finite."""
    fine = np.isfinite(exposure) & (exposure > 0)
    if not fine.all():
        row = int(np.argmin(fine))
        raise ValueError(f"{place}: the exposure of row {start + row} is {exposure[row]}, expected > 0")
    return np.asarray(np.log(exposure))
