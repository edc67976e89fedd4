"""One pass over a table: the same bits from every executor, and after a worker has died."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fullrank.randomized import ArraySource, lstsq
from fullrank.randomized.blocks import Block
from fullrank.randomized.engine import add, concatenate, map_reduce
from fullrank.randomized.sketches import Sketch, sketch_blocks


def source(rows: int = 1000, fragments: int = 7) -> ArraySource:
    draws = np.random.default_rng(0)
    X = draws.standard_normal((rows, 4)) * 10.0 ** draws.integers(-6, 6, (rows, 1))
    return ArraySource(X, X.sum(axis=1) + draws.standard_normal(rows), fragment_rows=-(-rows // fragments))


def rows_of(blocks: Iterator[Block]) -> tuple[np.ndarray, None]:
    return np.concatenate([block.X for block in blocks]), None


@pytest.mark.parametrize("fragments", [1, 2, 3, 7, 8, 13])
def test_concatenation_keeps_the_order_of_rows(fragments):
    table = source(fragments=fragments)
    for executor in ("serial", "threads"):
        np.testing.assert_array_equal(map_reduce(table, rows_of, concatenate, executor)[0], table.X)


def test_executors_agree_bit_for_bit():
    pytest.importorskip("dask")
    gram = partial(sketch_blocks, S=Sketch("sparse_sign", 40, 3), target=True)
    serial, threads, dask = (map_reduce(source(), gram, executor=name) for name in ("serial", "threads", "dask"))
    np.testing.assert_array_equal(serial, threads)
    np.testing.assert_array_equal(serial, dask)


def test_none_is_the_zero_of_addition():
    assert add(None, (1, None)) == (1, None)
    assert add((1, None), (2, 3)) == (3, 3)


def test_passes_are_counted_and_a_wrong_executor_is_refused():
    table = source()
    map_reduce(table, rows_of, concatenate)
    assert table.n_passes == 1
    with pytest.raises(ValueError, match='executor is "gpu", expected one of serial, threads, dask'):
        map_reduce(table, rows_of, executor="gpu")


def kill_once(blocks: Iterator[Block], mark: Path, S: Sketch) -> np.ndarray:
    """The process of the third fragment dies, the first time."""
    listed = list(blocks)
    if listed[0].start > 250 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return sketch_blocks(iter(listed), S)


def test_a_worker_killed_in_the_middle_of_a_pass_does_not_change_the_result(tmp_path):
    distributed = pytest.importorskip("distributed")
    S = Sketch("sparse_sign", 40, 3)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50, local_directory=tmp_path
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        killed = map_reduce(source(), partial(kill_once, mark=tmp_path / "killed", S=S), executor=client)
        assert (tmp_path / "killed").exists()
        np.testing.assert_array_equal(killed, map_reduce(source(), partial(sketch_blocks, S=S)))
        whole = lstsq(source(), method="gram", random_state=0, executor=client)
    np.testing.assert_array_equal(whole.x, lstsq(source(), method="gram", random_state=0).x)
