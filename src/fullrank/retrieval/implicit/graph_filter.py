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
from fullrank.retrieval.implicit.interactions import Interactions, SparseMatrix, id_column
from fullrank.retrieval.vectors.base import places_of
from fullrank.schema import Schema

# Users scored at once; a block holds a few matrices of so many columns and a row per user and item.
USERS_AT_ONCE = 64
# Extra columns and rounds of the randomised subspace iteration for the leading eigenvectors.
_EXTRA, _ROUNDS = 32, 4


class GraphFilter(Retriever):
    """Scores x (G + l A^-1/2 V V' A^1/2) (1 - w G) A^g, x being the user's row of the 0/1 matrix R of pairs.

    G ~ A^-1/2 R' C^-c R A^-1/2, with the items' numbers of pairs in A and the users' in C, passes what a user took on
    to the items that were taken along with it; divided by its largest eigenvalue, so that all lie in [0, 1]. With c
    below 1, users who took much say more of what goes together. V are its leading eigenvectors: what is common to many.
    1 - w G sharpens: it takes away what is popular in the whole neighbourhood. A^g gives some of the items' popularity
    back.

    A new user has the mean row of all, and a new item each user's mean score. Deviation: the first paper has c = 1,
    with which the largest eigenvalue is 1 by itself, and w = g = 0 (and l = 0.3 on Gowalla); the second sharpens by
    integrating a differential equation; here one step does.

    Source: Shen et al., How Powerful is Graph Convolution for Recommendation?, CIKM 2021; Choi et al., Blurring-
    Sharpening Process Models for Collaborative Filtering, SIGIR 2023.
    """

    class Config(Retriever.Config):
        """Hyper-parameters.

        Attributes:
            rank: number of leading eigenvectors.
            low_pass: l, the weight of their part.
            sharpening: w.
            popularity: g.
            user_power: c.
        """

        rank: int = Field(default=256, ge=1)
        low_pass: float = Field(default=0.1, ge=0)
        sharpening: float = Field(default=0.8, ge=0)
        popularity: float = Field(default=0.3, ge=0)
        user_power: float = Field(default=0.8, ge=0)

    name = "graph_filter"
    filters = True
    config: Config

    def __init__(self, schema: Schema, config: Config | None = None) -> None:
        super().__init__(schema, config)
        self._user_column, _ = id_column(schema, "user")
        self._item_column, _ = id_column(schema, "item")
        none = torch.zeros(0, dtype=torch.int64)
        self.pairs = Interactions(none, none, none, none)
        self.basis_IR, self.value_R = torch.zeros(0, self.config.rank), torch.zeros(self.config.rank)
        self._filter: _Filter | None = None
        # Keys in order, and the id of each.
        self.exact, self.ids_N = ExactIndex(0), none

    def fit(self, log: Dataset, *, progress: Progress | None = None) -> Self:
        """Keep the pairs of the training part of a log, and the leading eigenvectors of their graph.

        Raises:
            ValueError: if the log has no binary label or no positive row.
        """
        self.pairs = Interactions.of(log)
        self.basis_IR, self.value_R = _leading(_graph(self.pairs, self.config.user_power), self.config.rank)
        self._filter = _Filter(self.pairs, self.basis_IR, self.value_R, self.config)
        return self

    def scores(self, users: Batch) -> Tensor:
        """Of all items that have pairs, in the order of `pairs.item_ids_I`, shape (B, I)."""
        if self._filter is None:
            return torch.zeros(len(users), 0)
        place_B = places_of(users.ids_BF[:, self._user_column], self.pairs.user_ids_U)
        known_B = place_B >= 0
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
        place_N = places_of(self.ids_N, self.pairs.item_ids_I)
        parts = []
        for begin in range(0, max(len(users), 1), USERS_AT_ONCE):
            block = users[begin : begin + USERS_AT_ONCE]
            scores_BI = self.scores(block)
            scores_BN = torch.zeros(len(block), self.ids_N.numel())
            if scores_BI.numel():
                scores_BN = torch.where(place_N >= 0, scores_BI[:, place_N], scores_BI.mean(1, keepdim=True))
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
            "basis": self.basis_IR,
            "values": self.value_R,
            "index.keys": self.exact.keys_I,
            "index.items": self.ids_N,
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        pairs = Interactions(state["pairs.users"], state["pairs.items"], state["users"], state["items"])
        pairs.check()
        if state["basis"].shape[0] != pairs.items:
            raise ValueError(f"the basis has {state['basis'].shape[0]} items, and the pairs {pairs.items}")
        if pairs.items and not state["values"][0] > 0:
            raise ValueError("the largest eigenvalue is not above 0")
        if state["index.keys"].shape != state["index.items"].shape:
            raise ValueError(f"{len(state['index.keys'])} keys of items have {len(state['index.items'])} ids")
        self.pairs = pairs
        self.basis_IR, self.value_R = state["basis"], state["values"]
        self._filter = _Filter(pairs, self.basis_IR, self.value_R, self.config) if len(pairs) else None
        self.exact.add(state["index.keys"], torch.zeros(state["index.keys"].numel(), 0))
        self.ids_N = state["index.items"]


