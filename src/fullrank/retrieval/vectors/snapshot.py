"""A frozen snapshot in a library's index, with what came and went since in front of it."""

# Shapes: B queries, I items, S items of the snapshot, N items asked of it, D width, K results, Q typical queries.

from __future__ import annotations

import copy
import json
import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from fullrank.retrieval.base import NO_ITEM, SearchResult, check_k
from fullrank.retrieval.exact import ExactIndex
from fullrank.retrieval.vectors.base import VectorIndex, check_added, in_order, merged, places_of
from fullrank.retrieval.vectors.scan import Scan

# Typical queries that an effort is chosen by, and how many are kept; an index learns from the others.
QUERIES, TYPICAL = 100, 400

_ABOUT = "snapshot.json"

# Share of the snapshot that may be returned, below which all of it is scored, and below which its vectors are copied
# out for that: see docs/vector-indexes.md.
SCAN_BELOW, COPY_BELOW = 0.3, 0.1


@dataclass(frozen=True)
class Snapshot:
    """What a library has indexed.

    Attributes:
        keys_S: ascending.
        scan: their vectors.
        library: the library's index, whose items are named by their places in `keys_S`.
    """

    keys_S: Tensor
    scan: Scan
    library: Any


class SnapshotIndex(VectorIndex):
    """An approximate index that can only be built whole, made to take items and give them up at any time.

    What is added goes to a tail that is scored exactly; what is removed is left out of what the snapshot finds. The
    snapshot is built anew when either exceeds a share. Scores are computed again from the vectors, in float32. Where
    the snapshot finds fewer items than it has, as under a narrow filter, all that may be returned are scored.

    A subclass says how an index of its library is built and asked, and which efforts it can make: a number that
    buys recall for time. The least one that reaches `recall` on typical queries is chosen when the snapshot is built.

    Attributes:
        effort: what searches spend; None while there is no snapshot.
        recall: share of the best items that typical queries find with it.
    """

    class Config(VectorIndex.Config):
        """Hyper-parameters.

        Attributes:
            recall: share of the best items that searches should find; the effort of a search follows from it.
            results: how many best items; what is enough for 100 may find far fewer of 1,000. A funnel puts
                what its retrieval hands on.
            exact_below: number of items up to which there is no snapshot, and all are scored.
            rebuild: share of items added or removed since the snapshot was built, at which it is built anew.
        """

        recall: float = Field(default=0.95, gt=0, lt=1)
        results: int = Field(default=100, ge=1)
        exact_below: int = Field(default=20_000, ge=1)
        rebuild: float = Field(default=0.2, gt=0, lt=1)

    config: Config

    def __init__(self, width: int, config: Config | None = None) -> None:
        super().__init__(width, config)
        self._clear()

    def _clear(self) -> None:
        self.tail = ExactIndex(self.width)
        self.snapshot: Snapshot | None = None
        self.live_S = torch.zeros(0, dtype=torch.bool)
        self.live = 0
        self.effort: int | None = None
        self.recall = 1.0

    def fork(self) -> Self:
        other = copy.copy(self)
        other.tail = self.tail.fork()
        return other

    @abstractmethod
    def _build(self, vectors_SD: Tensor) -> Any:
        """The library's index of these vectors; its items are named 0 to S - 1."""

    @abstractmethod
    def _find(self, library: Any, queries_BD: Tensor, count: int, effort: int) -> Tensor:
        """Places of the best items of each query, in any order, int64 of shape (B, `count`), -1 for none."""

    @abstractmethod
    def _efforts(self, size: int) -> Sequence[int]:
        """The efforts to choose from for S items, ascending; a single one where the config names it."""

    @abstractmethod
    def _scored(self, size: int, effort: int) -> int:
        """Items that a search scores, about."""

    def __len__(self) -> int:
        return len(self.tail) + self.live

    def contents(self) -> tuple[Tensor, Tensor]:
        if self.snapshot is None:
            return self.tail.contents()
        keys_I = torch.cat([self.snapshot.keys_S[self.live_S], self.tail.keys_I])
        vectors_ID = torch.cat([self.snapshot.scan.vectors_ID[self.live_S], self.tail.vectors_ID])
        keys_I, order_I = keys_I.sort()
        return keys_I, vectors_ID[order_I]

    def add(self, keys_I: Tensor, vectors_ID: Tensor) -> None:
        check_added(keys_I, vectors_ID, self.width)
        if self.snapshot is not None:
            place_I = places_of(keys_I, self.snapshot.keys_S)
            there_I = (place_I >= 0) & self.live_S[place_I]
            if bool(there_I.any()):
                raise ValueError(f"item {int(keys_I[there_I][0])} is in the index already or given twice")
        self.tail.add(keys_I, vectors_ID)
        self._rebuild_if_due()

    def remove(self, keys: Tensor) -> None:
        place_A = places_of(keys, torch.zeros(0, dtype=torch.int64) if self.snapshot is None else self.snapshot.keys_S)
        frozen_A = place_A >= 0
        if bool(frozen_A.any()):
            frozen_A &= self.live_S[place_A]
        self.tail.remove(keys[~frozen_A])
        live_S = self.live_S.clone()
        live_S[place_A[frozen_A]] = False
        self.live_S, self.live = live_S, int(live_S.sum())
        self._rebuild_if_due()

    def _rebuild_if_due(self) -> None:
        changed = len(self.tail) + self.live_S.numel() - self.live
        if self.snapshot is None and len(self.tail) <= self.config.exact_below:
            return
        if self.snapshot is None or changed > self.config.rebuild * self.live_S.numel():
            self.rebuild()

    def rebuild(self) -> None:
        """Build the snapshot from all items there are."""
        keys_I, vectors_ID = self.contents()
        self._clear()
        if keys_I.numel() <= self.config.exact_below:
            self.tail.add(keys_I, vectors_ID)
            return
        vectors_ID = vectors_ID.float().contiguous()
        self.snapshot = Snapshot(keys_I, Scan(vectors_ID), self._build(vectors_ID))
        self.live_S, self.live = torch.ones(keys_I.numel(), dtype=torch.bool), keys_I.numel()
        self.tune()

    def queries(self) -> Tensor:
        """Typical queries: those given, or vectors of items drawn at random."""
        if self.typical_QD is not None:
            return self.typical_QD[:QUERIES]
        _, vectors_ID = self.contents()
        rows = torch.randperm(len(vectors_ID), generator=torch.Generator().manual_seed(0))[:QUERIES]
        return vectors_ID[rows]

    def tune(self, queries_QD: Tensor | None = None) -> None:
        """Choose the least effort that reaches the recall asked for, and warn if none does.

        Args:
            queries_QD: default `queries()`.
        """
        if self.snapshot is None:
            return
        queries_QD = self.queries() if queries_QD is None else queries_QD
        size = self.live_S.numel()
        k = min(self.config.results, size)
        _, best_QK = self.snapshot.scan(queries_QD, k)
        for effort in self._efforts(size):
            self.effort = effort
            share_Q = self._share(queries_QD, best_QK)
            self.recall = float(share_Q.mean())
            # A standard error above it, as other queries will be less lucky than those that it was chosen by.
            if self.recall - float(share_Q.std()) / len(share_Q) ** 0.5 >= self.config.recall or self.recall == 1:
                break
        else:
            warnings.warn(
                f"index {self.name}: searches find {self.recall:.3f} of the {k} best items, less than the"
                f" {self.config.recall} asked for; choose another index or let it try harder",
                stacklevel=2,
            )

    def _share(self, queries_QD: Tensor, best_QK: Tensor) -> Tensor:
        """Share of their best places that queries find, (Q,)."""
        found_QK = self.answer(queries_QD, best_QK.shape[1])[1].sort(dim=1).values
        place_QK = torch.searchsorted(found_QK, best_QK).clamp_max(found_QK.shape[1] - 1)
        return (found_QK.gather(1, place_QK) == best_QK).double().mean(1)

    def answer(
        self, queries_BD: Tensor, k: int, wanted: int | None = None, live_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and places in the snapshot of the k best of `wanted` items, default k, that the library finds.

        Args:
            live_S: those that may be returned; fewer than k may be left then, and -inf is the score of others.
        """
        assert self.snapshot is not None and self.effort is not None
        count = min(self.live_S.numel(), self._asked(k if wanted is None else wanted))
        places_BN = self._find(self.snapshot.library, queries_BD, count, self.effort)
        return self.snapshot.scan.score(queries_BD, places_BN, k, live_S)

    def _asked(self, count: int) -> int:
        """Items to ask the library for where `count` are wanted."""
        return count

    def search(self, queries_BD: Tensor, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        check_k(k)
        if self.snapshot is None:
            return self.tail.search(queries_BD, k, allowed=allowed)
        if allowed is not None and allowed.ndim == 2:
            pairs = zip(queries_BD, allowed, strict=True)
            alone = [self.search(query_D[None], k, allowed=own_A) for query_D, own_A in pairs]
            return _stacked(alone) if alone else self.search(queries_BD, k)
        live_S, live = self.live_S, self.live
        if allowed is not None:
            place_A = places_of(allowed, self.snapshot.keys_S)
            live_S = torch.zeros_like(live_S)
            live_S[place_A[place_A >= 0]] = True
            live_S &= self.live_S
            live = int(live_S.sum())
        found = self._search(self.snapshot, queries_BD, k, live_S, live)
        if len(self.tail):
            found = merged(found, self.tail.search(queries_BD, k, allowed=allowed), k)
        return found

    def _search(self, snapshot: Snapshot, queries_BD: Tensor, k: int, live_S: Tensor, count: int) -> SearchResult:
        """Among the items of the snapshot that may be returned, `count` of them."""
        rows, size = queries_BD.shape[0], live_S.numel()
        k = min(k, count)
        if not k:
            nothing = torch.zeros((rows, 0))
            return SearchResult(nothing.long(), nothing, torch.zeros(rows, dtype=torch.int64))
        if count < SCAN_BELOW * size or self._scans(rows):
            scores_BK, places_BK = _scanned(snapshot.scan, queries_BD, k, live_S, count)
            cost_B = torch.full((rows,), count)
        else:
            # Those that may not be returned are found as well, and left out: so many more, and some for bad luck.
            wanted = k if count == size else min(size, math.ceil(1.1 * k * size / count) + 16)
            left_S = None if count == size else live_S
            scores_BK, places_BK = self.answer(queries_BD, k, wanted, left_S)
            cost_B = torch.full((rows,), self._scored(size, self.effort or 0))
            few_B = torch.ones(rows, dtype=torch.bool) if scores_BK.shape[1] < k else scores_BK[:, -1] == -torch.inf
            if bool(few_B.any()):
                scores_BK, places_BK = _padded(scores_BK, k), _padded(places_BK, k)
                scores_BK[few_B], places_BK[few_B] = _scanned(snapshot.scan, queries_BD[few_B], k, live_S, count)
                cost_B[few_B] += count
        return SearchResult(snapshot.keys_S[places_BK], scores_BK, cost_B)

    def _scans(self, rows: int) -> bool:
        """Whether so many queries at once are answered by scoring all items."""
        return False

    def cost(self) -> int:
        if self.snapshot is None:
            return len(self.tail)
        return len(self.tail) + self._scored(self.live_S.numel(), self.effort or 0)

    def state(self) -> dict[str, Tensor]:
        """Keys, vectors and typical queries. The library's index is built again when it is loaded: no format of a
        library is read from a file that others may have written."""
        typical_QD = torch.zeros(0, self.width) if self.typical_QD is None else self.typical_QD
        return {**super().state(), "typical": typical_QD[:TYPICAL].contiguous()}

    def restore(self, state: dict[str, Tensor]) -> None:
        if len(state["typical"]):
            self.typical_QD = state["typical"]
        keys_I, vectors_ID = state["keys"], state["vectors"]
        if self.arrays is None or not (self.arrays / _ABOUT).is_file() or not in_order(keys_I, vectors_ID):
            super().restore(state)
            return
        check_added(keys_I, vectors_ID, self.width)
        scan = Scan(vectors_ID)
        scan.map_halves(self.arrays)
        self.snapshot = Snapshot(keys_I, scan, self._map(self.arrays))
        self.live_S, self.live = torch.ones(keys_I.numel(), dtype=torch.bool), keys_I.numel()
        self._choose(json.loads((self.arrays / _ABOUT).read_text(encoding="utf-8")))

    def write_arrays(self, directory: Path) -> None:
        """Write the snapshot, if it has all items and its library's index can be mapped."""
        if self.snapshot is None or len(self.tail) or self.live < self.live_S.numel():
            return
        if self._write(self.snapshot.library, directory):
            self.snapshot.scan.write_halves(directory)
            (directory / _ABOUT).write_text(json.dumps(self._chosen()), encoding="utf-8")

    def _write(self, library: Any, directory: Path) -> bool:
        """Write the library's index so that `_map` can read it; False if that is not possible."""
        return False

    def _map(self, directory: Path) -> Any:
        """The library's index that `_write` wrote."""
        raise NotImplementedError

    def _chosen(self) -> dict[str, Any]:
        """What `tune` has chosen."""
        return {"effort": self.effort, "recall": self.recall}

    def _choose(self, chosen: dict[str, Any]) -> None:
        """Take back what `_chosen` gave."""
        self.effort, self.recall = chosen["effort"], chosen["recall"]


def _scanned(scan: Scan, queries_BD: Tensor, k: int, live_S: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores and places of the best rows that may be returned, all of them scored."""
    if count == live_S.numel():
        return scan(queries_BD, k)
    if count >= COPY_BELOW * live_S.numel():
        return scan(queries_BD, k, live_S)
    place_I = live_S.nonzero().squeeze(1)
    scores_BK, best_BK = Scan(scan.vectors_ID[place_I], bfloat16=False)(queries_BD, k)
    return scores_BK, place_I[best_BK]


def _padded(values_BN: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values_BN, (0, width - values_BN.shape[1]))


def _stacked(parts: list[SearchResult]) -> SearchResult:
    """Rows of several searches, none behind the last of shorter ones."""
    keys_BK = torch.nn.utils.rnn.pad_sequence([part.item_keys_BK[0] for part in parts], True, NO_ITEM)
    scores_BK = torch.nn.utils.rnn.pad_sequence([part.scores_BK[0] for part in parts], True, -torch.inf)
    return SearchResult(keys_BK, scores_BK, torch.cat([part.cost_B for part in parts]))


def ladder(first: int, last: int) -> list[int]:
    """Whole numbers from `first` to `last`, each about a fifth above the one before."""
    steps = [first]
    while steps[-1] < last:
        steps.append(min(last, max(steps[-1] + 1, round(1.2 * steps[-1]))))
    return steps
