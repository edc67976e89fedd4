"""The index that costs least: all items scored while that is cheap, the best library at hand beyond."""

# Shapes: B queries, S items, D width, N items found, Q typical queries, K results.

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field
from torch import Tensor

from fullrank.extras import installed
from fullrank.retrieval.vectors.registry import VECTOR_INDEXES
from fullrank.retrieval.vectors.snapshot import Snapshot, SnapshotIndex

# Those that were never far from the best at a recall of .95 (benchmarks.retrieval.dot_products and many_results), and
# what each needs; where cells do not help, as for queries of other directions than any that are known, a scan does.
LIBRARIES = {"scann": "scann", "faiss_4bit": "faiss-cpu", "faiss_ivf_4bit": "faiss-cpu"}
WITHOUT = "ivf"
# Asked only where typical queries are given: with probes chosen by vectors of items a funnel's users found .52 of their
# best items. What looks at all items depends on that little.
BY_QUERIES = "faiss_ivf_4bit"
ALL = "exact"

# Queries at once for which the ways are timed, and how much faster than the usual one another has to be.
BATCHES = (1, 2, 4, 8, 16, 32, 64)
FASTER = 1.1


class AutoIndex(SnapshotIndex):
    """All items are scored up to a number of items. Beyond, a search goes the way that was fastest when the snapshot
    was built: ScaNN, FAISS (those that are installed; else our inverted file), or all items, which wins for large
    batches.

    Ways are timed for batches of 1 to 64 typical queries, in seconds of CPU. A library that is never the fastest by a
    tenth is forgotten.

    Attributes:
        indexes: those that may be asked, by name.
        ways: what answers 1, 2, 4, ... 64 queries and more, by name.
    """

    class Config(SnapshotIndex.Config):
        """Hyper-parameters.

        Attributes:
            exact_below: number of items up to which all are scored; beyond, single queries find something faster.
        """

        exact_below: int = Field(default=50_000, ge=1)

    name = "auto"

    def __init__(self, width: int, config: Config | None = None) -> None:
        self.indexes: dict[str, SnapshotIndex] = {}
        super().__init__(width, config)
        for name in [name for name, package in LIBRARIES.items() if installed(package)] or [WITHOUT]:
            kind = VECTOR_INDEXES[name]
            index = kind(width, kind.Config.model_validate(self.config.model_dump()))
            assert isinstance(index, SnapshotIndex)
            self.indexes[name] = index

    def fork(self) -> Self:
        other = super().fork()
        other.indexes = {name: index.fork() for name, index in self.indexes.items()}
        return other

    def _clear(self) -> None:
        super()._clear()
        self.ways = [ALL] * len(BATCHES)
        for index in self.indexes.values():
            index._clear()

    def _build(self, vectors_SD: Tensor) -> dict[str, Any]:
        for index in self.indexes.values():
            index.typical_QD = self.typical_QD
        names = [name for name in self.indexes if name != BY_QUERIES or self.typical_QD is not None]
        return {name: self.indexes[name]._build(vectors_SD) for name in names}

    def tune(self, queries_QD: Tensor | None = None) -> None:
        snapshot = self.snapshot
        if snapshot is None:
            return
        queries_QD = self.queries() if queries_QD is None else queries_QD
        batches = [queries_QD[:rows] for rows in BATCHES]
        k = min(self.config.results, self.live_S.numel())
        times = {ALL: [_seconds(snapshot.scan, batch_BD, k) for batch_BD in batches]}
        for name, library in snapshot.library.items():
            index = self._within(name, snapshot, library)
            index.tune(queries_QD)
            times[name] = [_seconds(index.answer, batch_BD, k) for batch_BD in batches]
        self.ways = chosen(times)
        for name in set(snapshot.library) - set(self.ways):
            del snapshot.library[name]
            self.indexes[name]._clear()
        first = self.indexes.get(self.ways[0])
        self.effort, self.recall = (None, 1.0) if first is None else (first.effort, first.recall)

    def _within(self, name: str, snapshot: Snapshot, library: Any) -> SnapshotIndex:
        """One of the indexes, given its part of the snapshot."""
        index = self.indexes[name]
        index.snapshot = Snapshot(snapshot.keys_S, snapshot.scan, library)
        index.live_S, index.live = self.live_S, self.live
        return index

    def _write(self, library: dict[str, Any], directory: Path) -> bool:
        for name, each in library.items():
            (directory / name).mkdir()
            if not self.indexes[name]._write(each, directory / name):
                return False
        return True

    def _map(self, directory: Path) -> dict[str, Any]:
        return {
            name: index._map(directory / name) for name, index in self.indexes.items() if (directory / name).is_dir()
        }

    def _chosen(self) -> dict[str, Any]:
        assert self.snapshot is not None
        each = {name: self.indexes[name]._chosen() for name in self.snapshot.library}
        return {**super()._chosen(), "ways": self.ways, "indexes": each}

    def _choose(self, chosen: dict[str, Any]) -> None:
        super()._choose(chosen)
        assert self.snapshot is not None
        self.ways = chosen["ways"]
        for name, library in self.snapshot.library.items():
            self._within(name, self.snapshot, library)._choose(chosen["indexes"][name])

    def _way(self, rows: int) -> str:
        return self.ways[bisect_right(BATCHES, rows) - 1]

    def _scans(self, rows: int) -> bool:
        return self._way(rows) == ALL

    def answer(
        self, queries_BD: Tensor, k: int, wanted: int | None = None, live_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.indexes[self._way(len(queries_BD))].answer(queries_BD, k, wanted, live_S)

    def _find(self, library: Any, queries_BD: Tensor, count: int, effort: int) -> Tensor:
        raise AssertionError("the indexes that may be asked find, and choose their efforts")

    def _efforts(self, size: int) -> Sequence[int]:
        raise AssertionError("the indexes that may be asked choose their efforts")

    def _scored(self, size: int, effort: int) -> int:
        return size if self.ways[0] == ALL else self.indexes[self.ways[0]]._scored(size, effort)


def chosen(times: dict[str, list[float]]) -> list[str]:
    """The way for each size of batch: the one that is fastest for most, unless another is faster by a tenth."""
    fastest = [min(times, key=lambda way: times[way][place]) for place in range(len(BATCHES))]
    usual = max(dict.fromkeys(fastest), key=fastest.count)
    return [usual if times[usual][place] <= FASTER * times[way][place] else way for place, way in enumerate(fastest)]


def _seconds(work: Callable[..., object], *arguments: object) -> float:
    """CPU of the shortest of three runs."""
    times = []
    for _ in range(3):
        begin = time.process_time()
        work(*arguments)
        times.append(time.process_time() - begin)
    return min(times)
