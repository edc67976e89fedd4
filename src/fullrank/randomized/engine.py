"""One pass over a table: a function of each fragment's blocks, and a sum of what it returns.

    def gram(blocks):
        return sum(block.X.T @ block.X for block in blocks)

    map_reduce(ParquetSource("clicks/"), gram, executor="threads")

There is no scheduler here: fragments run one after another, in a thread pool, in Dask's, or on a `distributed` cluster.
A lost task is run again by its scheduler, and because everything random is a function of (seed, row), gives the same
numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fullrank.extras import needs
from fullrank.randomized.blocks import Block
from fullrank.randomized.parameters import Rule, check, one_of
from fullrank.randomized.sources import RowSource

Executor = Any  # "serial", "threads", "dask", or a distributed.Client
EXECUTORS = ("serial", "threads", "dask")
_EXECUTOR = one_of(*EXECUTORS) | Rule("a distributed.Client", lambda value: hasattr(value, "scheduler_info"))


def add(first: Any, second: Any) -> Any:
    """Sum of two partial results: whatever has a sum, or tuples of such; None means nothing on either side."""
    if first is None or second is None:
        return second if first is None else first
    if isinstance(first, tuple):
        return tuple(add(a, b) for a, b in zip(first, second, strict=True))
    return first + second


def concatenate(first: Any, second: Any) -> Any:
    """Rows of the second partial result under those of the first: arrays, or tuples of arrays or None."""
    if first is None:
        return None
    if isinstance(first, tuple):
        return tuple(concatenate(a, b) for a, b in zip(first, second, strict=True))
    return np.concatenate([first, second])


def map_reduce(
    source: RowSource,
    function: Callable[[Iterator[Block]], Any],
    combine: Callable[[Any, Any], Any] = add,
    executor: Executor = "serial",
) -> Any:
    """Apply `function` to the blocks of every fragment and combine the results.

    Results are combined two by two in a tree whose shape depends on the number of fragments only, so that the result is
    the same bit for bit for every executor and any number of workers.

    Args:
        source: the table.
        function: blocks of one fragment -> partial result; must be picklable for a cluster (a module's function, or
            `functools.partial` of one).
        combine: associative; called as combine(earlier rows, later rows).
        executor: "serial", "threads" (one thread per core), "dask" (the scheduler that Dask has set: the current client
            if there is one), or a `distributed.Client`, which scikit-learn's `clone` cannot copy: in a grid search
            take "dask".

    Raises:
        ValueError: unknown executor; Dask is wanted and not installed; whatever reading the source raises.
    """
    check("executor", executor, _EXECUTOR)
    source.n_passes += 1
    fragments = range(source.n_fragments)
    if executor == "serial":
        return _fold(_watched(source, (function(source.iter_blocks(i)) for i in fragments)), combine)
    if executor == "threads":
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return _fold(_watched(source, pool.map(lambda i: function(source.iter_blocks(i)), fragments)), combine)
    with needs("randomized", 'executor "dask"'):
        from dask.delayed import delayed

    run, join = delayed(_run, pure=False), delayed(combine, pure=False)
    tasks = []
    for i in fragments:
        read, arguments = source.task(i)
        tasks.append(run(function, read, *arguments))
    result = _fold(tasks, join)
    # A client that is current is found by Dask itself; one that is given need not be current.
    return result.compute() if executor == "dask" else executor.compute(result).result()


def _run(function: Callable[[Iterator[Block]], Any], read: Callable[..., Iterator[Block]], *arguments: Any) -> Any:
    return function(read(*arguments))


def _watched(source: RowSource, partials: Iterable[Any]) -> Iterable[Any]:
    progress = source.progress
    return partials if progress is None else progress.watched(partials, source.n_fragments, source.n_passes)


def _fold(partials: Iterable[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """Pairwise tree in order, holding one result per level: the carries of a binary counter."""
    levels: list[tuple[int, Any]] = []
    for partial in partials:
        height = 0
        while levels and levels[-1][0] == height:
            partial, height = combine(levels.pop()[1], partial), height + 1
        levels.append((height, partial))
    result = levels.pop()[1]
    while levels:
        result = combine(levels.pop()[1], result)
    return result
