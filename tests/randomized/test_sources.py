"""Row sources: the same rows however they are stored, one line of error for what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from fullrank.randomized import ArraySource, DaskSource, ParquetSource, QuantileRegressor
from fullrank.randomized.blocks import Block
from fullrank.randomized.sources import RowSource, as_source

ROWS, COLUMNS = 1000, 3


@pytest.fixture
def table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draws = np.random.default_rng(0)
    return draws.standard_normal((ROWS, COLUMNS)), draws.standard_normal(ROWS), draws.random(ROWS)


def write(folder: Path, X: np.ndarray, y: np.ndarray, weight: np.ndarray, **options: int) -> ParquetSource:
    """Two files of unequal length with small row groups."""
    for part, rows in enumerate((slice(0, 430), slice(430, None))):
        columns = {f"x{j}": X[rows, j] for j in range(X.shape[1])}
        pq.write_table(pa.table({**columns, "y": y[rows], "w": weight[rows]}), folder / f"{part}.parquet", 150)
    return ParquetSource(folder, target="y", weight="w", **options)


def read(source: RowSource) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = [block for i in range(source.n_fragments) for block in source.iter_blocks(i)]
    row = 0
    for block in blocks:
        assert block.start == row
        row = block.stop
    assert row == source.n_rows
    dense = [block.X.toarray() if sp.issparse(block.X) else block.X for block in blocks]
    return np.vstack(dense), np.concatenate([b.y for b in blocks]), np.concatenate([b.weight for b in blocks])


def test_every_source_gives_the_same_rows_in_order(table, tmp_path):
    da = pytest.importorskip("dask.array")
    dd = pytest.importorskip("dask.dataframe")
    pd = pytest.importorskip("pandas")
    X, y, weight = table
    frame = pd.DataFrame({**{f"x{j}": X[:, j] for j in range(COLUMNS)}, "y": y, "w": weight})
    frame = dd.from_pandas(frame, npartitions=4)
    chunked = da.from_array(X, chunks=(170, 2))
    for source in (
        ArraySource(X, y, weight, fragment_rows=300, block_rows=70),
        ArraySource(sp.csr_array(X), y, weight, fragment_rows=300, block_rows=70),
        ArraySource(np.asfortranarray(X), y, weight),
        write(tmp_path, X, y, weight, block_rows=64),
        DaskSource(chunked, da.from_array(y, chunks=400), weight, block_rows=64),
        DaskSource(frame, "y", "w"),
    ):
        assert (source.n_rows, source.n_cols, source.n_targets, source.single_target) == (ROWS, COLUMNS, 1, True)
        for ours, theirs in zip(read(source), table, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_dense_slice_is_no_copy_and_a_block_never_has_more_rows_than_asked(table):
    X = table[0]
    source = ArraySource(X, block_rows=64)
    blocks = list(source.iter_blocks(0))
    assert np.shares_memory(blocks[3].X, X)
    assert max(len(block.X) for block in blocks) == 64


def test_float32_and_integers_arrive_as_float64(tmp_path):
    pq.write_table(
        pa.table({"a": np.arange(5, dtype=np.int8), "b": np.ones(5, bool), "text": ["?"] * 5}), tmp_path / "t"
    )
    source = ParquetSource(tmp_path / "t", ["a", "b"])
    (block,) = source.iter_blocks(0)
    assert block.X.dtype == np.float64
    np.testing.assert_array_equal(block.X[:, 0], np.arange(5))
    (block,) = ArraySource(np.ones((2, 2), np.float32), np.arange(2)).iter_blocks(0)
    assert block.X.dtype == block.y.dtype == np.float64


def test_columns_and_products_weight_rows():
    X, y, weight = np.arange(6.0).reshape(3, 2), np.array([1.0, 2.0, 3.0]), np.array([4.0, 9.0, 0.0])
    expected = np.column_stack([np.ones(3), X, y]) * np.sqrt(weight)[:, None]
    M = np.random.default_rng(0).standard_normal((3, 2))
    for form in (X, sp.csr_array(X)):
        block = Block(form, y, weight, 0)
        np.testing.assert_array_equal(block.columns(intercept=True, target=True), expected)
        np.testing.assert_allclose(block.product(M, intercept=True), expected[:, :3] @ M, atol=1e-14)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_nan_and_infinity_are_refused_by_the_name_of_the_column(table, value, sparse):
    X, y, _ = table
    X[471, 1] = value
    with pytest.raises(ValueError, match='column "price", first in row 471'):
        ArraySource(sp.csr_array(X) if sparse else X, feature_names=["a", "price", "c"])
    y[5] = value
    with pytest.raises(ValueError, match="target, first in row 5"):
        ArraySource(np.ones((ROWS, 1)), y)


def test_large_values_whose_sum_overflows_are_no_error():
    source = ArraySource(np.full((10, 2), 1e308))
    np.testing.assert_array_equal(
        np.concatenate([block.X for f in range(source.n_fragments) for block in source.iter_blocks(f)]), 1e308
    )


def test_parquet_errors_name_file_and_column(table, tmp_path):
    X, y, weight = table
    X[700, 2] = np.nan
    source = write(tmp_path, X, y, weight)
    with pytest.raises(ValueError, match='1.parquet: NaN or infinity in column "x2", first in row 700'):
        read(source)
    pq.write_table(pa.table({"x0": [1, None], "x1": [1.0, 2.0]}), tmp_path / "nulls.parquet")
    with pytest.raises(ValueError, match='nulls.parquet: column "x0" has 1 null'):
        list(ParquetSource(tmp_path / "nulls.parquet").iter_blocks(0))
    with pytest.raises(ValueError, match='0.parquet: no column "z"'):
        ParquetSource(tmp_path, features=["z"])
    with pytest.raises(ValueError, match='nulls.parquet: column "x0" is int64, 0.parquet has double'):
        ParquetSource(tmp_path, features=["x0"])
    pq.write_table(pa.table({"x0": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match='text.parquet: column "x0" is string, expected numbers'):
        ParquetSource(tmp_path / "text.parquet", features=["x0"])
    with pytest.raises(ValueError, match='"x0" is string, expected numbers: name it in categories, or list'):
        ParquetSource(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="no such file"):
        ParquetSource(tmp_path / "absent.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \*.parquet file"):
        ParquetSource(tmp_path / "empty")


def test_empty_fragments_are_skipped_and_an_empty_table_is_refused(tmp_path):
    da = pytest.importorskip("dask.array")
    pq.write_table(pa.table({"x": np.arange(4.0)[:0]}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match="no rows"):
        ParquetSource(tmp_path)
    pq.write_table(pa.table({"x": np.arange(4.0)}), tmp_path / "1.parquet")
    assert ParquetSource(tmp_path).n_fragments == 1
    chunks = da.concatenate([da.ones((0, 2)), da.ones((3, 2)), da.ones((0, 2))])
    assert DaskSource(chunks).n_fragments == 1
    for make in (ArraySource, lambda X: DaskSource(da.from_array(X))):
        with pytest.raises(ValueError, match="no rows"):
            make(np.ones((0, 2)))


def test_weights_and_lengths_are_checked(table):
    X, y, weight = table
    with pytest.raises(ValueError, match="y has 3 rows, X has 1000"):
        ArraySource(X, y[:3])
    with pytest.raises(ValueError, match="zero in every row"):
        ArraySource(X, y, np.zeros(ROWS))
    weight[8] = -1
    with pytest.raises(ValueError, match=r"weight of row 8 is -1.0, expected >= 0"):
        ArraySource(X, y, weight)
    with pytest.raises(ValueError, match="brings its own target"):
        as_source(ArraySource(X), y)
    with pytest.raises(ValueError, match="block_rows is 0"):
        ArraySource(X, block_rows=0)


def test_a_source_without_features_has_the_same_targets_and_does_not_read_x(table, tmp_path):
    da = pytest.importorskip("dask.array")
    X, y, weight = table

    class Own(RowSource):
        """A source of one's own, which has only what it must have."""

        n_cols, n_targets, single_target, starts = COLUMNS, 1, True, np.array([0, 400, ROWS])

        def __init__(self):
            self.feature_names = ["a", "b", "c"]

        def task(self, fragment):
            start, stop = self.starts[fragment : fragment + 2].tolist()
            return iter, ([Block(X[start:stop], y[start:stop], weight[start:stop], start)],)

    sources = (ArraySource(X, y, weight), write(tmp_path, X, y, weight), DaskSource(da.from_array(X), y, weight), Own())
    for source in sources:
        bare = source.without_features()
        empty, targets, weights = read(bare)
        assert empty.shape == (ROWS, 0) and bare.n_cols == 0 and source.n_cols == COLUMNS
        np.testing.assert_array_equal(targets, y)
        np.testing.assert_array_equal(weights, weight)
    whole, own = (QuantileRegressor(0.3, random_state=0).fit(source) for source in (sources[0], sources[3]))
    np.testing.assert_allclose(own.coef_, whole.coef_)
