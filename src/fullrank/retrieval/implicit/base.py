"""What the retrievers of implicit feedback share: a vector for each known user and item, learnt from pairs alone."""

# Shapes: B users of a batch, I items, U users, P pairs, D width of vectors.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.retrieval.base import Progress
from fullrank.retrieval.implicit.interactions import Interactions, id_column
from fullrank.retrieval.vector_retriever import VectorRetriever
from fullrank.schema import Schema


class ImplicitRetriever(VectorRetriever):
    """Score = u·v, with a vector for each user and each item that the log knows and no other feature than the two ids.

    Learns from the distinct (user, item) pairs of the rows whose first binary label is 1. A user or item without a pair
    (new since, or never positive) has the mean vector of the others: a new user gets what suits the average user, and a
    new item each user's mean score.
    """

    class Config(VectorRetriever.Config):
        """Hyper-parameters.

        Attributes:
            dim: width of the vectors.
            batch_size: users of a step, or pairs where the loss is of single pairs.
            epochs: passes over them.
            learning_rate: of Adam at the start; it falls to 0 linearly.
            embedding_init: standard deviation that vectors start with.
            l2: weight of half the squared length of a step's vectors before any propagation.
            seed: of initial vectors, of the order and of negatives.
        """

        dim: int = Field(default=64, ge=1)
        batch_size: int = Field(default=2048, ge=1)
        epochs: int = Field(default=20, ge=1)
        learning_rate: float = Field(default=0.01, gt=0)
        embedding_init: float = Field(default=0.1, gt=0)
        l2: float = Field(default=0.0, ge=0)
        seed: int = 0

    config: Config

    def __init__(self, schema: Schema, config: Config | None = None) -> None:
        super().__init__(schema, config)
        self._user_column, user = id_column(schema, "user")
        self._item_column, item = id_column(schema, "item")
        sizes = schema.tables()
        self._users, self._items = sizes[user.table_name], sizes[item.table_name]
        self.user_UD, self.item_ID = torch.zeros(0, self.width), torch.zeros(0, self.width)

    @property
    def width(self) -> int:
        """Width D of the vectors that are searched."""
        return self.config.dim

    @abstractmethod
    def learn(self, pairs: Interactions, progress: Progress | None) -> tuple[Tensor, Tensor]:
        """Vectors of the users (U, width) and of the items (I, width) of some pairs.

        Called with the global random state seeded; its former state comes back after.
        """

    def fit(self, log: Dataset, *, progress: Progress | None = None) -> Self:
        """Learn from the training part of a log.

        Raises:
            ValueError: if the log has no binary label or no positive row.
        """
        pairs = Interactions.of(log)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            user_UD, item_ID = self.learn(pairs, progress)
        self.user_UD = _by_id(user_UD, pairs.user_ids_U, self._users)
        self.item_ID = _by_id(item_ID, pairs.item_ids_I, self._items)
        return self

    def start(self, pairs: Interactions) -> tuple[Tensor, Tensor]:
        """Free vectors of users (U, dim) and items (I, dim) to begin with, which want gradients."""
        drawn = (torch.randn(rows, self.config.dim) for rows in (pairs.users, pairs.items))
        user_UD, item_ID = (self.config.embedding_init * vectors for vectors in drawn)
        return user_UD.requires_grad_(), item_ID.requires_grad_()

    def penalty(self, *vectors: Tensor) -> Tensor | float:
        """Weighted half of the mean squared length of the vectors of a step."""
        return self.config.l2 / 2 * sum(each.square().sum(1).mean() for each in vectors) if self.config.l2 else 0.0

    def user_vectors(self, users: Batch) -> Tensor:
        """Queries, shape (B, D)."""
        return _rows(self.user_UD, users.ids_BF[:, self._user_column])

    def item_vectors(self, items: Batch) -> Tensor:
        """What the index holds, shape (I, D)."""
        return _rows(self.item_ID, items.ids_BF[:, self._item_column])

    def state(self) -> dict[str, Tensor]:
        return {"users": self.user_UD, "items": self.item_ID, **super().state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, size in (("users", self._users), ("items", self._items)):
            rows = state[name].shape[0]
            if rows not in (0, size):
                raise ValueError(f"there are vectors of {rows} {name}, and the schema has {size}")
        self.user_UD, self.item_ID = state["users"], state["items"]
        super().restore(state)


def descend(
    tables: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    rows: int,
    config: ImplicitRetriever.Config,
    progress: Progress | None,
) -> None:
    """Adam on tables that want gradients, over shuffled batches of `rows` rows, the rate falling to 0 linearly.

    Args:
        loss: of the rows of a batch (B,).
    """
    optimizer = torch.optim.Adam(tables, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    per_epoch = -(-rows // config.batch_size)
    steps = config.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    step = 0
    for _ in range(config.epochs):
        for batch_B in torch.split(torch.randperm(rows), config.batch_size):
            value = loss(batch_B)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            step += 1
            if progress is not None and (step % 20 == 0 or step == steps):
                progress(step, steps, value.item())


def _by_id(vectors_ND: Tensor, ids_N: Tensor, size: int) -> Tensor:
    """Vectors as a table of all ids; those without one get the mean."""
    table = vectors_ND.mean(0).repeat(size, 1)
    table[ids_N] = vectors_ND
    return table


def _rows(vectors_ID: Tensor, ids_B: Tensor) -> Tensor:
    """Vectors of some rows; zero before anything was learnt."""
    if not vectors_ID.shape[0]:
        return vectors_ID.new_zeros(ids_B.numel(), vectors_ID.shape[1])
    return vectors_ID[ids_B]
