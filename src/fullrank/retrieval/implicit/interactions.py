"""Who took what: the distinct (user, item) pairs of a log, as positions in the tables of users and items."""

# Shapes: P pairs, U users, I items, B users of a batch, D width of vectors.

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import polars as pl
import torch
from torch import Tensor

from fullrank.data.dataset import Dataset
from fullrank.schema import FIRST_VOCABULARY_ID, Categorical, Schema

_SIDES: tuple[Literal["user"], Literal["item"]] = ("user", "item")


def id_column(schema: Schema, side: Literal["user", "item"]) -> tuple[int, Categorical]:
    """Which column of `Batch.ids_BF` says who the user (which the item) is, and that feature.

    Raises:
        ValueError: if the schema has no such key, or the key is none of its categorical features.
    """
    key = getattr(schema.keys, f"{side}_id")
    for place, feature in enumerate(schema.categorical):
        if feature.name == key:
            return place, feature
    what = "names no such key" if key is None else f'its key "{key}" is none of its categorical features'
    raise ValueError(f"learning from implicit feedback needs the {side}_id as a feature: the schema {what}")


@dataclass(frozen=True)
class Interactions:
    """Distinct pairs in order of users, then items. Users and items without a pair are none of it.

    Attributes:
        user_P, item_P: int64 positions among the users and items.
        user_ids_U, item_ids_I: encoded ids of these, ascending.
    """

    user_P: Tensor
    item_P: Tensor
    user_ids_U: Tensor
    item_ids_I: Tensor

    @classmethod
    def of(cls, log: Dataset, split: str = "train") -> Self:
        """Of the rows whose first binary label is 1 and whose ids are known.

        Raises:
            ValueError: if the log has no binary label, no such row, or not both ids as categorical features.
        """
        label = next((label.name for label in log.schema.labels if label.kind == "binary"), None)
        if label is None:
            raise ValueError(f"{log.path}: a retriever needs a binary label to learn from")
        features = [id_column(log.schema, side)[1] for side in _SIDES]
        names = [feature.name for feature in features]
        positive = pl.col(label) == 1
        for feature in features:
            if feature.encoding != "identity":  # the other encodings keep the first ids for what is unknown
                positive &= pl.col(feature.name) >= FIRST_VOCABULARY_ID
        pairs = log.scan(split).filter(positive).select(names).unique().sort(names).collect()
        if not pairs.height:
            raise ValueError(f'{log.path}: no row of "{split}" has {label} = 1 and both ids')
        user_P, item_P = (torch.from_numpy(pairs[name].cast(pl.Int64).to_numpy().copy()) for name in names)
        user_ids_U, user_P = torch.unique_consecutive(user_P, return_inverse=True)
        item_ids_I, item_P = torch.unique(item_P, return_inverse=True)
        return cls(user_P, item_P, user_ids_U, item_ids_I)

    def check(self) -> None:
        """Raises:
        ValueError: if the tensors contradict one another, as those of a damaged file may.
        """
        for name, ids in (("users", self.user_ids_U), ("items", self.item_ids_I)):
            if bool((ids[1:] <= ids[:-1]).any()):
                raise ValueError(f"the ids of the {name} of the pairs are not in order")
        if self.user_P.shape != self.item_P.shape:
            raise ValueError(f"the pairs have {self.user_P.numel()} users and {self.item_P.numel()} items")
        if len(self) and not (
            0 <= int(self.user_P.min()) <= int(self.user_P.max()) < self.users
            and 0 <= int(self.item_P.min()) <= int(self.item_P.max()) < self.items
            and bool((self._codes_P[1:] > self._codes_P[:-1]).all())
        ):
            raise ValueError("the pairs are not in order, or name a user or an item that is not there")

    def __len__(self) -> int:
        return self.user_P.numel()

    @property
    def users(self) -> int:
        return self.user_ids_U.numel()

    @property
    def items(self) -> int:
        return self.item_ids_I.numel()

    @cached_property
    def per_user_U(self) -> Tensor:
        """Number of pairs of each user, float32."""
        return torch.bincount(self.user_P, minlength=self.users).float()

    @cached_property
    def per_item_I(self) -> Tensor:
        """Number of pairs of each item, float32."""
        return torch.bincount(self.item_P, minlength=self.items).float()

    @cached_property
    def _begin_U1(self) -> Tensor:
        """Where each user's pairs begin."""
        return torch.searchsorted(self.user_P, torch.arange(self.users + 1))

    @cached_property
    def _codes_P(self) -> Tensor:
        return self.user_P * self.items + self.item_P

    def others(self, user_B: Tensor, rounds: int = 10) -> Tensor:
        """An item for each user, drawn evenly from those that the user did not take.

        Args:
            rounds: draws before a taken item is let pass, for users who took almost all.
        """
        item_B = torch.randint(self.items, user_B.shape)
        for _ in range(rounds):
            code_B = user_B * self.items + item_B
            place_B = torch.searchsorted(self._codes_P, code_B).clamp_max(len(self) - 1)
            taken_B = self._codes_P[place_B] == code_B
            again = int(taken_B.sum())
            if not again:
                break
            item_B[taken_B] = torch.randint(self.items, (again,))
        return item_B

    def of_users(self, user_B: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of some users: places in `user_B`, in order, and items."""
        first_B = self._begin_U1[user_B]
        count_B = self._begin_U1[user_B + 1] - first_B
        row_Q = torch.repeat_interleave(torch.arange(user_B.numel()), count_B)
        within_Q = torch.arange(row_Q.numel()) - (count_B.cumsum(0) - count_B)[row_Q]
        return row_Q, self.item_P[first_B[row_Q] + within_Q]

    def matrix(self, weights_P: Tensor) -> SparseMatrix:
        """The U x I matrix with these numbers where there are pairs."""
        return SparseMatrix.of(self.user_P, self.item_P, weights_P, (self.users, self.items))


@dataclass(frozen=True)
class SparseMatrix:
    """A constant sparse matrix and its transpose, both by rows, so that a product and its gradient are equally fast."""

    forward: Tensor
    backward: Tensor

    @classmethod
    def of(cls, row_P: Tensor, column_P: Tensor, value_P: Tensor, shape: tuple[int, int]) -> Self:
        """Of entries in order of rows, then columns."""
        order_P = column_P.sort(stable=True).indices
        transposed = (column_P[order_P], row_P[order_P], value_P[order_P], shape[::-1])
        return cls(_by_rows(row_P, column_P, value_P, shape), _by_rows(*transposed))

    @property
    def shape(self) -> torch.Size:
        return self.forward.shape

    @property
    def transposed(self) -> SparseMatrix:
        return SparseMatrix(self.backward, self.forward)

    def __matmul__(self, dense: Tensor) -> Tensor:
        product: Tensor = _Product.apply(dense, self)  # type: ignore[no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dense: Tensor, matrix: SparseMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.forward @ dense

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.backward @ gradients[0].contiguous(), None


def _by_rows(row_P: Tensor, column_P: Tensor, value_P: Tensor, shape: tuple[int, ...]) -> Tensor:
    offsets = torch.searchsorted(row_P, torch.arange(shape[0] + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        # 32-bit positions are what the multiplication kernels take without a copy.
        return torch.sparse_csr_tensor(
            offsets.int(), column_P.int(), value_P.float(), size=shape, check_invariants=False
        )
