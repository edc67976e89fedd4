"""The input check that all estimators of the room share: tables in, with their names, weights, targets and classes.

A table is a NumPy array, a SciPy CSR matrix, a data frame, a `RowSource` or a Dask collection. What was fitted on one
kind of them predicts another, and columns that have names must come with the same names in the same order.
"""

# Shapes: n rows, d features, t targets, k rows of a block.

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, validate_data

from fullrank.randomized.blocks import Array, Block, check_offset
from fullrank.randomized.engine import Executor, concatenate, map_reduce
from fullrank.randomized.parameters import FLAG, check, integer
from fullrank.randomized.progress import Progress
from fullrank.randomized.sources import ArraySource, RowSource, as_source

FLOATS = (np.float64, np.float32)
VERBOSE = FLAG | integer(0)


class TableEstimator(BaseEstimator):  # type: ignore[misc]
    """What the estimators of the room have in common.

    Attributes:
        executor: where passes over a table run.
        n_features_in_: columns of the table of the last fit.
        feature_names_in_: their names, shape (d,); not there where that table had none.
        takes_offset: whether a table may have an offset, which is then part of the predictions.
    """

    takes_offset: ClassVar[bool] = False

    executor: Executor
    n_features_in_: int
    feature_names_in_: NDArray[np.object_]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


def training_source(
    model: TableEstimator,
    X: Any,
    y: Any,
    sample_weight: Any,
    *,
    targets: int | None = 1,
    dtype: Any = FLOATS,
    block_rows: Callable[[Any], int] | None = None,
    reset: bool = True,
    offset: Any = None,
) -> RowSource:
    """The table of a fit to numbers, whose columns the model remembers.

    Args:
        model: the estimator.
        X: shape (n, d), any kind of table.
        y: shape (n,), or (n, t) unless `targets` is 1; None with a source, which brings its own.
        sample_weight: shape (n,), non-negative; None with a source.
        targets: how many the model fits; None for any number.
        dtype: types of an array X that are left as they are.
        block_rows: rows of a block of X, where X is an array.
        reset: whether the columns are those of a first fit; else they must be those of the fit before.
        offset: shape (n,), with arrays.

    Raises:
        ValueError: NaN or infinity in arrays, lengths that differ, weights that are negative or all zero; another
            number of targets; columns that are not those of the fit before.
    """
    source = given_source(model, X, y, sample_weight, targets=targets, reset=reset, offset=offset)
    if source is not None:
        return source
    several = targets != 1
    X, y = validate_data(
        model, X, y, accept_sparse="csr", dtype=dtype, y_numeric=True, multi_output=several, reset=reset
    )
    return array_source(model, X, y, sample_weight, block_rows=block_rows, offset=offset)


def given_source(
    model: TableEstimator,
    X: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    targets: int | None = 1,
    reset: bool = True,
    offset: Any = None,
) -> RowSource | None:
    """X if it is a source or a Dask collection, whose columns the model remembers; None for arrays.

    Raises:
        ValueError: as `training_source`.
    """
    check("verbose", getattr(model, "verbose", False), VERBOSE)
    source = as_source(X, y, sample_weight, offset, takes_offset=model.takes_offset)
    if source is None:
        return None
    source.progress = _progress(model)
    if targets is not None and source.n_targets != targets:
        raise ValueError(f"the source has {source.n_targets} targets, expected {targets}")
    if not reset:
        check_columns(model, source)
        return source
    model.n_features_in_ = source.n_cols
    if source.named:
        model.feature_names_in_ = np.array(source.feature_names, dtype=object)
    elif hasattr(model, "feature_names_in_"):
        del model.feature_names_in_
    return source


def array_source(
    model: TableEstimator,
    X: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    block_rows: Callable[[Any], int] | None = None,
    offset: Any = None,
) -> ArraySource:
    """Arrays X (n, d) and y, which scikit-learn's `validate_data` has let through, as a source.

    Raises:
        ValueError: weights that are negative, NaN, infinite or all zero, or not as many as rows.
    """
    if sample_weight is not None:
        sample_weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    source = ArraySource(
        X,
        None if y is None else y.astype(np.float64, copy=False),
        sample_weight,
        offset=None if offset is None else offset_of(offset, X.shape[0]),
        block_rows=None if block_rows is None else block_rows(X),
        feature_names=getattr(model, "feature_names_in_", None),
        check_finite=False,
    )
    source.progress = _progress(model)
    return source