class _Filter:
    """The filter of some pairs, for rows that stand as columns."""

    def __init__(self, pairs: Interactions, basis_IR: Tensor, value_R: Tensor, config: GraphFilter.Config) -> None:
        top = value_R[0]
        self._graph = _graph(pairs, config.user_power, top)
        self._sharpening = config.sharpening
        self._root_I1 = pairs.per_item_I.sqrt()[:, None]
        self._popularity_I1 = pairs.per_item_I.pow(config.popularity)[:, None]
        self._basis_IR = basis_IR
        self._weight_R1 = (config.low_pass * (1 - config.sharpening * value_R / top))[:, None]

    def __call__(self, rows_IB: Tensor) -> Tensor:
        once_IB = _step(self._graph, rows_IB)
        scores_IB = once_IB - self._sharpening * _step(self._graph, once_IB)
        common_RB = self._weight_R1 * (self._basis_IR.T @ (rows_IB / self._root_I1))
        scores_IB += self._root_I1 * (self._basis_IR @ common_RB)
        return self._popularity_I1 * scores_IB


def _graph(pairs: Interactions, user_power: float, top: Tensor | float = 1.0) -> SparseMatrix:
    """C^-c/2 R A^-1/2 over the root of `top`."""
    of_user_P, of_item_P = pairs.per_user_U[pairs.user_P], pairs.per_item_I[pairs.item_P]
    return pairs.matrix((of_user_P.pow(user_power) * of_item_P * top).rsqrt())


def _step(graph: SparseMatrix, x_IB: Tensor) -> Tensor:
    return graph.transposed @ (graph @ x_IB)


def _leading(graph: SparseMatrix, rank: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors (I, R) of graph' graph and their eigenvalues (R,), largest first, 0 where it has no more.

    Source: Halko, Martinsson & Tropp, Finding Structure with Randomness, SIAM Review 2011, algorithm 4.4.
    """
    users, items = graph.shape
    width = min(rank + _EXTRA, users, items)
    basis_IR = torch.randn(items, width, generator=torch.Generator().manual_seed(0))
    for _ in range(_ROUNDS):
        basis_IR = torch.linalg.qr(_step(graph, basis_IR)).Q
    projected_UR = graph @ basis_IR
    value_R, rotation_RR = torch.linalg.eigh(projected_UR.T @ projected_UR)
    kept = min(rank, width)
    vectors_IR, values_R = torch.zeros(items, rank), torch.zeros(rank)
    vectors_IR[:, :kept] = basis_IR @ rotation_RR.flip(1)[:, :kept]
    values_R[:kept] = value_R.flip(0)[:kept].clamp_min(0)
    return vectors_IR, values_R
