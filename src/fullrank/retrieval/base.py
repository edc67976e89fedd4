"""The contract of every retriever: from a whole catalogue to a few hundred or thousand candidates."""

# Shapes: B users, I items, K results.

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.hashing import hash_series
from fullrank.schema import Schema


@dataclass(frozen=True)
class Items:
    """Items to be searched.

    Attributes:
        keys_I: int64, distinct; see `item_keys`.
        features: one row per item with the item columns filled; the others are placeholders.
    """

    keys_I: Tensor
    features: Batch


class SearchResult(NamedTuple):
    """Best items of each user, best first, ties by smaller key."""

    item_keys_BK: Tensor
    scores_BK: Tensor


class Retriever(ABC):
    """Base of every retriever.

    Items are named by int64 keys; `item_keys` makes them from the ids of a log. Users come as a `Batch` whose user
    and context columns are filled.
    """

    class Config(BaseModel):
        """Hyper-parameters of a retriever."""

        model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]

    @abstractmethod
    def fit(self, log: Dataset) -> Self:
        """Learn from the training part of a log."""

    @abstractmethod
    def index(self, items: Items) -> None:
        """Make exactly these items searchable.

        Raises:
            ValueError: if a key occurs twice.
        """

    @abstractmethod
    def add(self, items: Items) -> None:
        """Make more items searchable; they are found by the next search.

        Raises:
            ValueError: if a key is there already.
        """

    @abstractmethod
    def remove(self, keys: Tensor) -> None:
        """Forget items; the next search does not return them.

        Raises:
            KeyError: if a key is not there.
        """

    @abstractmethod
    def search(self, users: Batch, k: int) -> SearchResult:
        """The k best items of each user; all of them if there are fewer.

        Raises:
            ValueError: if k is below 1.
        """

    @abstractmethod
    def cost(self) -> int:
        """Items scored per query."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the fitted state and the index as safetensors and JSON into a directory, made if needed."""

    @classmethod
    @abstractmethod
    def load(cls, directory: Path, schema: Schema) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: if files are missing, damaged or do not fit the schema.
        """


def item_keys(ids: pl.Series) -> Tensor:
    """int64 keys of a log's item ids: integers as they are, texts by a 64-bit hash that never changes."""
    if ids.dtype.is_integer():
        return torch.from_numpy(ids.cast(pl.Int64).to_numpy().copy())
    return torch.from_numpy(hash_series(ids.cast(pl.String)).view(np.int64).copy())


def check_k(k: int) -> None:
    """Raises:
    ValueError: if k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
