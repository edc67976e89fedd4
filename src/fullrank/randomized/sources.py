"""Tables as streams of row blocks: arrays in memory and Dask collections; Parquet files are in `parquet`.

A source is cut into fragments, the unit of parallel work; a fragment is read block by block, so that no reader ever
holds more than one block of it. Rows keep their number in the whole table, whatever the fragments: what is drawn for a
row depends on that number only, and results do not depend on how a table is stored.

    source = ParquetSource("clicks/", target="price")
    for fragment in range(source.n_fragments):
        for block in source.iter_blocks(fragment):
            block.X, block.y, block.weight, block.start
"""

# Shapes: n rows, d features, t targets.

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from fullrank.extras import needs
from fullrank.randomized.blocks import Array, Block, block_size, check_block, check_offset, check_weights
from fullrank.randomized.progress import Progress


class RowSource(ABC):
    """A table read in fragments of consecutive rows.

    Attributes:
        n_rows, n_cols: rows of the table and columns of X.
        starts: first row of every fragment, and n_rows at the end; shape (n_fragments + 1,).
        feature_names: names of the columns of X.
        n_targets: columns of y, 0 without a target.
        single_target: y has one dimension.
        has_offset: whether rows have an offset, which some linear models take.
        named: whether the table has names of its own; else `feature_names` are made up.
        n_passes: how often the table has been read as a whole.
        progress: of a fit that tells of its passes, None for one that does not.
    """

    n_cols: int
    n_targets: int
    single_target: bool
    has_offset: bool = False
    named: bool = True
    starts: NDArray[np.int64]
    feature_names: list[str]
    n_passes: int = 0
    progress: Progress | None = None

    @property
    def n_rows(self) -> int:
        return int(self.starts[-1])

    @property
    def n_fragments(self) -> int:
        return len(self.starts) - 1

    @abstractmethod
    def task(self, fragment: int) -> tuple[Callable[..., Iterator[Block]], tuple[Any, ...]]:
        """A function and its arguments that yield the blocks; both travel to workers, some may be delayed."""

    def iter_blocks(self, fragment: int) -> Iterator[Block]:
        """The blocks of one fragment, in the order of rows."""
        read, arguments = self.task(fragment)
        return read(*arguments)

    def without_features(self) -> RowSource:
        """Targets and weights of the same rows, beside an X without columns; where X is stored it need not be read."""
        from fullrank.randomized.columns import ColumnSource

        return ColumnSource(self, np.arange(0))

    def tell(self, text: str) -> None:
        """A line about a fit with `verbose`."""
        if self.progress is not None:
            self.progress.line(text)

    def _shallow(self, **changes: Any) -> Any:
        other = copy.copy(self)
        vars(other).update(changes, feature_names=[], n_cols=0, n_passes=0, progress=None)
        return other


def as_source(
    X: Any, y: Any = None, sample_weight: Any = None, offset: Any = None, *, takes_offset: bool = False
) -> RowSource | None:
    """X if it is a source, a `DaskSource` for a Dask collection, else None: an array, for the caller to validate.

    Raises:
        ValueError: a source together with y, sample_weight or offset, which it brings itself; one with an offset,
            unless the caller takes it.
    """
    if isinstance(X, RowSource):
        if y is not None or sample_weight is not None:
            raise ValueError("a source brings its own target and weights: leave y and sample_weight out")
        if offset is not None:
            raise ValueError("a source brings its own offset: name its column there")
        if X.has_offset and not takes_offset:
            raise ValueError("the source has an offset, which only generalised linear models take")
        return X
    return DaskSource(X, y, sample_weight, offset=offset) if hasattr(X, "__dask_graph__") else None


