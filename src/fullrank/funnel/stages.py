"""The stages of a funnel: their names, how many candidates each hands on, and which may prepare items beforehand."""

# Shapes: U users, P candidates of each user, I items, V width of an item's vector, T tasks.

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from fullrank.batch import Batch

RETRIEVAL, FINAL = "retrieval", "final"
# What else reports and metrics speak of beside the stages.
_TAKEN = {RETRIEVAL, FINAL, "encode", "requests", "retrievable", "import", "fit", "evaluate", "total"}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class StageSizes(BaseModel):
    """How many candidates pass each stage.

    Attributes:
        retrieve: items that retrieval hands on.
        keep: items that the early stage hands on; of several stages a list, in their order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    retrieve: int = Field(default=1000, ge=1)
    keep: int | tuple[int, ...] = 200

    @field_validator("keep", mode="before")
    @classmethod
    def _sizes(cls, value: Any) -> Any:
        sizes = value if isinstance(value, list | tuple) and value else [value]
        if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes):
            raise ValueError(f"expected an integer >= 1, or a list of them, got {value!r}")
        return sizes[0] if len(sizes) == 1 else tuple(sizes)

    def keeps(self, stages: int) -> tuple[int, ...]:
        """What each of so many early stages hands on.

        Raises:
            ValueError: if they are not as many as there are sizes.
        """
        if isinstance(self.keep, tuple):
            if stages != len(self.keep):
                raise ValueError(f"keep has {len(self.keep)} sizes for {stages} early stages")
            return self.keep
        if stages > 1:
            raise ValueError(f"keep is one size for {stages} early stages, expected a list of {stages}")
        return (self.keep,) * stages

    def finalists(self, stages: int) -> int:
        """Candidates that the final stage scores, with so many early stages before it."""
        return (self.retrieve, *self.keeps(stages))[-1]


@runtime_checkable
class TwoSided(Protocol):
    """A ranker that can look at the items before any request comes. As an early stage it does so once.

    Other rankers score pairs of users and items.
    """

    def item_vectors(self, items: Batch) -> Tensor:
        """What `score` needs of each item, shape (I, V); the user and context columns hold anything valid."""

    def score(self, users: Batch, items_UPV: Tensor) -> Tensor:
        """logits_UPT of candidates given as rows of `item_vectors`: those of the ranker on the pairs."""


def check_names(early: Iterable[str]) -> None:
    """Raises:
    ValueError: if the name of an early stage is not a short word, is taken, or occurs twice.
    """
    seen: set[str] = set()
    for name in early:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r} is no name of a stage: expected a-z, 0-9 and _, beginning with a letter")
        if name in _TAKEN or "_at_" in name:
            raise ValueError(f'a stage cannot be called "{name}": choose another name')
        if name in seen:
            raise ValueError(f'two stages are called "{name}"')
        seen.add(name)
