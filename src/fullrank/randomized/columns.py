"""A row source without some of its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullrank.randomized.blocks import Block
from fullrank.randomized.sources import RowSource


class ColumnSource(RowSource):
    """Some columns of the X of another source, which counts its passes too.

    Args:
        source: the table.
        kept: columns to keep, in order.
    """

    def __init__(self, source: RowSource, kept: NDArray[np.intp]) -> None:
        self.source, self.kept = source, kept
        self.n_cols, self.n_targets, self.starts = len(kept), source.n_targets, source.starts
        self.named, self.has_offset = source.named, source.has_offset
        self.progress = source.progress if len(kept) else None
        self.feature_names = [source.feature_names[j] for j in kept.tolist()]

    @property
    def n_passes(self) -> int:
        return self.source.n_passes

    @n_passes.setter
    def n_passes(self, value: int) -> None:
        self.source.n_passes = value

    def task(self, fragment: int) -> tuple[Callable[..., Iterator[Block]], tuple[Any, ...]]:
        read, arguments = self.source.task(fragment)
        return _kept_blocks, (read, self.kept, *arguments)

    def without_features(self) -> RowSource:
        return self.source.without_features()


def _kept_blocks(read: Callable[..., Iterator[Block]], kept: NDArray[np.intp], *arguments: Any) -> Iterator[Block]:
    for block in read(*arguments):
        yield replace(block, X=block.X[:, kept])