def _progress(model: TableEstimator) -> Progress | None:
    return Progress(type(model).__name__) if getattr(model, "verbose", False) else None


def class_codes(model: TableEstimator, y: Any) -> tuple[NDArray[Any], Array]:
    """Sorted classes of y, and the position among them of each of its n entries.

    Raises:
        ValueError: numbers that are no classes, or one class only.
    """
    check_classification_targets(y)
    classes, codes = np.unique(y, return_inverse=True)
    check_classes(model, classes)
    return classes, codes.astype(np.float64)


def check_classes(model: TableEstimator, classes: NDArray[Any]) -> None:
    """Raises ValueError if there is one class only."""
    if len(classes) < 2:
        raise ValueError(f"{type(model).__name__} needs two classes, the target has one class: {classes[0]!r}")


def on_rows(
    model: TableEstimator,
    X: Any,
    function: Callable[[Any], NDArray[Any]],
    *,
    dtype: Any = FLOATS,
    offset: Any = None,
) -> NDArray[Any]:
    """`function` of the rows of any table, for predictions: at once for arrays, block by block for a source.

    Args:
        model: a fitted estimator.
        X: shape (n, d), any kind of table; targets and weights of a source are not looked at.
        function: rows (k, d), dense or CSR -> shape (k,) or (k, t); must be picklable for a cluster.
        dtype: types of an array that are left as they are.
        offset: shape (n,), added to what `function` returns; with a source None, which may bring one.

    Returns:
        shape (n,) or (n, t).

    Raises:
        ValueError: NaN or infinity; columns that are not those of the fit.
    """
    source = as_source(X, offset=offset, takes_offset=model.takes_offset)
    if source is None:
        values = function(validate_data(model, X, accept_sparse="csr", dtype=dtype, reset=False))
        return values if offset is None else values + offset_of(offset, len(values))
    check_columns(model, source)
    source.progress = None
    return np.asarray(map_reduce(source, partial(_on_blocks, function=function), concatenate, model.executor))


def offset_of(offset: Any, n: int) -> Array:
    """An offset of n rows as an array. Raises ValueError at another shape, NaN or infinity."""
    values = np.asarray(offset, dtype=np.float64)
    if values.shape != (n,):
        raise ValueError(f"offset has shape {values.shape}, expected ({n},)")
    check_offset(values, 0, "X")
    return values


def _on_blocks(blocks: Iterator[Block], function: Callable[[Any], NDArray[Any]]) -> NDArray[Any]:
    parts = ((function(block.X), block.offset) for block in blocks)
    return np.concatenate([values if offset is None else values + offset for values, offset in parts])


def linear_values(X: Any, *, coef: Array, intercept: Any) -> Array:
    """X @ coef + intercept of rows X (k, d), dense or CSR, for coef (d,) or (d, t)."""
    return np.asarray(X @ coef + intercept)


def check_columns(model: TableEstimator, source: RowSource) -> None:
    """Refuse a source whose columns are not those that the model was fitted on.

    Raises:
        ValueError: another number of columns, or other names or another order of names.

    Warns:
        UserWarning: only one side has names.
    """
    name, known = type(model).__name__, getattr(model, "feature_names_in_", None)
    if source.n_cols != model.n_features_in_:
        raise ValueError(f"X has {source.n_cols} features, {name} was fitted on {model.n_features_in_}")
    if (known is not None) != source.named:
        fitted, given = ("with", "has none") if known is not None else ("without", "has names")
        warnings.warn(f"{name} was fitted {fitted} feature names, X {given}", UserWarning, stacklevel=4)
    elif known is not None and list(known) != source.feature_names:
        j = next(j for j in range(source.n_cols) if known[j] != source.feature_names[j])
        raise ValueError(f'column {j} of X is "{source.feature_names[j]}", {name} was fitted on "{known[j]}" there')