class ArraySource(RowSource):
    """A NumPy array, SciPy CSR matrix, or anything NumPy can view as an array.

    Args:
        X: shape (n, d).
        y: shape (n,) or (n, t).
        sample_weight: shape (n,), non-negative.
        offset: shape (n,), added to x'w by a generalised linear model.
        fragment_rows: rows of a fragment.
        block_rows: rows of a block; by size when omitted.
        feature_names: used in errors; x0, x1, ... when omitted.
        check_finite: refuse NaN and infinity now; False where that has been done.

    Raises:
        ValueError: NaN or infinity (the columns are named), lengths that differ, negative or only zero weights, no row.
    """

    def __init__(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        offset: Any = None,
        fragment_rows: int = 2**18,
        block_rows: int | None = None,
        feature_names: Sequence[str] | None = None,
        check_finite: bool = True,
    ) -> None:
        self.X = sp.csr_array(X) if sp.issparse(X) else np.asarray(X)
        if self.X.ndim != 2:
            raise ValueError(f"X has {self.X.ndim} dimensions, expected 2")
        n, self.n_cols = self.X.shape
        if n == 0:
            raise ValueError("X has no rows")
        self.y = None if y is None else np.asarray(y)
        self.sample_weight = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        self.offset = None if offset is None else np.asarray(offset, dtype=np.float64)
        for name, values in (("y", self.y), ("sample_weight", self.sample_weight), ("offset", self.offset)):
            if values is not None and len(values) != n:
                raise ValueError(f"{name} has {len(values)} rows, X has {n}")
        self.n_targets = 0 if self.y is None else 1 if self.y.ndim == 1 else self.y.shape[1]
        self.single_target = self.y is not None and self.y.ndim == 1
        self.feature_names = list(feature_names) if feature_names is not None else [f"x{j}" for j in range(self.n_cols)]
        self.named = feature_names is not None
        self.block_rows = block_size(self.n_cols, block_rows)
        self.starts = np.append(np.arange(0, n, fragment_rows), n)
        if self.sample_weight is not None:
            check_weights(self.sample_weight, 0, "X")
            if not self.sample_weight.any():
                raise ValueError("sample_weight is zero in every row")
        if self.offset is not None:
            self.has_offset = True
            check_offset(self.offset, 0, "X")
        if check_finite:
            self.check_finite()

    def check_finite(self) -> None:
        """Raises ValueError, which names the columns, if there is NaN or infinity."""
        for block in _array_blocks(self.X, self.y, None, None, 0, self.block_rows):
            check_block(block, self.feature_names, "X")

    def task(self, fragment: int) -> tuple[Callable[..., Iterator[Block]], tuple[Any, ...]]:
        start, stop = self.starts[fragment : fragment + 2].tolist()
        y = None if self.y is None else self.y[start:stop]
        weight = None if self.sample_weight is None else self.sample_weight[start:stop]
        offset = None if self.offset is None else self.offset[start:stop]
        return _array_blocks, (_rows(self.X, start, stop), y, weight, offset, start, self.block_rows)

    def without_features(self) -> ArraySource:
        return self._shallow(X=np.empty((self.n_rows, 0)))  # type: ignore[no-any-return]


def _rows(X: Any, start: int, stop: int) -> Any:
    """X[start:stop] without a copy of the values."""
    if not sp.issparse(X):
        return X[start:stop]
    low, high = X.indptr[start], X.indptr[stop]
    parts = (X.data[low:high], X.indices[low:high], X.indptr[start : stop + 1] - low)
    return sp.csr_array(parts, shape=(stop - start, X.shape[1]))


def _array_blocks(
    X: Any, y: Array | None, weight: Array | None, offset: Array | None, start: int, block_rows: int
) -> Iterator[Block]:
    for low in range(0, X.shape[0], block_rows):
        high = min(low + block_rows, X.shape[0])
        rows = _rows(X, low, high)
        yield Block(
            rows.astype(np.float64, copy=False),
            None if y is None else y[low:high].astype(np.float64, copy=False),
            None if weight is None else weight[low:high],
            start + low,
            None if offset is None else offset[low:high],
        )


