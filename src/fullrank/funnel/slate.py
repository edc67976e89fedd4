"""From the values of candidates to a list, slot by slot, with the probability that each item was drawn with."""

# Shapes: U users, C candidates of a user, K slots, S slots above one.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from fullrank.funnel.auction import AuctionConfig
from fullrank.funnel.policies import Greedy, PolicySpec, SlotPolicy
from fullrank.funnel.rules import EMPTY, AtMost, Rule, open_values
from fullrank.retrieval.base import check_k
from fullrank.retrieval.exact import top_k

__all__ = [
    "AtMost",
    "AuctionConfig",
    "Diversity",
    "Frequency",
    "PolicySpec",
    "Rule",
    "Slate",
    "SlateConfig",
    "SlotPolicy",
    "fill",
    "propensities",
]


class Diversity(BaseModel):
    """At most so many items of one kind among neighbouring slots.

    Left out for a slot in which it would leave no item: the list is as long as without it.

    Attributes:
        by: a feature of items with one id, such as their category. Items that lack it, or whose value the vocabulary
            does not have, are not counted.
        at_most: how many items of one value.
        slots: neighbouring slots that are looked at; null looks at the whole list.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str
    at_most: int = Field(ge=1)
    slots: int | None = Field(default=None, ge=2)


class Frequency(BaseModel):
    """At most so many impressions of one item, or of one kind of items, to one user.

    Counts what the request says was shown, and the slots above. Where a request does not say what was shown, the list
    alone is counted. An item that is capped is not shown, though the list gets shorter.

    Attributes:
        by: a feature of items with one id, such as their campaign; null caps each item by itself.
        at_most: how many impressions.
        seconds: older impressions do not count; null counts all that the request names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str | None = None
    at_most: int = Field(ge=1)
    seconds: float | None = Field(default=None, gt=0)


def _listed(value: Any) -> Any:
    """One rule may stand alone."""
    return [value] if isinstance(value, Mapping | Diversity | Frequency) else value


class SlateConfig(BaseModel):
    """How a list is made of the final stage's values: the section `slate` of a funnel.

    Attributes:
        policy: who gets a slot: `greedy`, `epsilon`, `softmax` or `thompson`, with its parameters.
        diversity: at most so many of a kind; one or several.
        frequency: at most so many impressions to a user; one or several.
        auction: prices what is shown; null has no prices.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: PolicySpec = PolicySpec.of("greedy")
    diversity: Annotated[tuple[Diversity, ...], BeforeValidator(_listed)] = ()
    frequency: Annotated[tuple[Frequency, ...], BeforeValidator(_listed)] = ()
    auction: AuctionConfig | None = None

    @model_validator(mode="after")
    def _vcg_sorts(self) -> Self:
        by_group = self.diversity or any(cap.by is not None for cap in self.frequency)
        if self.auction is not None and self.auction.pricing == "vcg" and by_group:
            raise ValueError(
                "vcg prices a list in the order of values: leave out what counts by a feature, or take second_price"
            )
        return self


class Slate(NamedTuple):
    """Lists of candidates.

    Attributes:
        places_UK: columns of the candidates, uppermost first; -1 in the slots behind the last item.
        propensity_UK: float64, the probability that the item of a slot was drawn with, given those above; 1 in an empty
            slot, which leaves no choice.
    """

    places_UK: Tensor
    propensity_UK: Tensor


def fill(
    value_UC: Tensor,
    k: int,
    *,
    policy: SlotPolicy,
    rules: Sequence[Rule] = (),
    spread_UC: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Slate:
    """Draw lists of up to k items, or of all candidates if k is larger; those of one user differ.

    Args:
        value_UC: -inf is no candidate.
        spread_UC: standard deviations of the values, for a policy that asks for them.
        generator: of the draws; default torch's own.

    Raises:
        ValueError: if k is below 1.
    """
    check_k(k)
    if isinstance(policy, Greedy) and not rules:
        best_UK, places_UK = top_k(value_UC, k)
        places_UK = places_UK.masked_fill(best_UK == -torch.inf, EMPTY)
        return Slate(places_UK, torch.ones(places_UK.shape, dtype=torch.float64))
    count_U, count_C = value_UC.shape
    slots = min(k, count_C)
    places_UK = torch.full((count_U, slots), EMPTY)
    propensity_UK = torch.ones(count_U, slots, dtype=torch.float64)
    for slot in range(slots):
        open_UC = open_values(value_UC, places_UK[:, :slot], rules)
        probability_UC = policy.probabilities(open_UC, spread_UC, slot)
        none_U1 = ~(open_UC > -torch.inf).any(1, keepdim=True)
        place_U1 = torch.multinomial(probability_UC.masked_fill(none_U1, 1.0), 1, generator=generator)
        places_UK[:, slot : slot + 1] = place_U1.masked_fill(none_U1, EMPTY)
        propensity_UK[:, slot : slot + 1] = probability_UC.gather(1, place_U1).masked_fill(none_U1, 1.0)
    return Slate(places_UK, propensity_UK)


def propensities(
    value_UC: Tensor,
    places_UK: Tensor,
    *,
    policy: SlotPolicy,
    rules: Sequence[Rule] = (),
    spread_UC: Tensor | None = None,
) -> Tensor:
    """The probability of each item of given lists under a policy, given the items above it in its list.

    Args:
        places_UK: as in `Slate`; an item that the rules or the values forbid has the probability 0.

    Returns:
        float64, shape (U, K); 1 in an empty slot.
    """
    result_UK = torch.ones(places_UK.shape, dtype=torch.float64)
    for slot in range(places_UK.shape[1]):
        open_UC = open_values(value_UC, places_UK[:, :slot], rules)
        probability_UC = policy.probabilities(open_UC, spread_UC, slot)
        place_U1 = places_UK[:, slot : slot + 1]
        own_U1 = probability_UC.gather(1, place_U1.clamp_min(0))
        result_UK[:, slot : slot + 1] = own_U1.masked_fill(place_U1 == EMPTY, 1.0)
    return result_UK
