"""The lists that a funnel makes, and what it is told of whom they are for."""

# Shapes: U users, I items, C candidates of a user, T tasks, K results, E excluded items.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank.funnel.catalogue import NO_ROW
from fullrank.funnel.requests import Shown
from fullrank.funnel.scorer import ScoredItem
from fullrank.funnel.stages import FINAL, RETRIEVAL


class Ranking(NamedTuple):
    """Candidates of each user as rows of the item catalogue, best first, and what each stage thought.

    A user may have fewer than another: behind the last stand `NO_ROW`, a value of -inf and predictions of NaN.

    Attributes:
        items_UK: rows of the catalogue.
        value_UK: by the final stage; -inf where the formula gave no number, NaN where the stage did not come to the
            item.
        probabilities_UKT: of binary tasks; predictions of regression tasks; NaN where the final stage gave none.
        passed: by the name of each stage but the final one, the rows that it handed on, in its order, shape (U, C).
        cost_U: items that retrieval scored.
        propensity_UK: probability that the item of a slot was drawn with, see `Slate`; 1 where nothing was drawn.
        payment_UK: what the items pay, see `fullrank.funnel.auction`; NaN where there is none, None without an auction.
        degraded: of each stage that did not do all its work for some user, whether it was so for each, shape (U,).
    """

    items_UK: Tensor
    value_UK: Tensor
    probabilities_UKT: Tensor
    passed: dict[str, Tensor]
    cost_U: Tensor
    propensity_UK: Tensor
    degraded: dict[str, Tensor]
    payment_UK: Tensor | None = None

    @property
    def retrieved_UC(self) -> Tensor:
        """What retrieval handed on."""
        return self.passed[RETRIEVAL]

    @property
    def kept_UC(self) -> Tensor:
        """What the final stage was handed."""
        return next(reversed(self.passed.values()))

    def counts(self) -> list[dict[str, int]]:
        """How many candidates each stage looked at, for each user."""
        handed = {RETRIEVAL: self.cost_U.tolist()}
        for stage, rows_UC in zip([*list(self.passed)[1:], FINAL], self.passed.values(), strict=True):
            all_there = is_whole(rows_UC)
            handed[stage] = [rows_UC.shape[1]] * len(rows_UC) if all_there else (rows_UC != NO_ROW).sum(1).tolist()
        return [dict(zip(handed, numbers, strict=True)) for numbers in zip(*handed.values(), strict=True)]

    def degradations(self) -> list[list[str]]:
        """The stages that did not do all their work, for each user."""
        return [[stage for stage, late_U in self.degraded.items() if late_U[row]] for row in range(len(self.items_UK))]


class Terms(NamedTuple):
    """Which items may be recommended. They hold in retrieval: no list is shorter while there are others to recommend.

    Attributes:
        shown: what each user has been shown, for frequency caps.
        excluded_UE: rows of the catalogue that are not recommended to each user, `NO_ROW` behind the last.
        allowed_I: whether each row of the catalogue may be recommended, to all users.
    """

    shown: Sequence[Sequence[Shown]] | None = None
    excluded_UE: Tensor | None = None
    allowed_I: Tensor | None = None

    def of(self, users: slice) -> Terms:
        """Those of some users."""
        shown = None if self.shown is None else self.shown[users]
        return Terms(shown, None if self.excluded_UE is None else self.excluded_UE[users], self.allowed_I)

    def out(self, rows_UC: Tensor) -> Tensor:
        """Which rows of the catalogue are excluded, or none, bool of shape (U, C)."""
        out_UC = rows_UC == NO_ROW
        if self.excluded_UE is not None:
            excluded = [torch.isin(*each) for each in zip(rows_UC, self.excluded_UE, strict=True)]
            out_UC = out_UC | torch.stack(excluded)
        return out_UC

    def left(self, rows_UC: Tensor, count: int) -> Tensor:
        """The first rows of the catalogue that are not excluded, `NO_ROW` behind the last."""
        more = 0 if self.excluded_UE is None else self.excluded_UE.shape[1]
        rows_UC = rows_UC[:, : count + more]
        if not more:
            return rows_UC
        order_UC, none_UC = in_front(~self.out(rows_UC), count)
        return rows_UC.gather(1, order_UC).masked_fill(none_UC, NO_ROW)


@dataclass(frozen=True)
class RankedItem(ScoredItem):
    """An item of a list.

    Attributes:
        propensity: probability that it was drawn with, given the items above; what off-policy estimates need.
        payment: for one unit of what the bid is for, such as a click; None without an auction.
    """

    propensity: float
    payment: float | None = None


@dataclass(frozen=True)
class Recommendation:
    """A ranked list.

    Attributes:
        items: best first. One that the final stage did not come to has no value and no predictions, and stands behind.
        candidates: how many each stage was handed.
        degraded: stages that were late or failed, so that the order of the stage before stands in for theirs.
    """

    items: list[RankedItem]
    candidates: dict[str, int]
    degraded: tuple[str, ...] = ()


def in_front(kept_UC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first places that are kept, in their order, up to `count`, and where there is none behind the last."""
    order_UC = (~kept_UC).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    return order_UC, ~kept_UC.gather(1, order_UC)


def is_whole(items_UC: Tensor) -> bool:
    """Whether there is an item in every place, as with an exact index: nothing has to be left out then."""
    return not items_UC.numel() or int(items_UC.min()) != NO_ROW


@torch.inference_mode()
def below(parts: Sequence[Ranking]) -> Ranking:
    """Rankings of some users, then of others."""

    def joined(tensors: Sequence[Tensor], filler: float) -> Tensor:
        width = max(tensor.shape[1] for tensor in tensors)
        return torch.cat([F.pad(t, (*(0, 0) * (t.ndim - 2), 0, width - t.shape[1]), value=filler) for t in tensors])

    payments = [part.payment_UK for part in parts if part.payment_UK is not None]
    return Ranking(
        joined([part.items_UK for part in parts], NO_ROW),
        joined([part.value_UK for part in parts], -torch.inf),
        joined([part.probabilities_UKT for part in parts], torch.nan),
        {stage: joined([part.passed[stage] for part in parts], NO_ROW) for stage in parts[0].passed},
        torch.cat([part.cost_U for part in parts]),
        joined([part.propensity_UK for part in parts], 1.0),
        {
            stage: torch.cat(
                [part.degraded.get(stage, torch.zeros(len(part.cost_U), dtype=torch.bool)) for part in parts]
            )
            for stage in dict.fromkeys(stage for part in parts for stage in part.degraded)
        },
        None if not payments else joined(payments, torch.nan),
    )
