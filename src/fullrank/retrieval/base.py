"""The contract of every retriever: from a whole catalogue to a few hundred or thousand candidates."""

# Shapes: B users, I items, K results, A items that may be returned.

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data import atomic
from fullrank.data.dataset import Dataset
from fullrank.data.hashing import hash_series
from fullrank.schema import Schema

# Key of no item: what follows the last result of a user who has fewer than another.
NO_ITEM = -1

# Told the step, the number of steps and the loss.
Progress = Callable[[int, int, float], None]

_ABOUT, _TENSORS = "retriever.json", "retriever.safetensors"


@dataclass(frozen=True)
class Items:
    """Items to be searched.

    Attributes:
        keys_I: int64, distinct, never `NO_ITEM`; see `item_keys`.
        features: one row per item with the item columns filled; the others are placeholders.
    """

    keys_I: Tensor
    features: Batch


class SearchResult(NamedTuple):
    """Best items of each user, best first, ties by smaller key; a user may have fewer than K.

    Attributes:
        item_keys_BK: int64, `NO_ITEM` behind the last.
        scores_BK: float32, -inf behind the last.
        cost_B: int64, items scored for each user.
    """

    item_keys_BK: Tensor
    scores_BK: Tensor
    cost_B: Tensor

    @property
    def found_BK(self) -> Tensor:
        """Where there is an item."""
        return self.item_keys_BK != NO_ITEM


class Retriever(ABC):
    """Base of every retriever.

    Items are named by int64 keys; `item_keys` makes them from the ids of a log. Users come as a `Batch` whose user
    and context columns are filled.

    A subclass has a `name` and, where it has hyper-parameters, a `Config` beside it, and is made from
    `(schema, config)`. `state` names its tensors and `restore` takes them back: all that `save` and `load` ask for.

    Attributes:
        filters: whether `search` takes `allowed`.
        arrays: directory that `write_arrays` wrote of the same state, from which `restore` maps what it would make.
        added_later: names of tensors by item that what was saved by an earlier version lacks, and `restore` can.
    """

    class Config(BaseModel):
        """Hyper-parameters of a retriever."""

        model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    filters: ClassVar[bool] = False
    added_later: ClassVar[frozenset[str]] = frozenset()
    arrays: Path | None = None

    def __init__(self, schema: Schema, config: Config | None = None) -> None:
        self.schema = schema
        self.config = self.Config() if config is None else config

    @abstractmethod
    def fit(self, log: Dataset, *, progress: Progress | None = None) -> Self:
        """Learn from the training part of a log.

        Raises:
            ValueError: if the log lacks what the retriever learns from.
        """

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
    def search(self, users: Batch, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        """The k best items of each user, or as many as are found; all of them if there are fewer.

        Args:
            allowed: keys of the items that may be returned, to all users (A,) or to each its own (B, A), `NO_ITEM`
                behind the last. Keys that are not indexed are ignored. Only if `filters`.

        Raises:
            ValueError: if k is below 1, or `allowed` is given to a retriever that does not filter.
        """

    @abstractmethod
    def cost(self) -> int:
        """Items scored per query, typically; `SearchResult.cost_B` says it of each."""

    def fork(self) -> Self:
        """A retriever that finds the same until one of the two is changed, and shares with it what is not; itself where
        additions and removals change its index in place."""
        return self

    def state(self) -> dict[str, Tensor]:
        """What was learnt, and the index, as contiguous tensors by name.

        What goes by item has no row in a new retriever, and any number of rows in a fitted one.
        """
        raise NotImplementedError

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave; called on a new retriever, with tensors of the right names and widths.

        Raises:
            ValueError: if they contradict one another.
        """
        raise NotImplementedError

    def write_arrays(self, directory: Path) -> None:  # noqa: B027
        """Write what `restore` makes of the state, for other processes of this machine to map; by default nothing."""

    def save(self, directory: Path) -> None:
        """Write the fitted state and the index as safetensors and JSON into a directory, made if needed."""
        directory.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(directory / _TENSORS, to_safetensors(self.state()))
        about = {"kind": self.name, "config": self.config.model_dump(mode="json")}
        atomic.write_text(directory / _ABOUT, json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path, schema: Schema, *, arrays: Path | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            arrays: see `Retriever`. Unlike what `save` wrote it is trusted.

        Raises:
            ValueError: if files are missing, damaged, of another kind of retriever, or do not fit the schema.
        """
        path = directory / _TENSORS
        config = cls.Config.model_validate(_read_about(directory / _ABOUT, cls.name))
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from None
        # Built without memory first, so that a size which the tensors do not have cannot fill it.
        with torch.device("meta"):
            expected = cls(schema, config).state()
        for name in sorted((expected.keys() | state.keys()) - (cls.added_later - state.keys())):
            if not _fits(state.get(name), expected.get(name)):
                raise ValueError(f"{path} does not fit the schema: tensor {name}")
            if state[name].dtype != expected[name].dtype:
                raise ValueError(f"{path}: {name} has {state[name].dtype}, expected {expected[name].dtype}")
            if state[name].is_floating_point() and not bool(torch.isfinite(state[name]).all()):
                raise ValueError(f"{path}: {name} has a NaN or infinite number")
        retriever = cls(schema, config)
        retriever.arrays = arrays
        retriever.restore(state)
        return retriever


def _read_about(path: Path, name: str) -> Any:
    """The configuration of a saved retriever of this name."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        found, config = about["kind"], about["config"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error!r}") from None
    if found != name:
        raise ValueError(f'{path}: this is a retriever of kind "{found}", expected "{name}"')
    return config


def _fits(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return False
    if expected.ndim and expected.shape[0] == 0:  # an entry per item
        return found.ndim == expected.ndim and found.shape[1:] == expected.shape[1:]
    return found.shape == expected.shape


def item_keys(ids: pl.Series) -> Tensor:
    """int64 keys of a log's item ids: integers as they are, texts by a 64-bit hash that never changes.

    What would be `NO_ITEM` is the smallest integer instead.
    """
    if ids.dtype.is_integer():
        keys = ids.cast(pl.Int64).to_numpy().copy()
    else:
        keys = hash_series(ids.cast(pl.String)).view(np.int64).copy()
    keys[keys == NO_ITEM] = np.iinfo(np.int64).min
    return torch.from_numpy(keys)


def check_k(k: int) -> None:
    """Raises:
    ValueError: if k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
