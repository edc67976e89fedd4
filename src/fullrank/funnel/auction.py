"""What the shown items pay for a click: the price that each slot has in an auction of the candidates' bids."""

# Shapes: U users, C candidates of a user, K slots, N candidates that a slot's item competes with.

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from fullrank.funnel.rules import Rule, open_values


class AuctionConfig(BaseModel):
    """How shown items are priced. A price is for one unit of what the bid is for, such as a click.

    An item takes part if it bids the reserve or more and its value is not negative; a slot is rather left empty than
    given to another.

    Attributes:
        pricing: `first_price`: the bid. `second_price`: the least bid with which the item keeps its slot (generalised
            second price). `vcg`: the mean of the least bids for its slot and each one below, weighted by what the slots
            lose in effect (Vickrey, Clarke, Groves): bidding one's true value is then best.
        reserve: least bid, and least price.
        slot_effects: how much more often an item is clicked in each slot than in another, from above, not rising; the
            last holds for all slots below it. Asked by `vcg` alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pricing: Literal["first_price", "second_price", "vcg"] = "second_price"
    reserve: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    slot_effects: tuple[float, ...] = (1.0,)

    @field_validator("slot_effects")
    @classmethod
    def _falls(cls, effects: tuple[float, ...]) -> tuple[float, ...]:
        if not effects or not all(0 < effect < float("inf") for effect in effects):
            raise ValueError("expected positive numbers")
        if any(below > above for above, below in pairwise(effects)):
            raise ValueError("expected numbers that do not rise from one slot to the next")
        return effects


class Bids(NamedTuple):
    """Bids of candidates, and how the value depends on them: value = intercept + slope * bid.

    Attributes:
        bid_UC, intercept_UC, slope_UC: float64.
    """

    bid_UC: Tensor
    intercept_UC: Tensor
    slope_UC: Tensor


def bidders(auction: AuctionConfig, value_UC: Tensor, bid_UC: Tensor) -> Tensor:
    """The values, -inf for candidates that take no part."""
    return value_UC.masked_fill(~((bid_UC >= auction.reserve) & (value_UC >= 0)), -torch.inf)


def prices(
    auction: AuctionConfig, value_UC: Tensor, bids: Bids, places_UK: Tensor, rules: Sequence[Rule] = ()
) -> Tensor:
    """The price of each shown item.

    Each slot's item competes with the candidates that might stand there in its place, given the slots above. If one of
    those has a larger value, the item was shown to learn about it, and pays the reserve.

    Args:
        value_UC: of those that take part, see `bidders`.
        places_UK: columns of the shown candidates, uppermost first; -1 in an empty slot.

    Returns:
        float64, shape (U, K); never above the bid or below the reserve, NaN in an empty slot.
    """
    slots = places_UK.shape[1]
    price_UK = torch.full(places_UK.shape, torch.nan, dtype=torch.float64)
    effects = [auction.slot_effects[min(slot, len(auction.slot_effects) - 1)] for slot in range(slots)]
    for slot in range(slots):
        empty_U1 = places_UK[:, slot : slot + 1] < 0
        place_U1 = places_UK[:, slot : slot + 1].clamp_min(0)
        bid_U1, intercept_U1, slope_U1 = (part.gather(1, place_U1) for part in bids)
        if auction.pricing == "first_price":
            price_UK[:, slot : slot + 1] = bid_U1.masked_fill(empty_U1, torch.nan)
            continue
        # What each slot loses against the next; from the lowest one falls to nothing.
        losses = torch.tensor([1.0], dtype=torch.float64)
        if auction.pricing == "vcg":
            kept = torch.tensor([*effects[slot:], 0.0], dtype=torch.float64)
            losses = (kept[:-1] - kept[1:]) / kept[0]
        open_UC = open_values(value_UC, places_UK[:, :slot], rules)
        others_UC = open_UC.scatter(1, place_U1, -torch.inf)
        explored_U1 = open_UC.gather(1, place_U1) < others_UC.amax(1, keepdim=True)
        best_UN = others_UC.double().topk(min(len(losses), others_UC.shape[1]), 1).values
        # Nobody stands below the last candidate: an empty slot is worth nothing.
        best_UN = F.pad(best_UN.clamp_min(0.0), (0, len(losses) - best_UN.shape[1]))
        least_UN = torch.where(slope_U1 > 0, (best_UN - intercept_U1) / slope_U1, 0.0).clamp_min(auction.reserve)
        price_U1 = (least_UN * losses).sum(1, keepdim=True).masked_fill(explored_U1, auction.reserve)
        price_UK[:, slot : slot + 1] = price_U1.minimum(bid_U1).masked_fill(empty_U1, torch.nan)
    return price_UK
