"""Facts about the agreement of two stages, against SciPy and plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau
from torch import Tensor

from fullrank.metrics import ads_recall, agreement, kendall_tau, pair_consistency, value_recall

SCORE = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 0.5, math.inf, -math.inf])
VALUE = st.sampled_from([0.0, 1.0, 2.0, -1.0, 0.5, 7.0])


def _stages(score: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[list[float]]]]:
    """Several requests, each with the scores of two stages."""
    return st.integers(1, 9).flatmap(
        lambda n: st.lists(
            st.lists(st.lists(score, min_size=n, max_size=n), min_size=2, max_size=2), min_size=1, max_size=4
        )
    )


def _both(rows: list[list[list[float]]]) -> tuple[Tensor, Tensor]:
    both = torch.tensor(rows)
    return both[:, 0], both[:, 1]


def _top(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


@pytest.mark.filterwarnings("ignore:there are only")
@given(_stages(SCORE), st.integers(1, 10), st.integers(1, 10))
def test_ads_recall_is_a_loop_over_sets_with_ties_to_the_lower_index(
    rows: list[list[list[float]]], k: int, n: int
) -> None:
    shares = [len(set(_top(f, k)) & set(_top(e, n))) / len(_top(f, k)) for f, e in rows]
    assert ads_recall(*_both(rows), k, n) == pytest.approx(sum(shares) / len(shares), abs=1e-12)


@pytest.mark.filterwarnings("ignore:there are only", "ignore:value recall is undefined")
@given(_stages(VALUE), st.integers(1, 10), st.integers(1, 10))
def test_value_recall_is_a_loop_and_never_above_one(rows: list[list[list[float]]], k: int, n: int) -> None:
    got = sum(sum(sorted((f[i] for i in _top(e, n)), reverse=True)[:k]) for f, e in rows)
    best = sum(sum(sorted(f, reverse=True)[:k]) for f, _ in rows)
    found = value_recall(*_both(rows), k, n)
    assert found == pytest.approx(got / best if best > 0 else math.nan, rel=1e-12, abs=1e-12, nan_ok=True)
    if n >= k and all(value >= 0 for f, _ in rows for value in f):
        assert math.isnan(found) or found <= 1 + 1e-12


def test_any_increasing_transform_of_the_final_value_has_full_recall() -> None:
    final = torch.rand(8, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert ads_recall(final, final.exp() * 3, 10, 10) == 1.0
    assert value_recall(final, final**3, 10, 10) == pytest.approx(1.0)
    assert pair_consistency(final, final.log()) == 1.0 == kendall_tau(final, final.log())
    assert pair_consistency(final, -final) == 0.0 and kendall_tau(final, -final) == -1.0


def test_random_scores_keep_n_of_all_candidates() -> None:
    generator = torch.Generator().manual_seed(2)
    final, early = torch.rand(4000, 60, generator=generator), torch.rand(4000, 60, generator=generator)
    # Each request's recall has the variance of a hypergeometric draw of 5 from 60, 15 of them kept.
    sigma = math.sqrt(0.25 * 0.75 / 5 * (55 / 59) / 4000)
    assert ads_recall(final, early, 5, 15) == pytest.approx(15 / 60, abs=3 * sigma)
    assert ads_recall(final, early, 5, 60) == 1.0
    assert pair_consistency(final, early) == pytest.approx(0.5, abs=0.005)
    assert kendall_tau(final, early) == pytest.approx(0.0, abs=0.01)


def test_more_wanted_than_there_are_means_all_with_a_warning() -> None:
    final = torch.tensor([[1.0, 2.0, 3.0]])
    with pytest.warns(UserWarning, match="only 3 candidates for k = 9"):
        assert ads_recall(final, -final, 9, 2) == pytest.approx(2 / 3)
    with pytest.warns(UserWarning, match="only 3 candidates for k = 9"):
        assert value_recall(final, -final, 9, 2) == pytest.approx(3 / 6)


def test_value_recall_is_undefined_without_positive_value() -> None:
    with pytest.warns(UserWarning, match="value recall is undefined"):
        assert math.isnan(value_recall(-torch.rand(2, 4), torch.rand(2, 4), 2, 2))
    with pytest.raises(ValueError, match="infinity"):
        value_recall(torch.tensor([[math.inf, 0.0]]), torch.zeros(1, 2), 1, 1)


@pytest.mark.filterwarnings("ignore:Kendall's tau", "ignore:consistency", "ignore::RuntimeWarning")
@given(_stages(SCORE))
def test_kendall_and_consistency_equal_scipy_and_a_loop_over_pairs(rows: list[list[list[float]]]) -> None:
    taus, alike, decided = [], 0, 0
    for f, e in rows:
        tau = kendalltau(f, e, variant="b").statistic if len(f) > 1 else math.nan
        taus += [] if math.isnan(tau) else [tau]
        for i, j in itertools.combinations(range(len(f)), 2):
            if f[i] != f[j] and e[i] != e[j]:
                alike += (f[i] > f[j]) == (e[i] > e[j])
                decided += 1
    expected = sum(taus) / len(taus) if taus else math.nan
    assert kendall_tau(*_both(rows)) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    share = alike / decided if decided else math.nan
    assert pair_consistency(*_both(rows)) == pytest.approx(share, abs=1e-15, nan_ok=True)


@pytest.mark.parametrize(("n", "levels"), [(1000, 10_000_000), (1024, 30), (5000, 500)])
def test_kendall_of_many_candidates_equals_scipy(n: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(n)
    first = torch.randint(0, levels, (3, n), generator=generator)
    second = first + torch.randint(-levels, levels, (3, n), generator=generator)
    expected = np.mean([kendalltau(a, b).statistic for a, b in zip(first, second, strict=True)])
    assert kendall_tau(first, second) == pytest.approx(expected, abs=1e-12)
    # The rows are counted one at a time where memory is short.
    whole = pair_consistency(first, second)
    monkeypatch.setattr(agreement, "SCORES_AT_ONCE", 10)
    assert pair_consistency(first, second) == whole
    assert kendall_tau(first, second) == pytest.approx(expected, abs=1e-12)


def test_undefined_agreement_is_nan_with_a_warning() -> None:
    for first in (torch.zeros(2, 4), torch.zeros(3, 1)):
        second = torch.rand(first.shape)
        with pytest.warns(UserWarning, match="Kendall's tau is undefined"):
            assert math.isnan(kendall_tau(first, second))
        with pytest.warns(UserWarning, match="consistency is undefined"):
            assert math.isnan(pair_consistency(first, second))


def test_bad_scores_are_refused() -> None:
    good = torch.rand(2, 3)
    for metric in (pair_consistency, kendall_tau):
        with pytest.raises(ValueError, match="of one shape"):
            metric(good, good[:, :2])
        with pytest.raises(ValueError, match="scores contain NaN"):
            metric(good, torch.full((2, 3), math.nan))
    for recall in (ads_recall, value_recall):
        with pytest.raises(ValueError, match="of one shape"):
            recall(good, good[:1], 1, 1)
        with pytest.raises(ValueError, match="scores contain NaN"):
            recall(torch.full((2, 3), math.nan), good, 1, 1)
        with pytest.raises(ValueError, match="non-empty"):
            recall(good[:, :0], good[:, :0], 1, 1)
        for k, n in ((0, 1), (1, 0), (1, -3)):
            with pytest.raises(ValueError, match="at least 1"):
                recall(good, good, k, n)
