"""The most clicked items, the same for everyone: the baseline that a retriever has to beat."""

# Shapes: B users, I items, K results.

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.retrieval.base import Items, Progress, Retriever, SearchResult
from fullrank.retrieval.exact import ExactIndex
from fullrank.retrieval.two_tower import positive_rows
from fullrank.retrieval.vectors.base import places_of
from fullrank.schema import Schema


class Popularity(Retriever):
    """Score = log(1 + clicks in training)."""

    name = "popularity"
    filters = True

    def __init__(self, schema: Schema, config: Retriever.Config | None = None) -> None:
        super().__init__(schema, config)
        self.clicked = ExactIndex(1)
        self.exact = ExactIndex(1)

    def fit(self, log: Dataset, *, progress: Progress | None = None) -> Self:
        """Raises:
        ValueError: if the log names no item_id, has no binary label or no positive row.
        """
        _, keys_P = positive_rows(log)
        keys_I, count_I = torch.unique(keys_P, return_counts=True)
        self.clicked = ExactIndex(1)
        self.clicked.add(keys_I, count_I.float().log1p()[:, None])
        return self

    def _scores(self, keys_I: Tensor) -> Tensor:
        known_keys, known = self.clicked.keys_I, self.clicked.vectors_ID
        if not known_keys.numel():
            return torch.zeros(keys_I.numel(), 1)
        place_I = places_of(keys_I, known_keys)
        return torch.where((place_I >= 0)[:, None], known[place_I], 0.0)

    def index(self, items: Items) -> None:
        fresh = ExactIndex(1)
        fresh.add(items.keys_I, self._scores(items.keys_I))
        self.exact = fresh

    def add(self, items: Items) -> None:
        self.exact.add(items.keys_I, self._scores(items.keys_I))

    def remove(self, keys: Tensor) -> None:
        self.exact.remove(keys)

    def fork(self) -> Self:
        other = copy.copy(self)
        other.exact = self.exact.fork()
        return other

    def search(self, users: Batch, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        if allowed is not None and allowed.ndim == 2:
            return self.exact.search(torch.ones(len(users), 1), k, allowed=allowed)
        best = self.exact.search(torch.ones(1, 1), k, allowed=allowed)
        return SearchResult(*(one.expand(len(users), *one.shape[1:]).contiguous() for one in best))

    def cost(self) -> int:
        return len(self.exact)

    def state(self) -> dict[str, Tensor]:
        return {
            "clicked.keys": self.clicked.keys_I,
            "clicked.scores": self.clicked.vectors_ID.contiguous(),
            "index.keys": self.exact.keys_I,
            "index.scores": self.exact.vectors_ID.contiguous(),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        self.clicked.add(state["clicked.keys"], state["clicked.scores"])
        self.exact.add(state["index.keys"], state["index.scores"])
