"""Facts about policies of a slot, rules, and lists that are filled by them."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from scipy import stats
from torch import Tensor

from fullrank.funnel.policies import POLICIES, PolicySpec, SlotPolicy, best_of_normals
from fullrank.funnel.slate import AtMost, Rule, fill, propensities
from fullrank.retrieval.exact import top_k

VALUE = torch.tensor([0.5, 0.42, 0.40, 0.1, -torch.inf, -0.2])
SPREAD = torch.tensor([0.02, 0.1, 0.05, 0.3, 0.1, 0.2])
GROUP = torch.tensor([0, 0, 0, 1, 1, 2])
SPECS = [
    {"name": "epsilon", "epsilon": 0.3},
    {"name": "softmax", "temperature": 0.2},
    {"name": "thompson"},
]


def policy(name: str, **config: float) -> SlotPolicy:
    return PolicySpec.of({"name": name, **config}).build()


def rows(vector: Tensor, count: int) -> Tensor:
    return vector.expand(count, -1).contiguous()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class OncePerRow(SlotPolicy):
    """A policy that looks at equal rows once."""

    def __init__(self, inner: SlotPolicy) -> None:
        self.inner = inner

    def probabilities(self, value_UC: Tensor, spread_UC: Tensor | None, slot: int) -> Tensor:
        distinct, of_row = torch.unique(value_UC, dim=0, return_inverse=True)
        assert spread_UC is not None
        return self.inner.probabilities(distinct, spread_UC[: len(distinct)], slot)[of_row]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec["name"]))
@pytest.mark.parametrize("with_rule", [False, True])
def test_lists_are_drawn_as_often_as_their_propensities_say(spec: dict[str, object], with_rule: bool) -> None:
    """Chi-square of 100,000 lists of two against the product of what was logged with them."""
    draws = 100_000
    chosen = OncePerRow(PolicySpec.of(spec).build())
    value_UC, spread_UC = rows(VALUE, draws), rows(SPREAD, draws)
    rules = [AtMost(rows(GROUP, draws), 1)] if with_rule else []
    slate = fill(value_UC, 2, policy=chosen, rules=rules, spread_UC=spread_UC, generator=generator())
    code_U, count = (slate.places_UK[:, 0] * 6 + slate.places_UK[:, 1]).unique(return_counts=True)
    found = dict(zip(code_U.tolist(), count.tolist(), strict=True))
    pairs = torch.tensor(list(permutations(range(6), 2)))
    few = len(pairs)
    of_pair = propensities(
        rows(VALUE, few),
        pairs,
        policy=chosen,
        rules=[AtMost(rows(GROUP, few), 1)] if with_rule else [],
        spread_UC=rows(SPREAD, few),
    ).prod(1)
    assert float(of_pair.sum()) == pytest.approx(1, abs=1e-9)
    expected = {int(a * 6 + b): float(p) * draws for (a, b), p in zip(pairs, of_pair, strict=True)}
    assert set(found) <= {code for code, number in expected.items() if number}
    often = [code for code, number in expected.items() if number >= 5]
    statistic = sum((found.get(code, 0) - expected[code]) ** 2 / expected[code] for code in often)
    assert statistic < stats.chi2.ppf(0.9999, len(often) - 1)
    logged = slate.propensity_UK.prod(1)
    assert logged.tolist() == pytest.approx(
        [expected[int(code)] / draws for code in (slate.places_UK[:, 0] * 6 + slate.places_UK[:, 1])]
    )


@pytest.mark.parametrize("spec", [{"name": "greedy"}, *SPECS], ids=lambda spec: str(spec["name"]))
def test_a_distribution_covers_the_eligible_and_no_other(spec: dict[str, object]) -> None:
    value_UC = torch.randn(50, 9, generator=generator(), dtype=torch.float64)
    value_UC[torch.rand(value_UC.shape, generator=generator(1)) < 0.5] = -torch.inf
    value_UC[0] = -torch.inf
    p_UC = PolicySpec.of(spec).build().probabilities(value_UC, torch.full_like(value_UC, 0.5), 0)
    there_U = (value_UC > -torch.inf).any(1)
    torch.testing.assert_close(p_UC.sum(1), there_U.double())
    assert not p_UC[value_UC == -torch.inf].any()


def test_without_exploration_every_policy_is_the_greedy_one() -> None:
    value_UC = torch.randint(0, 40, (30, 50), generator=generator()).float()  # with ties
    expected = top_k(value_UC, 12)[1]
    free = AtMost(torch.full((30, 50), -1), 1)
    for chosen in (policy("greedy"), policy("epsilon", epsilon=0.0)):
        for rules in ([], [free]):
            slate = fill(value_UC, 12, policy=chosen, rules=rules, generator=generator())
            assert torch.equal(slate.places_UK, expected)
            assert slate.propensity_UK.min() == 1.0
    distinct_UC = torch.rand(30, 50, generator=generator(), dtype=torch.float64)
    expected = top_k(distinct_UC, 12)[1]
    certain = fill(distinct_UC, 12, policy=policy("thompson"), spread_UC=torch.zeros(30, 50), generator=generator())
    cold = fill(distinct_UC, 12, policy=policy("softmax", temperature=1e-12), generator=generator())
    for slate in (certain, cold):
        assert torch.equal(slate.places_UK, expected)
        assert slate.propensity_UK.min() > 1 - 1e-9


def test_thompson_is_what_drawing_values_gives() -> None:
    """Against four million draws: within four standard errors, at most .001, for each candidate."""
    mean, spread = torch.randn(8, generator=generator()).double(), torch.rand(8, generator=generator(1)).double() + 0.1
    counts, draws = torch.zeros(8), 4_000_000
    source = generator(2)
    for _ in range(8):
        drawn = mean + spread * torch.randn(draws // 8, 8, generator=source, dtype=torch.float64)
        counts += torch.bincount(drawn.argmax(1), minlength=8)
    p = best_of_normals(mean[None], spread[None])[0]
    error = (p * (1 - p) / draws).sqrt()
    assert bool(((counts / draws - p).abs() < 4 * error + 1e-7).all())


def test_the_integral_is_exact_for_spreads_of_any_ratio() -> None:
    exact = stats.norm.cdf(0.3 / (0.2**2 + 1e-5**2) ** 0.5)
    mean, spread = (torch.tensor([row], dtype=torch.float64) for row in ([1.3, 1.0, -torch.inf], [0.2, 1e-5, 1.0]))
    p = best_of_normals(mean, spread)
    assert p[0].tolist() == pytest.approx([exact, 1 - exact, 0.0], abs=1e-9)
    # Many alike: each is the best as often as another.
    p = best_of_normals(torch.full((2, 300), 0.7), torch.tensor([[1e-3], [5.0]]).expand(2, 300))
    torch.testing.assert_close(p, torch.full((2, 300), 1 / 300, dtype=torch.float64), atol=1e-9, rtol=0)
    # Shifted and stretched, it stays; against two million steps of the trapezoidal rule.
    mean, spread = torch.randn(20, generator=generator()).double(), 10 ** (-3 * torch.rand(20).double())
    p = best_of_normals(mean[None], spread[None])[0]
    moved = best_of_normals(1000 + 50 * mean[None], 50 * spread[None])[0]
    torch.testing.assert_close(p, moved, atol=1e-9, rtol=0)
    x = torch.linspace(float((mean - 9 * spread).max()), float((mean + 9 * spread).max()), 200_001).double()
    z = (x - mean[:, None]) / spread[:, None]
    below = torch.special.log_ndtr(z)
    density = torch.exp(-z.square() / 2 - below + below.sum(0)) / spread[:, None] / (2 * torch.pi) ** 0.5
    torch.testing.assert_close(p, torch.trapezoid(density, x, dim=1), atol=1e-6, rtol=0)


def test_a_list_ends_where_the_candidates_do() -> None:
    value_UC = torch.tensor([[1.0, -torch.inf, 2.0], [-torch.inf] * 3, [1.0, 2.0, 3.0]])
    for chosen in (policy("greedy"), policy("softmax")):
        slate = fill(value_UC, 5, policy=chosen, generator=generator())
        assert slate.places_UK.shape == (3, 3)
        assert (slate.places_UK >= 0).sum(1).tolist() == [2, 0, 3]
        assert set(slate.places_UK[0].tolist()) == {0, 2, -1} and slate.places_UK[0, 2] == -1
        assert sorted(slate.places_UK[2].tolist()) == [0, 1, 2]
        assert slate.propensity_UK[1].tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="k must be at least 1"):
        fill(value_UC, 0, policy=policy("greedy"))


def test_the_same_generator_draws_the_same_lists() -> None:
    value_UC = torch.rand(20, 30, generator=generator())
    first, again, other = (
        fill(value_UC, 5, policy=policy("softmax"), generator=generator(seed)).places_UK for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("slots", "hard"), [(None, False), (3, False), (None, True)])
def test_at_most_is_a_count_over_the_slots_above(slots: int | None, hard: bool) -> None:
    """Against a loop over users, slots and candidates."""
    users, candidates, k, at_most = 40, 12, 9, 2
    value_UC = torch.rand(users, candidates, generator=generator())
    group_UC = torch.randint(-1, 4, (users, candidates), generator=generator(1))
    before_UC = torch.randint(0, 3, (users, 5), generator=generator(2)).gather(1, group_UC + 1)
    rule = AtMost(group_UC, at_most, slots=slots, before_UC=before_UC, hard=hard)
    slate = fill(value_UC, k, policy=policy("greedy"), rules=[rule])
    for user in range(users):
        listed: list[int] = []
        for _ in range(k):
            left = [place for place in range(candidates) if place not in listed]
            near = listed if slots is None else listed[-(slots - 1) :]

            def fits(place: int, near: list[int] = near, user: int = user) -> bool:
                group = int(group_UC[user, place])
                count = sum(int(group_UC[user, above]) == group for above in near) + int(before_UC[user, place])
                return group < 0 or count < at_most

            allowed = [place for place in left if fits(place)] or ([] if hard else left)
            if allowed:
                listed.append(max(allowed, key=lambda place: float(value_UC[user, place])))
        assert [place for place in slate.places_UK[user].tolist() if place >= 0] == listed


def test_a_soft_rule_gives_way_to_a_hard_one_and_never_shortens_a_list() -> None:
    value_UC = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    diverse = AtMost(torch.zeros(1, 4, dtype=torch.int64), 1)
    capped = AtMost(torch.tensor([[0, 1, 2, 3]]), 1, before_UC=torch.tensor([[1, 0, 0, 1]]), hard=True)
    rules: list[Rule] = [diverse, capped]
    slate = fill(value_UC, 4, policy=policy("greedy"), rules=rules)
    assert slate.places_UK.tolist() == [[1, 2, -1, -1]]
    chances = propensities(value_UC, torch.tensor([[0, 1, 2, 3]]), policy=policy("greedy"), rules=rules)
    assert chances.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_a_policy_of_ones_own_goes_by_its_name() -> None:
    class Uniform(SlotPolicy):
        name = "uniform_for_a_test"

        def probabilities(self, value_UC: Tensor, spread_UC: Tensor | None, slot: int) -> Tensor:
            eligible_UC = (value_UC > -torch.inf).double()
            return eligible_UC / eligible_UC.sum(1, keepdim=True).clamp_min(1)

    POLICIES.register_class(Uniform)
    try:
        slate = fill(VALUE[None], 3, policy=policy("uniform_for_a_test"), generator=generator())
    finally:
        POLICIES.unregister("uniform_for_a_test")
    assert slate.propensity_UK.tolist() == [pytest.approx([1 / 5, 1 / 4, 1 / 3])]
