"""Facts about tests that may be looked at any time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from fullrank.metrics.sequential import Rate, always_valid_difference, always_valid_shares, rate_of

GROUPS, LOOKS, RUNS, ALPHA = 100, 60, 300, 0.05


def alarms(lift: float, *, seed: int = 0) -> tuple[float, float]:
    """Share of runs with an alarm at some look, and of runs whose intervals all hold the truth.

    Users come again and again, and each has a rate of their own.
    """
    rng = np.random.default_rng(seed)
    alarmed = covered = 0
    for _ in range(RUNS):
        users = rng.beta(1, 4, (2, 400))
        group = rng.integers(0, GROUPS, (2, 400))
        rewards, counts = np.zeros((2, GROUPS)), np.zeros((2, GROUPS))
        alarm, covers = False, True
        for _look in range(LOOKS):
            for arm in (0, 1):
                who = rng.integers(0, 400, 100)
                clicks = rng.random(100) < np.minimum(1, users[arm, who] + lift * arm)
                np.add.at(counts[arm], group[arm, who], 1)
                np.add.at(rewards[arm], group[arm, who], clicks)
            one, other = (rate_of(rewards[arm].tolist(), counts[arm].tolist()) for arm in (1, 0))
            found = always_valid_difference(one, other, expected=0.03, alpha=ALPHA)
            if found is not None:
                alarm |= found.p_value < ALPHA
                covers &= found.low <= lift <= found.high
                assert (found.p_value < ALPHA) == (not found.low <= 0 <= found.high)
        alarmed += alarm
        covered += covers
    return alarmed / RUNS, covered / RUNS


def test_two_equal_arms_give_no_more_false_alarms_than_alpha_whoever_peeks() -> None:
    alarmed, covered = alarms(0.0)
    slack = 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)
    assert alarmed <= ALPHA + slack and covered >= 1 - ALPHA - slack


def test_a_real_difference_is_found() -> None:
    alarmed, covered = alarms(0.08)
    assert alarmed > 0.9 and covered > 0.9


def test_the_likelihood_ratio_is_the_mixture_it_says() -> None:
    one, other, expected = Rate(0.12, 4e-4, 50), Rate(0.05, 3e-4, 50), 0.04
    found = always_valid_difference(one, other, expected=expected)
    assert found is not None
    mixture, _ = integrate.quad(
        lambda d: stats.norm.pdf(0.07, d, math.sqrt(7e-4)) * stats.norm.pdf(d, 0, expected), -1, 1, points=[0, 0.07]
    )
    assert 1 / found.p_value == pytest.approx(mixture / stats.norm.pdf(0.07, 0, math.sqrt(7e-4)), rel=1e-6)


def test_the_variance_is_that_of_users_not_of_events() -> None:
    # Every user comes ten times and does the same each time: ten events say no more than one.
    once = rate_of([0, 1] * 50, [1] * 100)
    assert rate_of([0, 10] * 50, [10] * 100) == once
    assert once.variance == pytest.approx(0.25 / 99)


def test_little_is_not_judged() -> None:
    assert always_valid_difference(Rate(0.5, 0.1, 5), Rate(0.1, 0.1, 50), expected=0.1) is None
    assert always_valid_difference(Rate(0.0, 0.0, 50), Rate(0.1, 0.1, 50), expected=0.1) is None
    with pytest.raises(ValueError, match="expected is 0"):
        always_valid_difference(Rate(0.5, 0.1, 50), Rate(0.1, 0.1, 50), expected=0)
    with pytest.raises(ValueError, match="at least one count"):
        rate_of([0.0], [0.0])


def test_shares_are_doubted_only_where_they_are_wrong() -> None:
    rng = np.random.default_rng(1)

    def lowest(true: list[float]) -> float:
        counts, low = np.zeros(3, dtype=int), 1.0
        for _ in range(100):
            counts += rng.multinomial(100, true)
            low = min(low, always_valid_shares(counts.tolist(), [0.5, 0.3, 0.2]))
        return low

    equal = [lowest([0.5, 0.3, 0.2]) for _ in range(300)]
    assert np.mean(np.array(equal) < 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert all(lowest([0.46, 0.32, 0.22]) < 0.001 for _ in range(10))
    with pytest.raises(ValueError, match="sum 1"):
        always_valid_shares([1, 1], [0.5, 0.4])
