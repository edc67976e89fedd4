from __future__ import annotations

import pytest
import torch
from sklearn.metrics import ndcg_score

from fullrank import metrics


def test_ndcg_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, gains = torch.rand(20, 15, generator=generator), torch.rand(20, 15, generator=generator)
    for k in (1, 5, 15):
        assert metrics.ndcg_at_k(scores, gains, k) == pytest.approx(ndcg_score(gains, scores, k=k), abs=1e-7)


def test_any_increasing_transform_of_the_final_value_has_full_recall() -> None:
    final = torch.rand(8, 50, generator=torch.Generator().manual_seed(1))
    assert metrics.ads_recall(final, final.exp() * 3, 10, 10) == 1.0
    assert metrics.value_recall(final, final**3, 10, 10) == pytest.approx(1.0)
    assert metrics.pair_consistency(final, final.log()) == 1.0
    assert metrics.pair_consistency(final, -final) == 0.0


def test_random_scores_keep_n_of_all_candidates() -> None:
    generator = torch.Generator().manual_seed(2)
    final, early = torch.rand(4000, 60, generator=generator), torch.rand(4000, 60, generator=generator)
    assert metrics.ads_recall(final, early, 5, 15) == pytest.approx(15 / 60, abs=0.01)
    assert metrics.ads_recall(final, early, 5, 60) == 1.0


def test_recall_counts_the_relevant_id_in_the_first_k() -> None:
    ranked = torch.tensor([[3, 1, 2], [5, 6, 7], [9, 8, 0]])
    relevant = torch.tensor([1, 7, 4])
    assert metrics.recall_at_k(ranked, relevant, 2) == pytest.approx(1 / 3)
    assert metrics.recall_at_k(ranked, relevant, 3) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least 1"):
        metrics.recall_at_k(ranked, relevant, 0)
