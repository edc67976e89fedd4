"""Tests of an experiment that may be looked at any time, and of whether its arms got their shares."""

# Shapes: G groups of users, A arms.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Groups of users with something in them, of each arm, below which variances say nothing.
FEWEST_GROUPS = 20


class Rate(NamedTuple):
    """A rate of rewards, and the variance of the estimate."""

    rate: float
    variance: float
    groups: int


class Difference(NamedTuple):
    """What one arm's rate is above another's.

    Attributes:
        low, high: an interval that holds the true difference at all looks together with probability 1 - alpha.
        p_value: of no difference; below alpha at any look with probability at most alpha if there is none.
    """

    difference: float
    low: float
    high: float
    p_value: float


def rate_of(rewards_G: Sequence[float], counts_G: Sequence[float]) -> Rate:
    """Rewards by count, where those of one user depend on one another: users are put into groups at random, and what
    groups differ by is the variance, V = sum (R_g - rate N_g)^2 / N^2 G / (G - 1).

    Raises:
        ValueError: if there is no group.
    """
    pairs = [(reward, count) for reward, count in zip(rewards_G, counts_G, strict=True) if count]
    if not pairs:
        raise ValueError("a rate needs at least one count")
    total, groups = sum(count for _, count in pairs), len(pairs)
    rate = sum(reward for reward, _ in pairs) / total
    squares = sum((reward - rate * count) ** 2 for reward, count in pairs)
    return Rate(rate, squares / total**2 * groups / max(1, groups - 1), groups)


def always_valid_difference(one: Rate, other: Rate, *, expected: float, alpha: float = 0.05) -> Difference | None:
    """`one` - `other` by the mixture sequential probability ratio test. It may be asked after every event, and stopped
    whenever one likes.

    With V the sum of the variances and a normal mixture of variance t = `expected`^2 over differences d, the likelihood
    ratio is sqrt(V / (V + t)) exp(t d^2 / (2 V (V + t))); its reciprocal is the p-value, and the interval is all
    differences that are not refused. This holds as far as rates are normal, so that nothing is said of fewer than 20
    groups of users with both kinds of outcome, and None is returned.

    Args:
        expected: about the size of difference that is looked for; any value is valid, a good one is fast.
        alpha: share of false alarms, over all looks.

    Raises:
        ValueError: if `expected` is not positive, or alpha not between 0 and 1.

    Source: Johari, Koomen, Pekelis, Walsh, Peeking at A/B Tests, KDD 2017; Robbins, Statistical Methods Related to the
    Law of the Iterated Logarithm, 1970.
    """
    if not (expected > 0 and math.isfinite(expected)):
        raise ValueError(f"expected is {expected}, expected a positive number")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}, expected a number between 0 and 1")
    if min(one.groups, other.groups) < FEWEST_GROUPS or not (one.variance > 0 and other.variance > 0):
        return None
    variance, mixed = one.variance + other.variance, expected**2
    difference = one.rate - other.rate
    log_ratio = 0.5 * math.log(variance / (variance + mixed))
    log_ratio += mixed * difference**2 / (2 * variance * (variance + mixed))
    width = math.sqrt(
        variance * (variance + mixed) / mixed * (math.log((variance + mixed) / variance) - 2 * math.log(alpha))
    )
    return Difference(difference, difference - width, difference + width, math.exp(min(0.0, -log_ratio)))


def always_valid_shares(counts_A: Sequence[int], shares_A: Sequence[float], concentration: float = 1000.0) -> float:
    """p-value of the hypothesis that users came to the arms by their shares, at any time.

    A multinomial against a Dirichlet mixture around the shares. Who finds it below 0.001 should look for the fault
    before at anything else.

    Args:
        counts_A: distinct users by arm.
        shares_A: positive, with sum 1.
        concentration: of the mixture: differences from the shares of about 1 / sqrt(concentration) are looked for.

    Raises:
        ValueError: if shares are not positive or do not sum to 1.

    Source: Lindon, Malek, Anytime-Valid Inference for Multinomial Count Data, NeurIPS 2022.
    """
    if any(share <= 0 for share in shares_A) or abs(sum(shares_A) - 1) > 1e-6:
        raise ValueError(f"shares are {list(shares_A)}, expected positive numbers with sum 1")
    total = sum(counts_A)
    log_ratio = math.lgamma(concentration) - math.lgamma(concentration + total)
    for count, share in zip(counts_A, shares_A, strict=True):
        log_ratio += math.lgamma(concentration * share + count) - math.lgamma(concentration * share)
        log_ratio -= count * math.log(share)
    return math.exp(min(0.0, -log_ratio))
