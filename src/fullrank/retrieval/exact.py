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
    places_of,
    without,
    woven,
)
from fullrank.retrieval.vectors.scan import Scan, top_k

__all__ = ["ExactIndex", "top_k"]

# Items up to which a change copies the vectors in one go.
FEW = 256


class ExactIndex(VectorIndex):
    """Item vectors in order of their keys, all of them scored for every query.

    Recall against the scorer is 1 by construction. Ties go to the smaller key, which makes results independent of the
    order in which items came.
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
        self.keys_I = torch.zeros(0, dtype=torch.int64)
        self._hold(torch.zeros(0, width))

    def _hold(self, vectors_ID: Tensor) -> None:
        self.scan = Scan(vectors_ID, bfloat16=self.config.bfloat16)

    @property
    def vectors_ID(self) -> Tensor:
        """float32, in order of the keys."""
        return self.scan.vectors_ID

    def __len__(self) -> int:
        return self.keys_I.numel()

    def contents(self) -> tuple[Tensor, Tensor]:
        return self.keys_I, self.vectors_ID

    def add(self, keys_I: Tensor, vectors_ID: Tensor) -> None:
        check_added(keys_I, vectors_ID, self.width)
        if len(keys_I) <= FEW < len(self):
            keys_I, order = keys_I.sort()
            check_distinct(keys_I)
            there = keys_I[places_of(keys_I, self.keys_I) >= 0]
            check_distinct(there.repeat_interleave(2))
            at = torch.searchsorted(self.keys_I, keys_I)
            self.keys_I = woven(self.keys_I, keys_I, at)
            self._hold(woven(self.vectors_ID, vectors_ID[order].float(), at))
            return
        keys = torch.cat([self.keys_I, keys_I])
        vectors = torch.cat([self.vectors_ID, vectors_ID.float()])
        keys, order = keys.sort(stable=True)
        check_distinct(keys)
        self.keys_I = keys
        self._hold(vectors[order].contiguous())

    def restore(self, state: dict[str, Tensor]) -> None:
        keys_I, vectors_ID = state["keys"], state["vectors"]
        check_added(keys_I, vectors_ID, self.width)
        if in_order(keys_I, vectors_ID):
            self.keys_I = keys_I
            self._hold(vectors_ID)
            if self.arrays is not None:
                self.scan.map_halves(self.arrays)
        else:
            super().restore(state)

    def write_arrays(self, directory: Path) -> None:
        self.scan.write_halves(directory)

    def remove(self, keys: Tensor) -> None:
        places = places_of(keys, self.keys_I)
        if bool((places < 0).any()):
            raise KeyError(f"item {int(keys[places < 0][0])} is not in the index")
        if len(keys) <= FEW:
            places = torch.unique(places)
            self.keys_I = without(self.keys_I, places)
            self._hold(without(self.vectors_ID, places))
            return
        kept = ~torch.isin(self.keys_I, keys)
        self.keys_I = self.keys_I[kept]
        self._hold(self.vectors_ID[kept].contiguous())

    def fork(self) -> Self:
        return copy.copy(self)

    def search(self, queries_BD: Tensor, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        check_k(k)
        rows = queries_BD.shape[0]
        if allowed is None:
            scores_BK, places_BK = self.scan(queries_BD, k)
            return SearchResult(self.keys_I[places_BK], scores_BK, torch.full((rows,), len(self)))
        if allowed.ndim == 1:
            place_A = places_of(allowed, self.keys_I)
            place_A = torch.unique(place_A[place_A >= 0])
            scores_BK, best_BK = Scan(self.vectors_ID[place_A], bfloat16=False)(queries_BD, k)
            return SearchResult(self.keys_I[place_A[best_BK]], scores_BK, torch.full((rows,), place_A.numel()))
        scores_BK, places_BK = self.scan.score(queries_BD, places_of(allowed, self.keys_I), k)
        keys_BK = self.keys_I[places_BK].masked_fill(scores_BK == -torch.inf, NO_ITEM)
        return SearchResult(keys_BK, scores_BK, (places_of(allowed, self.keys_I) >= 0).sum(1))

    def cost(self) -> int:
        return len(self)
