"""Facts about the prices of an auction, against brute force over bids and over lists."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fullrank.funnel.auction import AuctionConfig, Bids, bidders, prices
from fullrank.funnel.policies import Greedy, PolicySpec
from fullrank.funnel.slate import AtMost, SlateConfig, fill

SLOTS = 3
EFFECTS = (1.0, 0.6, 0.25)


def auction(pricing: str, reserve: float = 0.0) -> AuctionConfig:
    return AuctionConfig.model_validate({"pricing": pricing, "reserve": reserve, "slot_effects": EFFECTS})


def market(users: int, candidates: int, seed: int = 0) -> Bids:
    """Values a + b bid, of which a is negative, as what hides cost, or positive."""
    source = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(users, candidates, generator=source, dtype=torch.float64)

    return Bids(uniform(0.1, 3), uniform(-0.3, 0.1), uniform(0.05, 0.9))


def run(config: AuctionConfig, bids: Bids, group_UC: Tensor | None = None, k: int = SLOTS) -> tuple[Tensor, Tensor]:
    """Places and prices of greedy lists."""
    value_UC = bidders(config, bids.intercept_UC + bids.slope_UC * bids.bid_UC, bids.bid_UC)
    rules = [] if group_UC is None else [AtMost(group_UC, 1, slots=2)]
    places_UK = fill(value_UC, k, policy=Greedy(), rules=rules).places_UK
    return places_UK, prices(config, value_UC, bids, places_UK, rules)


def with_bid(bids: Bids, candidate: int, bid: Tensor | float) -> Bids:
    changed = bids.bid_UC.clone()
    changed[:, candidate] = bid
    return bids._replace(bid_UC=changed)


def slot_of(places_UK: Tensor, candidate: int) -> Tensor:
    """The candidate's slot, as many as there are if it has none."""
    found_UK = places_UK == candidate
    return torch.where(found_UK.any(1), found_UK.int().argmax(1), places_UK.shape[1])


def outcome(config: AuctionConfig, bids: Bids, candidate: int, k: int = SLOTS) -> tuple[Tensor, Tensor]:
    """Effect of the slot that a candidate gets, 0 without one, and its price."""
    places_UK, price_UK = run(config, bids, k=k)
    slot_U = slot_of(places_UK, candidate)
    effect_U = torch.tensor([*EFFECTS[:k], 0.0], dtype=torch.float64)[slot_U]
    return effect_U, torch.cat([price_UK, torch.zeros(len(price_UK), 1)], 1).gather(1, slot_U[:, None])[:, 0]


@pytest.mark.parametrize("diverse", [False, True])
@pytest.mark.parametrize("reserve", [0.0, 0.8])
def test_a_second_price_is_the_least_bid_that_keeps_the_slot(reserve: float, diverse: bool) -> None:
    bids, config = market(60, 6), auction("second_price", reserve)
    group_UC = torch.arange(6).remainder(2).expand(60, -1) if diverse else None
    places_UK, price_UK = run(config, bids, group_UC)
    assert int((places_UK >= 0).sum()) > 100
    for candidate in range(6):
        slot_U = slot_of(places_UK, candidate)
        shown_U = slot_U < SLOTS
        price_U = price_UK.gather(1, slot_U.clamp_max(SLOTS - 1)[:, None])[:, 0]
        assert bool((price_U[shown_U] <= bids.bid_UC[shown_U, candidate]).all())
        assert bool((price_U[shown_U] >= reserve).all())
        above = run(config, with_bid(bids, candidate, price_U + 1e-9), group_UC)[0]
        assert torch.equal(slot_of(above, candidate)[shown_U], slot_U[shown_U])
        below = run(config, with_bid(bids, candidate, (price_U - 1e-9).clamp_min(0)), group_UC)[0]
        lost_U = shown_U & (price_U > 0)
        assert bool((slot_of(below, candidate)[lost_U] > slot_U[lost_U]).all())


def test_a_higher_bid_never_gets_a_lower_slot() -> None:
    bids, config = market(80, 6, seed=1), auction("second_price")
    before = torch.full((80,), SLOTS)
    for bid in torch.linspace(0, 5, 26).tolist():
        slot_U = slot_of(run(config, with_bid(bids, 2, bid))[0], 2)
        assert bool((slot_U <= before).all())
        before = slot_U
    assert bool((before == 0).any())


def best_welfare(value: list[float], allowed: list[int]) -> float:
    """Of the best list of some candidates, by trying all; a slot may stay empty."""
    best = 0.0
    for length in range(1, SLOTS + 1):
        for places in permutations(allowed, length):
            best = max(best, sum(effect * value[place] for effect, place in zip(EFFECTS, places, strict=False)))
    return best


def test_vcg_charges_what_the_others_lose() -> None:
    source = market(40, 5, seed=2)
    # Without terms that are worth something whatever is bid, no price is cut at 0.
    bids = source._replace(intercept_UC=source.intercept_UC.clamp_max(0))
    places_UK, price_UK = run(auction("vcg"), bids)
    value_UC = bids.intercept_UC + bids.slope_UC * bids.bid_UC
    seen = 0
    for user in range(40):
        value = value_UC[user].tolist()
        whole = best_welfare(value, list(range(5)))
        for slot, place in enumerate(places_UK[user].tolist()):
            if place < 0:
                continue
            intercept, slope = float(bids.intercept_UC[user, place]), float(bids.slope_UC[user, place])
            own = EFFECTS[slot] * slope * float(bids.bid_UC[user, place])
            loss = best_welfare(value, [other for other in range(5) if other != place]) - (whole - own)
            assert float(price_UK[user, slot]) == pytest.approx(loss / (EFFECTS[slot] * slope), abs=1e-9), intercept
            seen += 1
    assert seen > 80


