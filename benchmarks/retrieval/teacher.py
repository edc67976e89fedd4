"""A world in which a user is several interests and likes what any one of them is near to: no inner product says that."""

# Shapes: U users, V items, H interests, D width, P rows.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.batch import Batch, RowGather
from fullrank.retrieval.hierarchy.training import TrainingData
from fullrank.retrieval.pairing import Pairing
from fullrank.schema import Label, Numeric, Schema

INTERESTS, WIDTH = 6, 16
# Of features: numbers of variance 1.
SCALE = WIDTH**0.5
# Items are drawn around so many centres.
CENTRES = 200
# Items that a user sees together, of which one is chosen by softmax of SHARPNESS x affinity.
SHOWN, SHARPNESS = 64, 20.0


def schema() -> Schema:
    user = [f"u{i}" for i in range(INTERESTS * WIDTH)]
    item = [f"v{i}" for i in range(WIDTH)]
    return Schema(
        features=(
            *(Numeric(name=name, role="user", transform="none", encoding="scalar") for name in user),
            *(Numeric(name=name, role="item", transform="none", encoding="scalar") for name in item),
        ),
        labels=(Label(name="click"),),
    )


def numbers(values: Tensor, before: int, after: int) -> Batch:
    """Rows whose numeric columns are these, behind and before columns of 0."""
    rows = len(values)
    none = torch.zeros(0, rows, dtype=torch.int64)
    return Batch(
        numeric_BN=torch.nn.functional.pad(values, (before, after)),
        ids_BF=torch.zeros(rows, 0, dtype=torch.int64),
        jagged_keys=(),
        jagged_values=torch.zeros(0, dtype=torch.int64),
        jagged_lengths_KB=none,
        event_keys=(),
        event_values=torch.zeros(0),
        event_lengths_EB=none,
        labels_BT=torch.full((rows, 1), torch.nan),
    )


@dataclass(frozen=True)
class World:
    """Items, and users as they come.

    Attributes:
        items_VD: unit vectors around centres.
    """

    items_VD: Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, items: int, seed: int) -> World:
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(CENTRES, WIDTH, generator=generator)
        near = centres[torch.randint(0, CENTRES, (items,), generator=generator)]
        vectors = near + 0.6 * torch.randn(items, WIDTH, generator=generator)
        return cls(torch.nn.functional.normalize(vectors, dim=1), generator)

    def users(self, count: int) -> Tensor:
        """Interests near items drawn at random, (U, H, D)."""
        near = self.items_VD[torch.randint(0, len(self.items_VD), (count, INTERESTS), generator=self.generator)]
        noisy = near + 0.15 * torch.randn(count, INTERESTS, WIDTH, generator=self.generator)
        return torch.nn.functional.normalize(noisy, dim=2)

    def affinity(self, users_UHD: Tensor, items_VD: Tensor) -> Tensor:
        """max_h of interest and item, (U, V)."""
        best = users_UHD[:, 0] @ items_VD.T
        for head in range(1, INTERESTS):
            torch.maximum(best, users_UHD[:, head] @ items_VD.T, out=best)
        return best

    def features(self) -> Batch:
        return numbers(SCALE * self.items_VD, INTERESTS * WIDTH, 0)

    @staticmethod
    def user_features(users_UHD: Tensor) -> Batch:
        return numbers(SCALE * users_UHD.flatten(1), 0, WIDTH)

    def log(self, rows: int) -> TrainingData:
        """Rows of users who chose one item of those shown (label 1), and as many of an item drawn alike (label 0)."""
        users, chosen = [], []
        for begin in range(0, rows // 2, 8192):
            some = self.users(min(8192, rows // 2 - begin))
            shown = torch.randint(0, len(self.items_VD), (len(some), SHOWN), generator=self.generator)
            affinity = torch.einsum("uhd,usd->uhs", some, self.items_VD[shown]).amax(1)
            pick = torch.multinomial(torch.softmax(SHARPNESS * affinity, 1), 1, generator=self.generator)
            users.append(some)
            chosen.append(shown.gather(1, pick).squeeze(1))
        users_UHD = torch.cat(users).repeat_interleave(2, 0)
        positive = torch.cat(chosen)
        other = torch.randint(0, len(self.items_VD), (len(positive),), generator=self.generator)
        item_P = torch.stack([positive, other], 1).flatten()
        items = RowGather(self.features())
        pairing, user_rows = Pairing.of(schema()), RowGather(self.user_features(users_UHD))
        batch = pairing(user_rows, torch.arange(len(item_P)), items, item_P)
        labels = torch.tensor([1.0, 0.0]).repeat(len(positive))[:, None]
        labelled = Batch(**{**vars(batch), "labels_BT": labels})
        return TrainingData(RowGather(labelled), item_P, items)
