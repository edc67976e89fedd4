"""The contract of every index of vectors: the largest inner products with a query, under additions and removals."""

# Shapes: B queries, I items, D width, K results, A items that may be returned, Q typical queries.

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fullrank.retrieval.base import NO_ITEM, SearchResult


class VectorIndex(ABC):
    """Item vectors by key, searched for the largest inner products.

    Made from `(width, config)`; one without a Config of its own has no hyper-parameters. What it finds may miss items,
    but the scores of those found are inner products in float32, ties go to the smaller key, and k items come back
    wherever there are k that may.

    Attributes:
        typical_QD: queries as they will come, by which an index chooses what it has to choose when it is built; vectors
            of its items where omitted.
        arrays: directory that `write_arrays` wrote of the same items, from which `restore` maps what it would make.
    """

    class Config(BaseModel):
        """Hyper-parameters of an index of vectors."""

        model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    arrays: Path | None = None

    def __init__(self, width: int, config: Config | None = None) -> None:
        self.width = width
        self.config = self.Config() if config is None else config
        self.typical_QD: Tensor | None = None

    @abstractmethod
    def __len__(self) -> int:
        """I."""

    @abstractmethod
    def contents(self) -> tuple[Tensor, Tensor]:
        """Keys in ascending order and their vectors, keys_I and vectors_ID."""

    @abstractmethod
    def add(self, keys_I: Tensor, vectors_ID: Tensor) -> None:
        """Make more items searchable; the next search finds them.

        Raises:
            ValueError: if a key occurs twice, is there already or is that of no item, the width differs, or a number
                is not finite.
        """

    @abstractmethod
    def remove(self, keys: Tensor) -> None:
        """Forget items; the next search does not return them.

        Raises:
            KeyError: if a key is not in the index.
        """

    @abstractmethod
    def search(self, queries_BD: Tensor, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        """The k best items of each query.

        Args:
            allowed: see `Retriever.search`. What all queries share is searched alone, and costs less.

        Raises:
            ValueError: if k is below 1.
        """

    @abstractmethod
    def cost(self) -> int:
        """Items scored per query, typically."""

    def fork(self) -> Self:
        """An index that finds the same until one of the two is changed, and shares with it what is not; itself where
        additions and removals change it in place."""
        return self

    def state(self) -> dict[str, Tensor]:
        """What is saved: keys and vectors, from which any index is built again."""
        keys_I, vectors_ID = self.contents()
        return {"keys": keys_I, "vectors": vectors_ID.contiguous()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave; called on a new index.

        Raises:
            ValueError: see `add`.
        """
        self.add(state["keys"], state["vectors"])

    def write_arrays(self, directory: Path) -> None:  # noqa: B027
        """Write what `restore` makes of the state, for other processes of this machine to map; by default nothing."""


def in_order(keys_I: Tensor, vectors_ID: Tensor) -> bool:
    """Whether items are as an index holds them: they need not be sorted, and what is mapped from a file stays there."""
    return vectors_ID.dtype == torch.float32 and bool((keys_I[1:] > keys_I[:-1]).all())


def check_added(keys_I: Tensor, vectors_ID: Tensor, width: int) -> None:
    """Raises:
    ValueError: see `VectorIndex.add`; what is there already is not looked at.
    """
    if keys_I.ndim != 1 or keys_I.dtype != torch.int64:
        raise ValueError(f"item keys are {keys_I.dtype} of shape {tuple(keys_I.shape)}, expected a row of int64")
    if vectors_ID.ndim != 2 or vectors_ID.shape != (keys_I.numel(), width):
        expected = (keys_I.numel(), width)
        raise ValueError(f"item vectors have shape {tuple(vectors_ID.shape)}, expected {expected}")
    if bool((keys_I == NO_ITEM).any()):
        raise ValueError(f"{NO_ITEM} is the key of no item")
    finite_I = torch.isfinite(vectors_ID).all(1)
    if not bool(finite_I.all()):
        raise ValueError(f"the vector of item {int(keys_I[~finite_I][0])} has a NaN or infinite number")


def check_distinct(sorted_keys_I: Tensor) -> None:
    """Raises:
    ValueError: if a key occurs twice.
    """
    twice = sorted_keys_I[1:] == sorted_keys_I[:-1]
    if bool(twice.any()):
        raise ValueError(f"item {int(sorted_keys_I[1:][twice][0])} is in the index already or given twice")


def places_of(keys: Tensor, sorted_keys_I: Tensor) -> Tensor:
    """Place of each key among sorted ones, -1 where it is not."""
    if not sorted_keys_I.numel():
        return torch.full_like(keys, -1)
    place = torch.searchsorted(sorted_keys_I, keys.contiguous()).clamp_max(sorted_keys_I.numel() - 1)
    return place.masked_fill(sorted_keys_I[place] != keys, -1)


def merged(one: SearchResult, other: SearchResult, k: int) -> SearchResult:
    """The k best of two searches of different items."""
    keys_BK, scores_BK = torch.cat([one.item_keys_BK, other.item_keys_BK], 1), torch.cat([one[1], other[1]], 1)
    keys_BK, order_BK = keys_BK.sort(1)
    scores_BK, best_BK = scores_BK.gather(1, order_BK).sort(dim=1, descending=True, stable=True)
    keys_BK = keys_BK.gather(1, best_BK)
    return SearchResult(keys_BK[:, :k].contiguous(), scores_BK[:, :k].contiguous(), one.cost_B + other.cost_B)


def woven(old: Tensor, new: Tensor, at_N: Tensor) -> Tensor:
    """Rows of `old` with those of `new`, each before the row of `old` at its place; few into many are copied once.

    Args:
        at_N: ascending, up to the length of `old`.
    """
    pieces, begin = [], 0
    for row, place in enumerate(at_N.tolist()):
        pieces += [old[begin:place], new[row : row + 1]]
        begin = place
    return torch.cat([*pieces, old[begin:]])


def without(old: Tensor, at_N: Tensor) -> Tensor:
    """Rows of `old` but for those at some places, in any order."""
    pieces, begin = [], 0
    for place in at_N.sort().values.tolist():
        pieces.append(old[begin:place])
        begin = place + 1
    return torch.cat([*pieces, old[begin:]])
