"""Facts about ranked lists, against scikit-learn and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, top_k_accuracy_score

from fullrank.metrics import ndcg_at_k, recall_at_k


@pytest.mark.parametrize("k", [1, 5, 15, 40])
def test_ndcg_equals_scikit_learn(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, gains = torch.rand(20, 15, generator=generator), torch.rand(20, 15, generator=generator)
    assert ndcg_at_k(scores, gains, k) == pytest.approx(ndcg_score(gains, scores, k=k), abs=1e-7)
    assert ndcg_at_k(scores.double(), gains.double(), k) == pytest.approx(ndcg_score(gains, scores, k=k), abs=1e-7)


def _ndcg(scores: list[float], gains: list[float], k: int) -> float | None:
    def dcg(order: list[int]) -> float:
        return sum(gains[i] / math.log2(place + 2) for place, i in enumerate(order[:k]))

    best = dcg(sorted(range(len(gains)), key=lambda i: -gains[i]))
    return dcg(sorted(range(len(gains)), key=lambda i: (-scores[i], i))) / best if best else None


SCORE = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, math.inf, -math.inf])
GAIN = st.sampled_from([0.0, 0.0, 1.0, 3.0, 0.5])


@pytest.mark.filterwarnings("ignore:NDCG is undefined")
@given(
    st.integers(1, 8).flatmap(
        lambda n: st.lists(
            st.tuples(st.lists(SCORE, min_size=n, max_size=n), st.lists(GAIN, min_size=n, max_size=n)),
            min_size=1,
            max_size=4,
        )
    ),
    st.integers(1, 10),
)
def test_ties_go_to_the_lower_index_and_requests_without_gain_are_left_out(
    rows: list[tuple[list[float], list[float]]], k: int
) -> None:
    parts = [part for part in (_ndcg(s, g, k) for s, g in rows) if part is not None]
    expected = sum(parts) / len(parts) if parts else math.nan
    found = ndcg_at_k(torch.tensor([s for s, _ in rows]), torch.tensor([g for _, g in rows]), k)
    assert found == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_ndcg_is_undefined_without_gain_and_refuses_what_is_no_gain() -> None:
    scores = torch.rand(2, 3)
    with pytest.warns(UserWarning, match="NDCG is undefined"):
        assert math.isnan(ndcg_at_k(scores, torch.zeros(2, 3), 2))
    for gain in (-1.0, math.inf):
        with pytest.raises(ValueError, match="gains must be finite and non-negative"):
            ndcg_at_k(scores, torch.full((2, 3), gain), 2)
    with pytest.raises(ValueError, match="NaN"):
        ndcg_at_k(torch.full((2, 3), math.nan), torch.ones(2, 3), 2)
    with pytest.raises(ValueError, match="of one shape"):
        ndcg_at_k(scores, torch.ones(2, 4), 2)
    with pytest.raises(ValueError, match="non-empty"):
        ndcg_at_k(torch.zeros(0, 3), torch.zeros(0, 3), 2)
    with pytest.raises(ValueError, match="at least 1"):
        ndcg_at_k(scores, torch.ones(2, 3), 0)


def test_recall_of_one_relevant_id_is_scikit_learns_top_k_accuracy() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(200, 30, generator=generator)
    relevant = torch.randint(0, 30, (200,), generator=generator)
    ranked = scores.argsort(1, descending=True)
    for k in (1, 4, 29):
        expected = top_k_accuracy_score(relevant, scores, k=k, labels=range(30))
        assert recall_at_k(ranked, relevant, k) == pytest.approx(expected, abs=1e-12)
    assert recall_at_k(ranked, relevant, 100) == 1.0


# Hashes may be negative; -1 alone is padding.
IDS = st.sets(st.sampled_from([-(1 << 63), -5, -2, 0, 1, 2, 3, 1 << 40]), max_size=6).map(sorted)


@pytest.mark.filterwarnings("ignore:recall is undefined")
@given(st.lists(st.tuples(IDS.flatmap(st.permutations), IDS), min_size=1, max_size=5), st.integers(1, 8))
def test_recall_is_a_loop_over_sets(rows: list[tuple[list[int], list[int]]], k: int) -> None:
    ranked, relevant = torch.full((len(rows), 6), -1), torch.full((len(rows), 6), -1)
    shares = []
    for row, (found, wanted) in enumerate(rows):
        ranked[row, : len(found)] = torch.tensor(found, dtype=torch.int64)
        relevant[row, : len(wanted)] = torch.tensor(wanted, dtype=torch.int64)
        if wanted:
            shares.append(len(set(found[:k]) & set(wanted)) / len(wanted))
    expected = sum(shares) / len(shares) if shares else math.nan
    assert recall_at_k(ranked, relevant, k) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_recall_counts_the_relevant_id_in_the_first_k() -> None:
    ranked = torch.tensor([[3, 1, 2], [5, 6, 7], [9, 8, 0]])
    relevant = torch.tensor([1, 7, 4])
    assert recall_at_k(ranked, relevant, 2) == pytest.approx(1 / 3)
    assert recall_at_k(ranked, relevant, 3) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least 1"):
        recall_at_k(ranked, relevant, 0)
    with pytest.raises(ValueError, match="do not fit"):
        recall_at_k(ranked, relevant[:2], 1)
    with pytest.raises(ValueError, match="ids must be integers"):
        recall_at_k(ranked.float(), relevant, 1)
    with pytest.warns(UserWarning, match="recall is undefined"):
        assert math.isnan(recall_at_k(ranked, torch.full((3,), -1), 1))
