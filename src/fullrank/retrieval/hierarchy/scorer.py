"""What an index asks of a model: scores of nodes and of items."""

# Shapes: B users, M nodes of a level, I items, V width of node vectors, D width of item vectors,
# N levels scored so far.

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor


class Scorer(ABC):
    """Scores of a batch of encoded users against nodes and items.

    To the index users are opaque: what `encode` of a model gives, of which it takes some by `take` and asks the number
    by `count`. A tensor with a row per user, the default, needs neither overridden.

    Both scores are of a grid, every given user against every given row, and rows come as a slice of what the index
    stores or as a few such slices behind one another.

    Attributes:
        ensembles: whether `combined` is asked for. Without it the own score of a level decides.
        pairs_at_once: most pairs of a call, which bounds a model's memory.
        rows_worth_a_call: slices of at least as many rows are scored where they lie, shorter ones are copied behind
            one another first: what a call costs, in rows copied.
        pairs_worth_a_call: with fewer pairs per node that several users share, each user is scored by itself.
        version: of the model; an index of another version refuses it. None fits every index.
    """

    ensembles: ClassVar[bool] = False
    pairs_at_once: int = 1 << 16
    rows_worth_a_call: int = 4096
    pairs_worth_a_call: int = 1024
    version: str | None = None

    @abstractmethod
    def node_scores(self, level: int, users: Any, nodes_MV: Tensor) -> Tensor:
        """Scores (B, M) of nodes of a level; 0 is the coarsest."""

    @abstractmethod
    def item_scores(self, users: Any, vectors_ID: Tensor) -> Tensor:
        """Scores (B, I) of items."""

    def combined(self, level: int, scores_BIN: Tensor) -> Tensor:
        """What decides at a level, (B, I), from the scores of its ancestors and its own, which comes last.

        Only if `ensembles`. At the items `level` is the number of levels. What stands for no pair is 0.
        """
        return scores_BIN[..., -1]

    def take(self, users: Any, rows_U: Tensor) -> Any:
        """Some of the users."""
        return users[rows_U]

    def count(self, users: Any) -> int:
        """B."""
        return len(users)

    def flops(self, level: int | None) -> int | None:
        """Floating-point operations of a user and a node of a level, or an item for None, where known."""
        return None


class DotProduct(Scorer):
    """u·v with the vectors of nodes and of items alike, which then have the width of the users'."""

    pairs_at_once = 1 << 22
    rows_worth_a_call = 256
    pairs_worth_a_call = 2048

    def __init__(self, width: int | None = None, version: str | None = None) -> None:
        self.width = width
        self.version = version

    def node_scores(self, level: int, users: Tensor, nodes_MV: Tensor) -> Tensor:
        return users @ nodes_MV.T

    def item_scores(self, users: Tensor, vectors_ID: Tensor) -> Tensor:
        return users @ vectors_ID.T

    def flops(self, level: int | None) -> int | None:
        return None if self.width is None else 2 * self.width
