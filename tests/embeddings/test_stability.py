"""Measures of stability against loops over their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from fullrank.embeddings.semantic_id import (
    aar,
    attention_stats,
    click_loss_rate,
    drift_sensitivity,
    item_segments,
    partition_quality,
    segment_report,
)
from fullrank.metrics import normalized_entropy


def test_segments_end_after_a_quarter_and_three_quarters_of_the_impressions() -> None:
    impressions = torch.tensor([0, 10, 40, 5, 20, 25, 0])  # of 100: 40, 25, 20, 10, 5
    assert item_segments(impressions).tolist() == [3, 2, 0, 2, 1, 1, 3]
    assert item_segments(torch.zeros(3)).tolist() == [3, 3, 3]


def test_a_report_is_the_entropy_of_each_segment_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, 7, (2000,), generator=generator)
    logits = torch.randn(2000, generator=generator)
    labels = (torch.rand(2000, generator=generator) < torch.sigmoid(logits)).float()
    impressions = torch.tensor([0, 10, 40, 5, 20, 25, 0])
    users = torch.randint(0, 50, (2000,), generator=generator)
    report = segment_report(logits, labels, items, impressions, users)
    new = (items == 0) | (items == 6)
    assert report["new"]["rows"] == int(new.sum()) and report["seen"]["rows"] == int((~new).sum())
    assert report["new"]["ne"] == pytest.approx(normalized_entropy(logits[new], labels[new]))
    low, high = report["new"]["interval"]  # type: ignore[misc]
    assert low < report["new"]["ne"] < high  # type: ignore[operator]
    constant = torch.full_like(logits, float(torch.logit(labels.mean())))
    assert segment_report(constant, labels, items, impressions)["all"]["ne"] == pytest.approx(1, abs=1e-6)
    assert math.isnan(segment_report(logits, torch.zeros(2000), items, impressions)["all"]["ne"])  # type: ignore[arg-type]


def test_drift_and_disagreement_are_their_formulas() -> None:
    early = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])
    late = torch.tensor([2.0, -2.0]), torch.tensor([1.0, 0.0])
    assert drift_sensitivity(early, late) == pytest.approx(1 - math.log(1 + math.exp(-2)) / math.log(2))
    found = aar(torch.tensor([0.2, 0.1, 0.0]), torch.tensor([0.2, 0.3, 0.0]))
    assert found.tolist() == pytest.approx([0, 1, 0])
    assert click_loss_rate(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 0, 0])) == -0.5


def test_parts_of_like_items_vary_less_than_random_ones() -> None:
    centres = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    weights = centres.repeat_interleave(5, 0) + 0.1 * torch.randn(150, 6, generator=torch.Generator().manual_seed(1))
    parts = torch.arange(30).repeat_interleave(5)
    good, bad = partition_quality(weights, parts), partition_quality(weights, parts[torch.randperm(150)])
    assert good["variance"] < 0.02 < 0.3 < bad["variance"] and good["distance"] > bad["distance"]
    variance = torch.stack([weights[parts == part].var(0, correction=0).mean() for part in range(30)]).mean()
    means = torch.stack([weights[parts == part].mean(0) for part in range(30)])
    assert good["variance"] == pytest.approx(float(variance), rel=1e-5)
    assert good["distance"] == pytest.approx(float(torch.pdist(means).mean()), rel=1e-5)
    with pytest.raises(ValueError, match="150 parts of at most 1 items: expected two parts, one with two items"):
        partition_quality(weights, torch.arange(150))


def test_attention_is_counted_by_where_it_goes() -> None:
    attention = torch.tensor([[[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]])
    found = attention_stats(attention, torch.tensor([[True, True, False]]))
    assert found["first"] == pytest.approx((0.5 + 1 / 3) / 3)
    assert found["padding"] == pytest.approx((0.25 + 1 / 3) / 3)
    assert found["entropy"] == pytest.approx((1.5 + math.log2(3)) / 3)
    assert found["self"] == pytest.approx((0.5 + 1 + 1 / 3) / 3)
    assert "self" not in attention_stats(attention[:, :2], torch.ones(1, 3, dtype=torch.bool))
