"""Off-policy estimators against exact enumeration of small worlds, special cases, and coverage of their intervals."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fullrank.metrics import LoggedSlates, check_distributions, off_policy

ITEMS, SLOTS = 3, 2
EXACT = {"rel": 1e-12}


def softmax_of(value_C: Tensor, taken: tuple[int, ...]) -> Tensor:
    return torch.softmax(value_C.index_fill(0, torch.tensor(taken, dtype=torch.int64), -math.inf), 0)


def earned(slate: tuple[int, ...], slot: int) -> float:
    """A reward that depends on the slot, the item and, in the second slot, on the item above."""
    return (slate[slot] + 1.0) * (1 - 0.3 * slot) + (0.7 * slate[0] if slot else 0.0)


def every_slate() -> tuple[LoggedSlates, float]:
    """Each slate once, as a logger that draws uniformly shows them all alike; with the value of a softmax policy and an
    arbitrary reward model."""
    value_C = torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64)
    model_C = torch.tensor([2.0, -1.0, 0.4], dtype=torch.float64)
    slates = list(itertools.permutations(range(ITEMS), SLOTS))
    new, expected, truth = [], [], 0.0
    for slate in slates:
        rows = [softmax_of(value_C, slate[:slot]) for slot in range(SLOTS)]
        new.append([float(row[item]) for row, item in zip(rows, slate, strict=True)])
        expected.append([float(row @ model_C) for row in rows])
        truth += math.prod(new[-1]) * sum(earned(slate, slot) for slot in range(SLOTS))
    logged = torch.tensor([[1 / 3, 1 / 2]] * len(slates), dtype=torch.float64)
    rewards = torch.tensor([[earned(slate, slot) for slot in range(SLOTS)] for slate in slates], dtype=torch.float64)
    predicted = model_C[torch.tensor(slates)]
    return LoggedSlates(
        rewards, logged, torch.tensor(new, dtype=torch.float64), predicted, torch.tensor(expected, dtype=torch.float64)
    ), truth


def random_slates(slates: int, seed: int = 0, signal: float = 1.0, spread: float = 1.0) -> LoggedSlates:
    """One slot, ten items, two logged slates of every user."""
    generator = torch.Generator().manual_seed(seed)
    old_NC = torch.softmax(torch.randn(slates, 10, generator=generator) * spread, 1)
    new_NC = torch.softmax(torch.randn(slates, 10, generator=generator) * spread, 1)
    true_NC = torch.rand(slates, 10, generator=generator) * signal
    shown_N1 = torch.multinomial(old_NC, 1, generator=generator)
    reward_N1 = torch.bernoulli(true_NC.gather(1, shown_N1), generator=generator)
    return LoggedSlates(
        reward_N1, old_NC.gather(1, shown_N1), new_NC.gather(1, shown_N1), true_NC.gather(1, shown_N1),
        (new_NC * true_NC).sum(1, keepdim=True), users_N=torch.arange(slates) // 2,
    )  # fmt: skip


def test_ips_and_dr_have_the_true_value_as_expectation_though_the_reward_model_is_wrong() -> None:
    slates, truth = every_slate()
    found = off_policy(slates).drawn.estimate
    assert found["ips"] == pytest.approx(truth, **EXACT)
    assert found["dr"] == pytest.approx(truth, **EXACT)
    assert found["mean_weight_0"] == found["mean_weight_1"] == pytest.approx(1, **EXACT)
    # Slots are drawn one after the other, and a reward depends on the one above: the own slot's ratio is not enough.
    assert abs(off_policy(slates, weighing="slot").drawn.estimate["ips"] - truth) > 0.02


def test_own_ratios_are_exact_where_slots_do_not_depend_on_each_other() -> None:
    new_C, rewards_KC = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 1.0]])
    slates = torch.tensor(list(itertools.product(range(ITEMS), repeat=SLOTS)))
    reward_NK = torch.stack([rewards_KC[slot, slates[:, slot]] for slot in range(SLOTS)], 1)
    logged = LoggedSlates(reward_NK, torch.full(slates.shape, 1 / 3), new_C[slates])
    truth = float((rewards_KC @ new_C).sum())
    for weighing in ("slot", "prefix"):
        assert off_policy(logged, weighing=weighing).drawn.estimate["ips"] == pytest.approx(truth, rel=1e-6)
    assert logged.weights("slot").max() < logged.weights("prefix").max()


def test_the_policy_of_the_log_has_weights_of_one_and_the_value_of_the_log() -> None:
    slates = random_slates(500)
    same = off_policy(replace(slates, new_NK=slates.logged_NK))
    mean = float(slates.reward_NK.sum(1).mean())
    assert [same.drawn.estimate[name] for name in ("logged", "ips", "snips")] == pytest.approx([mean] * 3, rel=1e-6)
    assert same.drawn.interval("ips_gain") == pytest.approx((0, 0), abs=1e-6)
    assert same.effective_K.tolist() == [500] and same.largest_K.tolist() == [1] and not same.warnings()


def test_dr_is_ips_without_a_model_and_the_models_word_where_the_model_is_exact() -> None:
    slates, truth = every_slate()
    nothing = torch.zeros_like(slates.reward_NK)
    found = off_policy(replace(slates, predicted_NK=nothing, expected_NK=nothing))
    assert found.drawn.estimate["dr"] == found.drawn.estimate["ips"]
    assert found.drawn.interval("dr") == found.drawn.interval("ips")
    # Rewards that are what the model says: nothing is left to correct, whatever the weights.
    exact = replace(slates, reward_NK=slates.predicted_NK)
    far = replace(exact, new_NK=exact.new_NK.flip(0))
    model = float(exact.expected_NK.sum(1).mean())
    assert off_policy(exact, weighing="slot").drawn.estimate["dr"] == pytest.approx(model)
    assert off_policy(far, weighing="slot").drawn.estimate["dr"] == pytest.approx(
        float(exact.expected_NK.sum(1).mean())
    )
    # A model that counts in what the slots below will earn: the value before anything was drawn is all there is.
    new_NK, value_N1 = slates.new_NK, torch.full((len(slates.reward_NK), 1), truth, dtype=torch.float64)
    second = {(s[0],): 0.0 for s in itertools.permutations(range(ITEMS), SLOTS)}
    for row, slate in enumerate(itertools.permutations(range(ITEMS), SLOTS)):
        second[slate[:1]] += float(new_NK[row, 1]) * earned(slate, 1)
    below = torch.tensor([[second[s[:1]]] for s in itertools.permutations(range(ITEMS), SLOTS)], dtype=torch.float64)
    predicted = slates.reward_NK.double() + torch.cat([below, torch.zeros_like(below)], 1)
    whole = replace(slates, predicted_NK=predicted, expected_NK=torch.cat([value_N1, below], 1))
    found = off_policy(whole)
    assert found.drawn.estimate["dr"] == pytest.approx(truth, rel=1e-6)
    assert max(found.drawn.interval("dr")) - min(found.drawn.interval("dr")) < 1e-6


def test_snips_moves_with_the_rewards_and_ips_does_not() -> None:
    slates = random_slates(400)
    more = replace(slates, reward_NK=slates.reward_NK + 5)
    before, after = off_policy(slates).drawn.estimate, off_policy(more).drawn.estimate
    assert after["snips"] - before["snips"] == pytest.approx(5, **EXACT)
    assert abs(after["ips"] - before["ips"] - 5) > 0.05


def test_slates_of_unequal_length_count_with_what_they_have() -> None:
    shown = torch.tensor([[True, True], [True, False], [True, False]])
    half, nan = torch.full((3, 2), 0.5), torch.tensor([[1.0, 2.0], [4.0, math.nan], [1.0, math.nan]])
    found = off_policy(LoggedSlates(nan, half, half, shown_NK=shown)).drawn.estimate
    assert found["logged"] == found["ips"] == found["snips"] == pytest.approx(8 / 3)
    with pytest.raises(ValueError, match="slate 1 slot 1: the number of items in the slot above is 0, expected 1"):
        LoggedSlates(half, half, half, shown_NK=shown.flip(1))


def test_clipping_caps_weights_counts_them_and_says_where_the_estimate_goes() -> None:
    slates = random_slates(2000)
    free, capped = off_policy(slates), off_policy(slates, clip=2.0)
    above = int((slates.weights() > 2).sum())
    assert capped.clipped == above > 100 and capped.largest_K.tolist() == [2] and free.clipped == 0
    assert capped.bias == "too low" and capped.drawn.estimate["ips"] < free.drawn.estimate["ips"] - 0.05
    assert capped.effective_K[0] > free.effective_K[0]
    assert f"{above:,} weights were clipped at 2: IPS is too low" in capped.warnings()[-1]
    assert off_policy(replace(slates, reward_NK=-slates.reward_NK), clip=2.0).bias == "too high"
    assert off_policy(replace(slates, reward_NK=slates.reward_NK - 0.5), clip=2.0).bias == "either way"
    with pytest.raises(ValueError, match="clipped at 0"):
        off_policy(slates, clip=0)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = dict.fromkeys(("ips", "snips", "dr"), 0)
    for seed in range(200):
        slates = random_slates(400, seed, signal=0.4, spread=0.5)
        assert slates.expected_NK is not None
        drawn = off_policy(slates, replicates=300).drawn
        for name in covered:
            low, high = drawn.interval(name)
            covered[name] += low <= 0.2 <= high  # items and probabilities are symmetric: the truth is the mean reward
    assert all(182 <= count <= 198 for count in covered.values()), covered


def test_what_the_log_does_not_support_is_told() -> None:
    slates = random_slates(3000)
    # The logger never showed half of what the new policy shows.
    half = off_policy(replace(slates, new_NK=slates.logged_NK * 0.5))
    assert "weights of slot 0 have the mean 0.500, not 1: the logging policy could not draw" in half.warnings()[0]
    # 1/n where items were drawn otherwise.
    wrong = off_policy(replace(slates, new_NK=slates.logged_NK, logged_NK=slates.logged_NK * 0.5))
    assert "the logged propensities are smaller" in wrong.warnings()[0]
    few = replace(slates, new_NK=(torch.arange(3000) < 20)[:, None] * slates.logged_NK)
    assert any("3,000 slates are worth 20" in text for text in off_policy(few).warnings())
    assert off_policy(few).report()["effective_sample_size"] == pytest.approx(20)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_what_is_no_propensity_is_refused(value: float) -> None:
    half = torch.full((4, 3), 0.5)
    wrong = half.clone()
    wrong[2, 1] = value
    with pytest.raises(ValueError, match=f"slate 2 slot 1: logged is {value:g}, expected a propensity above 0"):
        LoggedSlates(half, wrong, half)
    if value != 0:
        with pytest.raises(ValueError, match="slate 2 slot 1: new is .*, expected a probability"):
            LoggedSlates(half, half, wrong)


def test_whole_distributions_have_to_sum_to_one_in_each_slot() -> None:
    whole = torch.softmax(torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(1)), 2)
    check_distributions(whole)
    lost = whole.clone()
    lost[3, 1, 0] = 0
    with pytest.raises(ValueError, match=r"slate 3 slot 1: the sum of the probabilities is 0\.\d+, expected 1"):
        check_distributions(lost)
    check_distributions(lost, torch.tensor([[True, False]] * 5))
    with pytest.raises(ValueError, match="both its predictions and their expectation"):
        LoggedSlates(whole[:, :, 0], whole[:, :, 0], whole[:, :, 0], predicted_NK=whole[:, :, 0])