class DaskSource(RowSource):
    """A Dask array or data frame; a fragment is one of its chunks of rows, computed where the task runs.

    Args:
        X: dask array (n, d), or dask data frame.
        y: dask array (n,) or (n, t) with the same chunks of rows (it is rechunked otherwise), or, for a data frame, the
            name or names of its target columns.
        sample_weight, offset: likewise.
        features: for a data frame, columns of X; all but target and weight when omitted.
        block_rows: rows of a block; by size when omitted.

    Raises:
        ValueError: no rows, or names where arrays are expected; while reading, NaN, infinity or negative weights.
    """

    def __init__(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        offset: Any = None,
        features: Sequence[str] | None = None,
        block_rows: int | None = None,
    ) -> None:
        with needs("randomized", "DaskSource"):
            import dask.array as da
            from dask.base import compute
            from dask.delayed import delayed

        if hasattr(X, "columns"):
            targets = [] if y is None else [y] if isinstance(y, str) else list(y)
            others = {*targets, *(name for name in (sample_weight, offset) if name is not None)}
            self.feature_names = list(features) if features else [name for name in X.columns if name not in others]
            for name in self.feature_names:
                if getattr(X.dtypes[name], "kind", "O") not in "iufb":
                    raise ValueError(
                        f'column "{name}" is {X.dtypes[name]}, expected numbers: list features without it, or encode it'
                    )
            frame, X = X, X[self.feature_names].to_dask_array()
            y = None if y is None else frame[y if isinstance(y, str) else targets].to_dask_array()
            sample_weight, offset = (
                None if name is None else frame[name].to_dask_array() for name in (sample_weight, offset)
            )
        else:
            if any(isinstance(part, str) for part in (y, sample_weight, offset)):
                raise ValueError("y, sample_weight or offset is a name, but X is an array and has no named columns")
            self.named = bool(features)
            self.feature_names = list(features) if features else [f"x{j}" for j in range(X.shape[1])]
        if len(X.chunks[1]) > 1:
            X = X.rechunk({1: -1})
        rows_known = not np.isnan(X.chunks[0]).any()
        aligned = [_align(part, X.chunks[0], da) if rows_known else part for part in (y, sample_weight, offset)]
        self._X = X.to_delayed().ravel()
        parts = (None if part is None else part.to_delayed().ravel() for part in aligned)
        self._y, self._weight, self._offset = parts
        self.has_offset = offset is not None
        sizes = X.chunks[0] if rows_known else compute(*[delayed(len)(part) for part in self._X])  # type: ignore[no-untyped-call]
        self._filled = np.flatnonzero(sizes)
        if not len(self._filled):
            raise ValueError("X has no rows")
        self.n_cols = len(self.feature_names)
        self.n_targets = 0 if y is None else 1 if y.ndim == 1 else y.shape[1]
        self.single_target = y is not None and y.ndim == 1
        self.starts = np.cumsum([0, *np.asarray(sizes)[self._filled]])
        self.block_rows = block_size(self.n_cols, block_rows)

    def task(self, fragment: int) -> tuple[Callable[..., Iterator[Block]], tuple[Any, ...]]:
        part = self._filled[fragment]
        y = None if self._y is None else self._y[part]
        weight = None if self._weight is None else self._weight[part]
        offset = None if self._offset is None else self._offset[part]
        place = (int(self.starts[fragment]), self.block_rows, self.feature_names)
        return _checked_blocks, (self._X[part], y, weight, offset, *place)

    def without_features(self) -> DaskSource:
        from dask.delayed import delayed

        return self._shallow(_X=[delayed(_no_columns)(part) for part in self._y])  # type: ignore

    def iter_blocks(self, fragment: int) -> Iterator[Block]:
        from dask.base import compute

        read, arguments = self.task(fragment)
        return read(*compute(*arguments, scheduler="synchronous"))  # type: ignore[no-untyped-call]


def _no_columns(rows: Any) -> Array:
    return np.empty((len(rows), 0))


def _align(part: Any, row_chunks: tuple[int, ...], da: Any) -> Any:
    if part is None:
        return None
    part = da.asarray(part)
    if part.shape[0] != sum(row_chunks):
        raise ValueError(f"y, sample_weight or offset has {part.shape[0]} rows, X has {sum(row_chunks)}")
    return part.rechunk({0: row_chunks, **({1: -1} if part.ndim == 2 else {})})


def _checked_blocks(
    X: Any, y: Any, weight: Any, offset: Any, start: int, block_rows: int, feature_names: list[str]
) -> Iterator[Block]:
    X = sp.csr_array(X) if sp.issparse(X) else np.asarray(X)
    y = None if y is None else np.asarray(y)
    weight, offset = (None if part is None else np.asarray(part, dtype=np.float64) for part in (weight, offset))
    for block in _array_blocks(X, y, weight, offset, start, block_rows):
        check_block(block, feature_names, "Dask collection")
        yield block
