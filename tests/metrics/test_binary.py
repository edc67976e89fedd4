from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import log_loss as sk_log_loss
from sklearn.metrics import roc_auc_score

from fullrank import metrics


def _data(n: int, seed: int, ties: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, generator=generator) * 2
    if ties:
        logits = (logits * 2).round() / 2
    labels = (torch.rand(n, generator=generator) < torch.sigmoid(logits)).float()
    return logits, labels, torch.rand(n, generator=generator)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_auc_and_log_loss_equal_scikit_learn(seed: int, ties: bool) -> None:
    logits, labels, weights = _data(997, seed, ties)
    for weight in (None, weights):
        assert metrics.auc(logits, labels, weight) == pytest.approx(
            roc_auc_score(labels, logits, sample_weight=weight), abs=1e-12
        )
        assert metrics.log_loss(logits, labels, weight) == pytest.approx(
            sk_log_loss(labels, torch.sigmoid(logits.double()), sample_weight=weight), rel=1e-9
        )


def test_constant_prediction_of_the_mean_has_ne_one() -> None:
    _, labels, _ = _data(1000, 0, False)
    rate = labels.double().mean()
    constant = torch.log(rate / (1 - rate)).expand(1000)
    assert metrics.normalized_entropy(constant, labels) == pytest.approx(1.0, abs=1e-12)
    assert metrics.calibration(constant, labels) == pytest.approx(1.0, abs=1e-12)
    assert metrics.auc(constant, labels) == 0.5


def test_extreme_logits_stay_finite() -> None:
    logits, labels = torch.tensor([100.0, -100.0, 100.0]), torch.tensor([1.0, 0.0, 0.0])
    assert metrics.log_loss(logits, labels) == pytest.approx(100 / 3, rel=1e-9)


def test_undefined_values_are_nan_with_a_warning() -> None:
    ones = torch.ones(5)
    with pytest.warns(UserWarning, match="base rate is 0 or 1"):
        assert math.isnan(metrics.normalized_entropy(torch.zeros(5), ones))
    with pytest.warns(UserWarning, match="one class is absent"):
        assert math.isnan(metrics.auc(torch.randn(5), ones))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.tensor([math.nan, 0.0]), torch.tensor([0.0, 1.0]), "NaN"),
        (torch.zeros(2), torch.tensor([0.0, 2.0]), r"\[0, 1\]"),
        (torch.zeros(2), torch.zeros(3), "one length"),
        (torch.zeros(0), torch.zeros(0), "at least one row"),
    ],
)
def test_bad_input_is_refused(logits: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.log_loss(logits, labels)


@pytest.mark.parametrize("weighting", ["impressions", "clicks", "uniform"])
def test_gauc_equals_a_loop_over_users(weighting: str) -> None:
    logits, labels, _ = _data(2000, 1, True)
    users = torch.randint(0, 150, (2000,), generator=torch.Generator().manual_seed(2))
    users[users < 5] = 0
    labels[users == 7] = 1.0
    total, mass, used = 0.0, 0.0, 0
    for user in users.unique():
        rows = users == user
        if labels[rows].min() == labels[rows].max():
            continue
        weight = {"impressions": float(rows.sum()), "clicks": float(labels[rows].sum()), "uniform": 1.0}[weighting]
        total += weight * roc_auc_score(labels[rows], logits[rows])
        mass += weight
        used += 1
    result = metrics.gauc(logits, labels, users, weighting=weighting)  # type: ignore[arg-type]
    assert result.value == pytest.approx(total / mass, abs=1e-12)
    assert (result.groups_used, result.groups) == (used, users.unique().numel())


def test_streaming_and_merging_change_nothing() -> None:
    logits, labels, weights = _data(1000, 3, False)
    users = torch.arange(1000) % 40
    whole, left, right = metrics.BinaryMetrics(), metrics.BinaryMetrics(), metrics.BinaryMetrics()
    whole.update(logits, labels, weights, users)
    left.update(logits[:300], labels[:300], weights[:300], users[:300])
    right.update(logits[300:], labels[300:], weights[300:], users[300:])
    left.merge(right)
    assert left.compute() == whole.compute()
    assert whole.compute()["gauc"] == metrics.gauc(logits, labels, users, weights).value


def test_unobserved_labels_do_not_count() -> None:
    logits, labels, _ = _data(100, 4, False)
    stream, clean = metrics.BinaryMetrics(), metrics.BinaryMetrics()
    clean.update(logits, labels)
    stream.update(torch.cat([logits, torch.zeros(9)]), torch.cat([labels, torch.full((9,), math.nan)]))
    assert stream.compute() == clean.compute()


def test_expected_calibration_error_sees_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200_000, generator=generator)
    labels = (torch.rand(200_000, generator=generator) < torch.sigmoid(logits)).float()
    assert metrics.expected_calibration_error(logits, labels) < 0.01
    shifted = metrics.expected_calibration_error(logits + 0.5, labels)
    gap = float((torch.sigmoid(logits + 0.5) - torch.sigmoid(logits)).mean())
    assert shifted == pytest.approx(gap, abs=0.01)
