"""Exact search of the largest inner products."""

# Shapes: B queries, I items, D width, K results, A items that may be returned.

from __future__ import annotations

import copy
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fullrank.retrieval.base import NO_ITEM, SearchResult, check_k
from fullrank.retrieval.vectors.base import (
    VectorIndex,
    check_added,
    check_distinct,
    in_order,
    merged,
    places_of,
    without,
    woven,
)
from fullrank.retrieval.vectors.scan import Scan, top_k

__all__ = ["ExactIndex", "top_k"]

# Items up to which a change copies the vectors in one go.
FEW = 256
# Items from which changes are kept beside them, and how many changes are, before all are put together again.
LARGE, MOST_BESIDE = 100_000, 4096
# Further items that are asked for where some are gone: most often none of those is among the best.
SPARE = 16


class ExactIndex(VectorIndex):
    """Item vectors in order of their keys, all of them scored for every query.

    Recall against the scorer is 1 by construction. Ties go to the smaller key, which makes results independent of the
    order in which items came.

    A large index leaves its vectors where they are when a few items come or go, so that processes which map them go on
    to share them: what came is an index of its own, and what is gone is left out of results.
    """

    class Config(VectorIndex.Config):
        """Hyper-parameters.

        Attributes:
            bfloat16: whether batches are scored in bfloat16 first, and what may be among the best then in float32;
                results are those of float32. Default where the processor is good at it. Takes half as much memory
                again.
        """

        bfloat16: bool | None = None

    name = "exact"
    config: Config

    def __init__(self, width: int, config: Config | None = None) -> None:
        super().__init__(width, config)
        self._hold(torch.zeros(0, dtype=torch.int64), torch.zeros(0, width))

    def _hold(self, keys_I: Tensor, vectors_ID: Tensor) -> None:
        self._keys_I, self.scan = keys_I, Scan(vectors_ID, bfloat16=self.config.bfloat16)
        self._came: ExactIndex | None = None
        self._gone_I: Tensor | None = None
        self._num_gone = 0

    @property
    def keys_I(self) -> Tensor:
        """In ascending order."""
        return self.contents()[0]

    @property
    def vectors_ID(self) -> Tensor:
        """float32, in order of the keys."""
        return self.contents()[1]

    def __len__(self) -> int:
        return self._keys_I.numel() - self._num_gone + (0 if self._came is None else len(self._came))

    def contents(self) -> tuple[Tensor, Tensor]:
        keys_I, vectors_ID = self._keys_I, self.scan.vectors_ID
        if self._gone_I is not None:
            gone = self._gone_I.nonzero().squeeze(1)
            keys_I, vectors_ID = without(keys_I, gone), without(vectors_ID, gone)
        if self._came is not None:
            new_keys, new_vectors = self._came.contents()
            at = torch.searchsorted(keys_I, new_keys)
            keys_I, vectors_ID = woven(keys_I, new_keys, at), woven(vectors_ID, new_vectors, at)
        return keys_I, vectors_ID

    def add(self, keys_I: Tensor, vectors_ID: Tensor) -> None:
        check_added(keys_I, vectors_ID, self.width)
        if len(self._keys_I) >= LARGE and len(keys_I) <= MOST_BESIDE:
            place = places_of(keys_I, self._keys_I)
            check_distinct(keys_I[self._is_there(place)].repeat_interleave(2))
            came = ExactIndex(self.width, self.config) if self._came is None else self._came.fork()
            came.add(keys_I, vectors_ID)
            self._came = came
            self._settle_if_due()
            return
        if len(keys_I) <= FEW < len(self):
            keys_I, order = keys_I.sort()
            check_distinct(keys_I)
            there = keys_I[places_of(keys_I, self._keys_I) >= 0]
            check_distinct(there.repeat_interleave(2))
            at = torch.searchsorted(self._keys_I, keys_I)
            vectors_ID = woven(self.scan.vectors_ID, vectors_ID[order].float(), at)
            self._hold(woven(self._keys_I, keys_I, at), vectors_ID)
            return
        held_keys, held_vectors = self.contents()
        keys, order = torch.cat([held_keys, keys_I]).sort(stable=True)
        check_distinct(keys)
        self._hold(keys, torch.cat([held_vectors, vectors_ID.float()])[order].contiguous())

    def restore(self, state: dict[str, Tensor]) -> None:
        keys_I, vectors_ID = state["keys"], state["vectors"]
        check_added(keys_I, vectors_ID, self.width)
        if in_order(keys_I, vectors_ID):
            self._hold(keys_I, vectors_ID)
            if self.arrays is not None:
                self.scan.map_halves(self.arrays)
        else:
            super().restore(state)

    def write_arrays(self, directory: Path) -> None:
        """Write the vectors in bfloat16, unless there are changes beside them."""
        if self._came is None and self._gone_I is None:
            self.scan.write_halves(directory)

    def remove(self, keys: Tensor) -> None:
        places = places_of(keys, self._keys_I)
        there = self._is_there(places)
        came = keys[~there]
        absent = came if self._came is None else came[places_of(came, self._came.keys_I) < 0]
        if len(absent):
            raise KeyError(f"item {int(absent[0])} is not in the index")
        if len(self._keys_I) >= LARGE and len(keys) <= MOST_BESIDE:
            if len(came) and self._came is not None:
                self._came = self._came.fork()
                self._came.remove(came)
            if bool(there.any()):
                size = self._keys_I.shape
                self._gone_I = torch.zeros(size, dtype=torch.bool) if self._gone_I is None else self._gone_I.clone()
                self._gone_I[places[there]] = True
                self._num_gone = int(self._gone_I.sum())
            self._settle_if_due()
            return
        if len(keys) <= FEW and self._came is None and self._gone_I is None:
            places = torch.unique(places)
            self._hold(without(self._keys_I, places), without(self.scan.vectors_ID, places))
            return
        held_keys, held_vectors = self.contents()
        kept = ~torch.isin(held_keys, keys)
        self._hold(held_keys[kept], held_vectors[kept].contiguous())

    def _is_there(self, places: Tensor) -> Tensor:
        """Whether there is an item at places of those that were there first, -1 for none."""
        there = places >= 0
        return there if self._gone_I is None else there & ~self._gone_I[places]

    def _settle_if_due(self) -> None:
        if self._num_gone + (0 if self._came is None else len(self._came)) > MOST_BESIDE:
            self._hold(*self.contents())

    def fork(self) -> Self:
        return copy.copy(self)

    def search(self, queries_BD: Tensor, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        check_k(k)
        found = self._search(queries_BD, k, allowed)
        return found if self._came is None else merged(found, self._came.search(queries_BD, k, allowed=allowed), k)

    def _search(self, queries_BD: Tensor, k: int, allowed: Tensor | None) -> SearchResult:
        """Of those that were there first."""
        rows = queries_BD.shape[0]
        if allowed is None:
            scores_BK, places_BK = self._scanned(queries_BD, k)
            cost = self._keys_I.numel() - self._num_gone
            return SearchResult(self._keys_I[places_BK], scores_BK, torch.full((rows,), cost))
        place_A = places_of(allowed, self._keys_I)
        place_A = place_A.masked_fill(~self._is_there(place_A), -1)
        if allowed.ndim == 1:
            place_A = torch.unique(place_A[place_A >= 0])
            scores_BK, best_BK = Scan(self.scan.vectors_ID[place_A], bfloat16=False)(queries_BD, k)
            return SearchResult(self._keys_I[place_A[best_BK]], scores_BK, torch.full((rows,), place_A.numel()))
        scores_BK, places_BK = self.scan.score(queries_BD, place_A, k)
        keys_BK = self._keys_I[places_BK].masked_fill(scores_BK == -torch.inf, NO_ITEM)
        return SearchResult(keys_BK, scores_BK, (place_A >= 0).sum(1))

    def _scanned(self, queries_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and places of the best that are there, as many for each query."""
        if self._gone_I is None:
            return self.scan(queries_BD, k)
        left = min(k, self._keys_I.numel() - self._num_gone)
        spare = min(self._num_gone, SPARE)
        scores_BK, places_BK = self.scan(queries_BD, k + spare)
        gone_BK = self._gone_I[places_BK]
        if spare < self._num_gone and bool(((~gone_BK).sum(1) < left).any()):
            scores_BK, places_BK = self.scan(queries_BD, k + self._num_gone)
            gone_BK = self._gone_I[places_BK]
        order_BK = gone_BK.int().argsort(dim=1, stable=True)[:, :left]
        return scores_BK.gather(1, order_BK), places_BK.gather(1, order_BK)

    def cost(self) -> int:
        return len(self)
