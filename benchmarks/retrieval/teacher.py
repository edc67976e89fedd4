"""A world in which a user has a taste of its own for each kind of items: no inner product of two vectors says that."""

# Shapes: U users, V items, H kinds of items, D width, P rows.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.batch import Batch, RowGather
from fullrank.retrieval.hierarchy.training import TrainingData
from fullrank.retrieval.pairing import Pairing
from fullrank.schema import Label, Numeric, Schema

KINDS, WIDTH = 6, 16
# Of features: numbers of variance 1.
SCALE = WIDTH**0.5
# Items are drawn around so many centres, this far from them (centres are 1 apart from 0 in each number).
CENTRES = 200
SPREAD = 1.0
# Items that a user sees together, of which one is chosen by softmax of SHARPNESS x affinity.
SHOWN, SHARPNESS = 256, 40.0


def schema() -> Schema:
    user = [f"u{i}" for i in range(KINDS * WIDTH)]
    item = [f"v{i}" for i in range(WIDTH + KINDS)]
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
        kind_V: of each item; that of its centre.
    """

    items_VD: Tensor
    kind_V: Tensor
    generator: torch.Generator

    @classmethod
    def of(cls, items: int, seed: int) -> World:
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(CENTRES, WIDTH, generator=generator)
        centre_V = torch.randint(0, CENTRES, (items,), generator=generator)
        vectors = centres[centre_V] + SPREAD * torch.randn(items, WIDTH, generator=generator)
        return cls(torch.nn.functional.normalize(vectors, dim=1), centre_V % KINDS, generator)

    def users(self, count: int) -> Tensor:
        """Tastes, each near an item of its kind that is drawn at random, (U, H, D)."""
        tastes = []
        for kind in range(KINDS):
            own = self.items_VD[self.kind_V == kind]
            near = own[torch.randint(0, len(own), (count,), generator=self.generator)]
            tastes.append(near + 0.15 * torch.randn(count, WIDTH, generator=self.generator))
        return torch.nn.functional.normalize(torch.stack(tastes, 1), dim=2)

    def affinity(self, users_UHD: Tensor) -> Tensor:
        """Taste for the kind of an item times the item, (U, V)."""
        found_UV = torch.empty(len(users_UHD), len(self.items_VD))
        for kind in range(KINDS):
            own_V = self.kind_V == kind
            found_UV[:, own_V] = users_UHD[:, kind] @ self.items_VD[own_V].T
        return found_UV

    def features(self) -> Batch:
        kinds_VH = torch.nn.functional.one_hot(self.kind_V, KINDS)
        return numbers(torch.cat([SCALE * self.items_VD, 2.0 * kinds_VH], 1), KINDS * WIDTH, 0)

    @staticmethod
    def user_features(users_UHD: Tensor) -> Batch:
        return numbers(SCALE * users_UHD.flatten(1), 0, WIDTH + KINDS)

    def log(self, rows: int) -> TrainingData:
        """Rows of users who chose one item of those shown (label 1), and as many of an item drawn alike (label 0)."""
        users, chosen = [], []
        for begin in range(0, rows // 2, 2048):
            some = self.users(min(2048, rows // 2 - begin))
            shown = torch.randint(0, len(self.items_VD), (len(some), SHOWN), generator=self.generator)
            taste_USD = some.gather(1, self.kind_V[shown][:, :, None].expand(-1, -1, WIDTH))
            affinity = (taste_USD * self.items_VD[shown]).sum(2)
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