@pytest.mark.parametrize("reserve", [0.0, 0.7])
@pytest.mark.parametrize(("pricing", "k"), [("second_price", 1), ("vcg", 1), ("vcg", SLOTS)])
def test_the_true_value_is_the_best_bid(pricing: str, k: int, reserve: float) -> None:
    """Utility, effect times (true value - price), over 80 bids; also for a candidate whose value rises by itself."""
    bids, config = market(60, 5, seed=3), auction(pricing, reserve)
    for candidate in (0, 3):
        truth_U = bids.bid_UC[:, candidate]
        effect_U, price_U = outcome(config, bids, candidate, k)
        honest_U = effect_U * (truth_U - price_U)
        assert float(honest_U.min()) >= 0
        for bid in torch.linspace(0, 4, 80).tolist():
            effect_U, price_U = outcome(config, with_bid(bids, candidate, bid), candidate, k)
            assert bool((effect_U * (truth_U - price_U) <= honest_U + 1e-9).all())


def test_in_several_slots_a_second_price_can_reward_a_lower_bid() -> None:
    """Why there is VCG: bids 10, 4, 2 for one click rate, slots of effect 1 and .9. The second slot costs 2, not 4."""
    config = AuctionConfig(slot_effects=(1.0, 0.9))
    none, one = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    bids = Bids(torch.tensor([[10.0, 4.0, 2.0]]).double(), none, one)
    honest, lower = run(config, bids, k=2)[1], run(config, with_bid(bids, 0, 3.0), k=2)[1]
    assert honest.tolist() == [[4.0, 2.0]]
    assert 0.9 * (10 - float(lower[0, 1])) > 10 - float(honest[0, 0])
    vcg = config.model_copy(update={"pricing": "vcg"})
    assert run(vcg, bids, k=2)[1].tolist() == [pytest.approx([0.1 * 4 + 0.9 * 2, 2.0])]


def test_all_slots_alike_cost_the_first_value_that_is_not_shown() -> None:
    bids = market(30, 6, seed=4)
    bids = bids._replace(intercept_UC=torch.zeros_like(bids.intercept_UC))
    places_UK, price_UK = run(AuctionConfig(pricing="vcg"), bids)
    fourth_U1 = (bids.slope_UC * bids.bid_UC).sort(descending=True).values[:, 3:4]
    torch.testing.assert_close(price_UK, fourth_U1 / bids.slope_UC.gather(1, places_UK))


def test_who_bids_less_than_the_reserve_or_is_worth_less_than_nothing_is_not_shown() -> None:
    one = torch.ones(1, 4, dtype=torch.float64)
    bids = Bids(torch.tensor([[2.0, 0.4, 3.0, 1.0]]).double(), torch.tensor([[0.0, 5.0, -4.0, -0.2]]).double(), one)
    places_UK, price_UK = run(auction("second_price", 0.5), bids)
    assert places_UK.tolist() == [[0, 3, -1]]
    # The last pays for the harm that an empty slot would not do: below .2 its value is negative. The reserve is more.
    assert price_UK[0, :2].tolist() == pytest.approx([0.8, 0.5]) and bool(price_UK[0, 2].isnan())
    assert run(auction("second_price"), bids)[1][0, 2].tolist() == pytest.approx(0.2)


def test_a_first_price_is_the_bid_and_what_is_explored_pays_the_reserve() -> None:
    bids, reserve = market(200, 6, seed=5), 0.3
    value_UC = bidders(auction("vcg", reserve), bids.intercept_UC + bids.slope_UC * bids.bid_UC, bids.bid_UC)
    explore = PolicySpec.of({"name": "epsilon", "epsilon": 0.5}).build()
    places_UK = fill(value_UC, SLOTS, policy=explore, generator=torch.Generator().manual_seed(0)).places_UK
    there_UK, bid_UK = places_UK >= 0, bids.bid_UC.gather(1, places_UK.clamp_min(0))
    first_UK = prices(auction("first_price", reserve), value_UC, bids, places_UK)
    assert torch.equal(first_UK[there_UK], bid_UK[there_UK])
    best_U = value_UC.argmax(1)
    explored_U = there_UK[:, 0] & (places_UK[:, 0] != best_U)
    assert 20 < int(explored_U.sum()) < 150
    for pricing in ("second_price", "vcg"):
        price_UK = prices(auction(pricing, reserve), value_UC, bids, places_UK)
        assert bool((price_UK[explored_U, 0] == reserve).all())
        assert float((price_UK[:, 0] > reserve).double().mean()) > 0.3
        assert bool((price_UK <= bid_UK)[there_UK].all() and (price_UK >= reserve)[there_UK].all())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pricing": "third_price"}, "pricing"),
        ({"reserve": -1}, "reserve"),
        ({"reserve": float("nan")}, "reserve"),
        ({"slot_effects": [0.5, 1.0]}, "do not rise"),
        ({"slot_effects": [1.0, 0.0]}, "positive numbers"),
        ({"slot_effects": []}, "positive numbers"),
    ],
)
def test_a_wrong_auction_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AuctionConfig.model_validate(config)


def test_vcg_goes_with_lists_in_the_order_of_values_only() -> None:
    by_category = {"auction": {"pricing": "vcg"}, "diversity": {"by": "category", "at_most": 1}}
    with pytest.raises(ValidationError, match="vcg prices a list in the order of values"):
        SlateConfig.model_validate(by_category)
    SlateConfig.model_validate({"auction": {"pricing": "vcg"}, "frequency": {"at_most": 1}})
