"""A filter of the graph of users and items in closed form: nothing is trained."""

# Shapes: B users of a block, P pairs, U users, I items, N indexed items, K results.

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.retrieval.base import Items, Progress, Retriever, SearchResult, check_k
from fullrank.retrieval.exact import ExactIndex
from fullrank.retrieval.implicit.interactions import Interactions, id_column
from fullrank.schema import Schema

# Users scored at once; a block holds a few matrices of so many columns and a row per user and item.
USERS_AT_ONCE = 64
# Steps of the power iteration for the largest eigenvalue.
_POWER_STEPS = 20


class GraphFilter(Retriever):
    """Scores x S - w x S^2, x being the user's row of the 0/1 matrix R of pairs.

    S = A^-a R' C^-c R A^-b / its largest eigenvalue, with the items' numbers of pairs in A and the users' in C, passes
    what a user took on to the items that were taken along with it. a discounts popular items in the history, b those
    that are scored (1/2 makes S symmetric, less leaves more to popularity), c users who took much. Two steps tell what
    is popular in the whole neighbourhood; taking a part w of them away sharpens the first step.

    A new user has the mean row of all, and a new item each user's mean score. Deviation: the papers have a = b = 1/2
    and c = 1, add a truncated SVD and sharpen by integrating a differential equation; here one step does.

    Source: Shen et al., How Powerful is Graph Convolution for Recommendation?, CIKM 2021; Choi et al., Blurring-
    Sharpening Process Models for Collaborative Filtering, SIGIR 2023.
    """

    class Config(Retriever.Config):
        """Hyper-parameters.

        Attributes:
            user_power: c.
            history_power: a.
            item_power: b.
            sharpening: w.
        """

        user_power: float = Field(default=0.6, ge=0, le=2)
        history_power: float = Field(default=0.6, ge=0, le=2)
        item_power: float = Field(default=0.3, ge=0, le=2)
        sharpening: float = Field(default=0.7, ge=0)

    name = "graph_filter"
    filters = True
    config: Config

    def __init__(self, schema: Schema, config: Config | None = None) -> None:
        super().__init__(schema, config)
        self._user_column, _ = id_column(schema, "user")
        self._item_column, _ = id_column(schema, "item")
        none = torch.zeros(0, dtype=torch.int64)
        self.pairs = Interactions(none, none, none, none)
        self._filter: _Filter | None = None
        # Keys in order, and the id of each.
        self.exact, self.ids_N = ExactIndex(0), none

    def fit(self, log: Dataset, *, progress: Progress | None = None) -> Self:
        """Keep the pairs of the training part of a log.

        Raises:
            ValueError: if the log has no binary label or no positive row.
        """
        self.pairs = Interactions.of(log)
        self._filter = _Filter(self.pairs, self.config)
        return self

    def scores(self, users: Batch) -> Tensor:
        """Of all items that have pairs, in the order of `pairs.item_ids_I`, shape (B, I)."""
        if self._filter is None:
            return torch.zeros(len(users), 0)
        place_B, known_B = _places(self.pairs.user_ids_U, users.ids_BF[:, self._user_column])
        rows_IB = torch.zeros(self.pairs.items, len(users))
        row_Q, item_Q = self.pairs.of_users(place_B[known_B])
        rows_IB[item_Q, known_B.nonzero()[:, 0][row_Q]] = 1.0
        rows_IB[:, ~known_B] = (self.pairs.per_item_I / self.pairs.users)[:, None]
        return self._filter(rows_IB).T

    def index(self, items: Items) -> None:
        fresh = ExactIndex(0)
        self._add(items, fresh, self.ids_N[:0])

    def add(self, items: Items) -> None:
        self._add(items, self.exact, self.ids_N)

    def _add(self, items: Items, exact: ExactIndex, ids_N: Tensor) -> None:
        order = torch.cat([exact.keys_I, items.keys_I]).sort(stable=True).indices
        exact.add(items.keys_I, torch.zeros(items.keys_I.numel(), 0))
        ids_N = torch.cat([ids_N, items.features.ids_BF[:, self._item_column]])[order]
        self.exact, self.ids_N = exact, ids_N

    def remove(self, keys: Tensor) -> None:
        before_N = self.exact.keys_I
        self.exact.remove(keys)
        self.ids_N = self.ids_N[torch.isin(before_N, self.exact.keys_I)]

    def search(self, users: Batch, k: int, *, allowed: Tensor | None = None) -> SearchResult:
        check_k(k)
        place_N, known_N = _places(self.pairs.item_ids_I, self.ids_N)
        parts = []
        for begin in range(0, max(len(users), 1), USERS_AT_ONCE):
            block = users[begin : begin + USERS_AT_ONCE]
            scores_BI = self.scores(block)
            scores_BN = torch.zeros(len(block), self.ids_N.numel())
            if scores_BI.numel():
                scores_BN = torch.where(known_N, scores_BI[:, place_N], scores_BI.mean(1, keepdim=True))
            # The items as vectors of their scores by each user of the block, of which a user's query takes one.
            index = ExactIndex(len(block))
            index.add(self.exact.keys_I, scores_BN.T.contiguous())
            own = allowed[begin : begin + USERS_AT_ONCE] if allowed is not None and allowed.ndim == 2 else allowed
            parts.append(index.search(torch.eye(len(block)), k, allowed=own))
        return SearchResult(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def cost(self) -> int:
        return len(self.exact)

    def state(self) -> dict[str, Tensor]:
        return {
            "pairs.users": self.pairs.user_P,
            "pairs.items": self.pairs.item_P,
            "users": self.pairs.user_ids_U,
            "items": self.pairs.item_ids_I,
            "index.keys": self.exact.keys_I,
            "index.items": self.ids_N,
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        pairs = Interactions(state["pairs.users"], state["pairs.items"], state["users"], state["items"])
        pairs.check()
        if state["index.keys"].shape != state["index.items"].shape:
            raise ValueError(f"{len(state['index.keys'])} keys of items have {len(state['index.items'])} ids")
        self.pairs = pairs
        self._filter = _Filter(pairs, self.config) if len(pairs) else None
        self.exact.add(state["index.keys"], torch.zeros(state["index.keys"].numel(), 0))
        self.ids_N = state["index.items"]


class _Filter:
    """The filter of some pairs, for rows that stand as columns."""

    def __init__(self, pairs: Interactions, config: GraphFilter.Config) -> None:
        self._taken = pairs.matrix(torch.ones(len(pairs)))
        self._sharpening = config.sharpening
        self._by_user_U1 = pairs.per_user_U.pow(-config.user_power)[:, None]
        self._by_history_I1 = pairs.per_item_I.pow(-config.history_power)[:, None]
        self._by_item_I1 = pairs.per_item_I.pow(-config.item_power)[:, None]
        x_I1 = torch.ones(pairs.items, 1)
        for _ in range(_POWER_STEPS):
            x_I1 = self._step(x_I1 / x_I1.norm())
        self._by_item_I1 /= x_I1.norm()

    def __call__(self, rows_IB: Tensor) -> Tensor:
        once_IB = self._step(rows_IB)
        return once_IB - self._sharpening * self._step(once_IB) if self._sharpening else once_IB

    def _step(self, rows_IB: Tensor) -> Tensor:
        weights_UB = self._by_user_U1 * (self._taken @ (self._by_history_I1 * rows_IB))
        return self._by_item_I1 * (self._taken.transposed @ weights_UB)


def _places(ids_I: Tensor, wanted_N: Tensor) -> tuple[Tensor, Tensor]:
    """Places of some ids among sorted ones, and which of them are there at all."""
    if not ids_I.numel():
        return torch.zeros_like(wanted_N), torch.zeros_like(wanted_N, dtype=torch.bool)
    place_N = torch.searchsorted(ids_I, wanted_N).clamp_max(ids_I.numel() - 1)
    return place_N, ids_I[place_N] == wanted_N
