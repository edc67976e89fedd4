"""What a funnel makes of its final stage's values: the section `slate`, with the catalogue and the model at hand."""

# Shapes: U users, I items, C candidates of a user, T tasks, K slots, E items that were shown before.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.funnel.auction import Bids, bidders, prices
from fullrank.funnel.catalogue import NO_ROW, Catalogue
from fullrank.funnel.policies import Greedy, SlotPolicy
from fullrank.funnel.requests import Shown
from fullrank.funnel.rules import AtMost, open_values
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.slate import SlateConfig, fill
from fullrank.funnel.value import ValueFormula
from fullrank.schema import FIRST_VOCABULARY_ID, MISSING_ID, Schema

# Number of no group: see `AtMost`.
NO_GROUP = -1
# Predictions at which the value has to rise with the bid.
PROBES = 64


class PricedSlate(NamedTuple):
    """A `Slate`, and what its items pay; None without an auction."""

    places_UK: Tensor
    propensity_UK: Tensor
    payment_UK: Tensor | None


class SlateMaker:
    """Fills slates as a `SlateConfig` says.

    Raises:
        ValueError: see `check_slate`.
    """

    def __init__(self, config: SlateConfig, items: Catalogue, scorer: Scorer) -> None:
        check_slate(config, scorer.schema, scorer.value)
        self.config, self.items, self.scorer = config, items, scorer
        self.policy = config.policy.build()
        self._greedy = Greedy()
        counted_by = {rule.by for rule in config.diversity} | {cap.by for cap in config.frequency}
        self._group_I = {by: self._groups(by) for by in counted_by}

    def __call__(
        self,
        value_UC: Tensor,
        logits_UCT: Tensor,
        items_UC: Tensor,
        k: int,
        *,
        shown: Sequence[Sequence[Shown]] | None = None,
        generator: torch.Generator | None = None,
    ) -> PricedSlate:
        """Lists of up to k of the candidates.

        Args:
            items_UC: rows of the catalogue.
            shown: to each user.
            generator: of the draws; None shows the largest values whatever the policy is.
        """
        policy = self._greedy if generator is None else self.policy
        auction = self.config.auction
        rules = self._rules(items_UC, shown)
        open_UC, spread_UC = self._offered(policy, value_UC, logits_UCT, items_UC)
        slate = fill(open_UC, k, policy=policy, rules=rules, spread_UC=spread_UC, generator=generator)
        if auction is None:
            return PricedSlate(*slate, None)
        return PricedSlate(*slate, prices(auction, open_UC, self._bids(logits_UCT, items_UC), slate.places_UK, rules))

    def distributions(
        self, value_UC: Tensor, logits_UCT: Tensor, items_UC: Tensor, places_UK: Tensor
    ) -> Iterator[Tensor]:
        """What the item of each slot of given lists is drawn from, given those above it; shape (U, C) for each slot.

        Args:
            items_UC: rows of the catalogue.
            places_UK: columns of the candidates, -1 for an item that is none of them, and for none.
        """
        open_UC, spread_UC = self._offered(self.policy, value_UC, logits_UCT, items_UC)
        rules = self._rules(items_UC, None)
        for slot in range(places_UK.shape[1]):
            yield self.policy.probabilities(open_values(open_UC, places_UK[:, :slot], rules), spread_UC, slot)

    def _offered(
        self, policy: SlotPolicy, value_UC: Tensor, logits_UCT: Tensor, items_UC: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The values of those that may be shown at all, and their spread where the policy asks for it."""
        bid_I, spread_UC = self.items.bid_I, None
        if policy.pseudo_counts is not None:
            spread_UC = self.scorer.spreads(
                logits_UCT, None if bid_I is None else bid_I[items_UC], policy.pseudo_counts
            )
        if self.config.auction is not None:
            assert bid_I is not None
            value_UC = bidders(self.config.auction, value_UC, bid_I[items_UC].double())
        return value_UC, spread_UC

    def _bids(self, logits_UCT: Tensor, items_UC: Tensor) -> Bids:
        assert self.items.bid_I is not None
        bid_UC = self.items.bid_I[items_UC].double()
        none_UC, logits_UCT = torch.zeros_like(bid_UC), logits_UCT.double()
        intercept_UC = self.scorer.values(logits_UCT, none_UC)
        return Bids(bid_UC, intercept_UC, self.scorer.values(logits_UCT, none_UC + 1) - intercept_UC)

    def _groups(self, by: str | None) -> Tensor:
        """The group of each item; each by itself where it is the item that is counted."""
        schema = self.scorer.schema
        if by is None or by == schema.keys.item_id:
            return torch.arange(len(self.items))
        place = [feature.name for feature in schema.categorical].index(by)
        id_I = self.items.rows.batch.ids_BF[:, place].long()
        # Ids that stand for no value: missing, and in a vocabulary unknown.
        first = {"vocabulary": FIRST_VOCABULARY_ID, "identity": 0}
        return id_I.masked_fill(id_I < first.get(schema.categorical[place].encoding, MISSING_ID + 1), NO_GROUP)

    def _rules(self, items_UC: Tensor, shown: Sequence[Sequence[Shown]] | None) -> list[AtMost]:
        rules = []
        for diversity in self.config.diversity:
            group_UC = self._of(diversity.by, items_UC)
            rules.append(AtMost(group_UC, diversity.at_most, slots=diversity.slots))
        for cap in self.config.frequency:
            group_UC = self._of(cap.by, items_UC)
            before_UC = None if shown is None else self._before(cap.by, cap.seconds, group_UC, shown)
            rules.append(AtMost(group_UC, cap.at_most, before_UC=before_UC, hard=True))
        return rules

    def _of(self, by: str | None, items_UC: Tensor) -> Tensor:
        return self._group_I[by][items_UC].masked_fill(items_UC == NO_ROW, NO_GROUP)

    def _before(
        self, by: str | None, seconds: float | None, group_UC: Tensor, shown: Sequence[Sequence[Shown]]
    ) -> Tensor:
        """How often each candidate's group was shown to the user."""
        pairs = [
            (user, item.item_id)
            for user, items in enumerate(shown)
            for item in items
            if seconds is None or item.seconds_ago <= seconds
        ]
        row_E = self.items.find([name for _, name in pairs])
        user_E = torch.tensor([user for user, _ in pairs], dtype=torch.int64)[row_E != NO_ROW]
        row_E = row_E[row_E != NO_ROW]
        if not len(row_E):
            return torch.zeros_like(group_UC)
        # A number for each user and group: groups numbered among those of the candidates and of what was shown.
        groups, number = torch.unique(torch.cat([group_UC.flatten(), self._group_I[by][row_E]]), return_inverse=True)
        number_UC, number_E = number[: group_UC.numel()].view_as(group_UC), number[group_UC.numel() :]
        seen_E = (user_E * len(groups) + number_E).sort().values
        key_UC = torch.arange(len(group_UC))[:, None] * len(groups) + number_UC
        return torch.searchsorted(seen_E, key_UC, right=True) - torch.searchsorted(seen_E, key_UC)


def check_slate(config: SlateConfig, schema: Schema, value: ValueFormula) -> None:
    """Raises:
    ValueError: if a rule counts by what is no feature of items with one id, or the auction has no bids, or a value
        formula from which no price follows.
    """
    known = [feature.name for feature in schema.categorical if feature.role == "item"]
    for field, rules in (("diversity", config.diversity), ("frequency", config.frequency)):
        for rule in rules:
            if rule.by is not None and rule.by != schema.keys.item_id and rule.by not in known:
                expected = ", ".join(known) or "(none)"
                raise ValueError(
                    f'slate.{field}.by: "{rule.by}" is no single-id feature of items; there are {expected}'
                )
    if config.auction is None:
        return
    if schema.keys.bid is None:
        raise ValueError("slate.auction: the schema names no column of bids among its keys")
    if not value.is_affine("bid"):
        raise ValueError(f'slate.auction: the value formula "{value.text}" is not linear in the bid')
    generator = torch.Generator().manual_seed(0)
    columns = {label.name: torch.rand(PROBES, generator=generator, dtype=torch.float64) for label in schema.labels}
    none = torch.zeros(PROBES, dtype=torch.float64)
    slope = value({**columns, "bid": none + 1}) - value({**columns, "bid": none})
    if not bool((slope >= 0).all() and (slope > 0).any()):
        raise ValueError(f'slate.auction: the value formula "{value.text}" does not rise with the bid')
