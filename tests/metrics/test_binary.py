"""Facts about log loss, normalized entropy and calibration, against scikit-learn and SciPy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, log_expit
from scipy.stats import entropy as scipy_entropy
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss as sk_log_loss
from torch import Tensor

from fullrank import metrics

Metric = Callable[..., float]
METRICS: list[Metric] = [
    metrics.log_loss,
    metrics.normalized_entropy,
    metrics.relative_information_gain,
    metrics.calibration,
    metrics.expected_calibration_error,
    metrics.auc,
]


def _data(n: int, seed: int, ties: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, generator=generator) * 2 - 1
    if ties:
        logits = (logits * 2).round() / 2
    labels = (torch.rand(n, generator=generator) < torch.sigmoid(logits)).float()
    return logits, labels, torch.rand(n, generator=generator)


def _exact_loss(z: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    return float(np.average(-y * log_expit(z) - (1 - y) * log_expit(-z), weights=w))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_log_loss_equals_scikit_learn(seed: int, ties: bool) -> None:
    logits, labels, weights = _data(997, seed, ties)
    for weight in (None, weights):
        expected = sk_log_loss(labels, torch.sigmoid(logits.double()), sample_weight=weight)
        assert metrics.log_loss(logits, labels, weight) == pytest.approx(expected, rel=1e-12)


@given(
    st.lists(
        st.tuples(st.floats(-1e6, 1e6), st.sampled_from([0.0, 1.0, 0.3]), st.sampled_from([0.0, 1.0, 1e-9, 1e9])),
        min_size=1,
        max_size=30,
    ).filter(lambda rows: any(w for *_, w in rows))
)
def test_log_loss_equals_scipy_for_any_logit_soft_label_and_weight(rows: list[tuple[float, float, float]]) -> None:
    z, y, w = np.array(rows).T
    found = metrics.log_loss(*(torch.from_numpy(np.ascontiguousarray(column)) for column in (z, y, w)))
    assert found == pytest.approx(_exact_loss(z, y, w), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("logit", [15.0, 21.0, 40.0, 700.0])
def test_a_confident_right_answer_still_costs_something(logit: float) -> None:
    # softplus with a threshold, or a difference of two large numbers, would say 0 or rounding noise.
    for sign, label in ((1, 1.0), (-1, 0.0)):
        found = metrics.log_loss(torch.tensor([sign * logit], dtype=torch.float64), torch.tensor([label]))
        assert found == pytest.approx(math.exp(-logit), rel=1e-6) and found > 0


def test_extreme_logits_stay_finite() -> None:
    logits, labels = torch.tensor([100.0, -100.0, 3e38]), torch.tensor([0.0, 0.0, 0.0])
    assert metrics.log_loss(logits, labels) == pytest.approx((100 + 3e38) / 3, rel=1e-7)
    assert metrics.calibration(logits, torch.tensor([1.0, 0.0, 1.0])) == pytest.approx(1.0, abs=1e-12)


def test_float32_and_float64_of_the_same_numbers_agree_to_the_last_bit() -> None:
    logits, labels, weights = _data(500, 9)
    for metric in METRICS:
        assert metric(logits, labels, weights) == metric(logits.double(), labels.double(), weights.double())


def test_predicting_the_mean_has_ne_one() -> None:
    _, labels, weights = _data(1000, 0)
    for weight in (None, weights):
        rate = float(np.average(labels.double(), weights=weight))
        constant = torch.full((1000,), math.log(rate / (1 - rate)), dtype=torch.float64)
        assert metrics.normalized_entropy(constant, labels, weight) == pytest.approx(1.0, abs=1e-13)
        assert metrics.relative_information_gain(constant, labels, weight) == pytest.approx(0.0, abs=1e-13)
        assert metrics.calibration(constant, labels, weight) == pytest.approx(1.0, abs=1e-13)
        assert metrics.expected_calibration_error(constant, labels, weight) == pytest.approx(0.0, abs=1e-13)


def test_ne_is_the_loss_over_scipys_entropy_of_any_background() -> None:
    logits, labels, weights = _data(800, 1)
    z, y, w = (t.double().numpy() for t in (logits, labels, weights))
    loss, rate = _exact_loss(z, y, w), float(np.average(y, weights=w))
    for background, p in (("eval", rate), (0.25, 0.25), ("train", 0.07)):
        train_rate = p if background == "train" else None
        found = metrics.normalized_entropy(logits, labels, weights, background=background, train_rate=train_rate)  # type: ignore[arg-type]
        assert found == pytest.approx(loss / scipy_entropy([p, 1 - p]), rel=1e-12)


def test_the_true_probabilities_have_the_lowest_expected_ne() -> None:
    # Soft labels are expectations: the true probability minimises the loss exactly, and any shift of it costs.
    logits = _data(500, 2)[0].double()
    truth = torch.sigmoid(logits)
    best = metrics.normalized_entropy(logits, truth)
    for shift in (-0.5, -0.01, 0.01, 0.5):
        assert metrics.normalized_entropy(logits + shift, truth) > best
    assert best < 1 and metrics.expected_calibration_error(logits, truth) < 1e-12


def test_gain_is_positive_when_the_candidate_is_better() -> None:
    assert metrics.normalized_entropy_gain(0.8, 0.79) == pytest.approx(1.25)
    assert metrics.normalized_entropy_gain(0.8, 0.81) == pytest.approx(-1.25)
    with pytest.raises(ValueError, match="positive"):
        metrics.normalized_entropy_gain(0.0, 0.5)


def test_undefined_values_are_nan_with_a_warning() -> None:
    for labels in (torch.ones(5), torch.zeros(5)):
        with pytest.warns(UserWarning, match="base rate is 0 or 1"):
            assert math.isnan(metrics.normalized_entropy(torch.zeros(5), labels))
    with pytest.warns(UserWarning, match="no positive label"):
        assert math.isnan(metrics.calibration(torch.zeros(5), torch.zeros(5)))
    with pytest.warns(UserWarning, match="base rate"):
        # The only positive row weighs nothing.
        labels, weights = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])
        assert math.isnan(metrics.normalized_entropy(torch.zeros(3), labels, weights))


def test_one_row_with_a_soft_label_is_defined() -> None:
    logit, label = torch.tensor([0.5]), torch.tensor([0.25])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.calibration(logit, label) == pytest.approx(float(expit(0.5)) / 0.25)
        assert metrics.normalized_entropy(logit, label) > 1
        assert metrics.expected_calibration_error(logit, label) == pytest.approx(float(expit(0.5)) - 0.25)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("logits", "labels", "weights", "message"),
    [
        ([math.nan, 0.0], [0.0, 1.0], None, "NaN or infinity"),
        ([math.inf, 0.0], [0.0, 1.0], None, "NaN or infinity"),
        ([-math.inf, 0.0], [0.0, 1.0], None, "NaN or infinity"),
        ([0.0, 0.0], [0.0, 2.0], None, r"labels must lie in \[0, 1\]"),
        ([0.0, 0.0], [0.0, math.nan], None, r"labels must lie in \[0, 1\]"),
        ([0.0, 0.0], [0.0, 1.0, 1.0], None, r"labels have shape \(3,\)"),
        ([0.0, 0.0], [0.0, 1.0], [1.0], r"weights have shape \(1,\)"),
        ([0.0, 0.0], [0.0, 1.0], [1.0, -1.0], "non-negative"),
        ([0.0, 0.0], [0.0, 1.0], [1.0, math.nan], "finite"),
        ([0.0, 0.0], [0.0, 1.0], [1.0, math.inf], "finite"),
        ([0.0, 0.0], [0.0, 1.0], [0.0, 0.0], "positive, finite sum"),
        ([0.0, 0.0], [0.0, 1.0], [1.7e308, 1.7e308], "positive, finite sum"),
        ([], [], None, "at least one row"),
        ([[0.0, 0.0]], [[0.0, 1.0]], None, "must be a vector"),
    ],
)
def test_bad_input_is_refused(
    metric: Metric, logits: list[float], labels: list[float], weights: list[float] | None, message: str
) -> None:
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        metric(torch.tensor(logits), torch.tensor(labels), weight)


@pytest.mark.parametrize(
    ("background", "train_rate", "message"),
    [
        ("train", None, "need each other"),
        ("eval", 0.1, "need each other"),
        ("training", None, 'is "training"'),
        (1.5, None, r"\[0, 1\]"),
        (math.nan, None, r"\[0, 1\]"),
        ("train", -0.1, r"\[0, 1\]"),
    ],
)
def test_a_wrong_background_is_refused(background: object, train_rate: float | None, message: str) -> None:
    logits, labels, _ = _data(10, 3)
    kwargs = {"background": background, "train_rate": train_rate}
    with pytest.raises(ValueError, match=message):
        metrics.normalized_entropy(logits, labels, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        metrics.BinaryMetrics(**kwargs)  # type: ignore[arg-type]


def test_reliability_equals_scikit_learns_quantile_curve() -> None:
    logits, labels, _ = _data(1000, 4)
    for bins in (1, 10, 50):
        curve = metrics.reliability(logits, labels, bins=bins)
        expected = calibration_curve(labels, torch.sigmoid(logits.double()), n_bins=bins, strategy="quantile")
        np.testing.assert_allclose(curve.observed_K, expected[0], atol=1e-12)
        np.testing.assert_allclose(curve.predicted_K, expected[1], atol=1e-12)
        assert set(curve.rows_K.tolist()) == {1000 / bins}


def test_bins_hold_equally_many_untied_rows_up_to_one() -> None:
    logits, labels, _ = _data(997, 5)
    rows_K = metrics.reliability(logits, labels, bins=20).rows_K
    assert rows_K.sum() == 997 and rows_K.max() - rows_K.min() <= 1
    # More bins than rows: each row is alone.
    assert metrics.reliability(logits[:7], labels[:7], bins=100).rows_K.tolist() == [1.0] * 7


@given(
    st.lists(
        st.tuples(st.integers(-4, 4), st.sampled_from([0.0, 1.0]), st.integers(0, 3)), min_size=1, max_size=40
    ).filter(lambda rows: any(w for *_, w in rows)),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_the_curve_keeps_the_sums_whatever_the_order_and_weights_repeat_rows(
    rows: list[tuple[int, float, int]], bins: int, random: object
) -> None:
    z, y, w = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    curve = metrics.reliability(z, y, w, bins=bins)
    assert len(curve.rows_K) <= min(bins, len(set(z.tolist())))
    assert bool((curve.predicted_K.diff() > 0).all())
    for found, expected in ((curve.predicted_K, torch.sigmoid(z)), (curve.observed_K, y)):
        assert float((curve.rows_K * found).sum()) == pytest.approx(float((w * expected).sum()))
    repeated = torch.arange(len(w)).repeat_interleave(w.long())
    random.shuffle(order := repeated.tolist())  # type: ignore[attr-defined]
    again = metrics.reliability(z[order], y[order], bins=bins)
    for mine, theirs in zip(curve, again, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_expected_calibration_error_is_between_the_total_bias_and_the_finest_one() -> None:
    logits, labels, weights = _data(1000, 6)
    p, y, w = torch.sigmoid(logits.double()), labels.double(), weights.double()
    bias = abs(float((w * (p - y)).sum() / w.sum()))
    assert metrics.expected_calibration_error(logits, labels, weights, bins=1) == pytest.approx(bias, rel=1e-12)
    nested = [metrics.expected_calibration_error(logits, labels, bins=bins) for bins in (1, 2, 4, 8, 1000)]
    assert nested == sorted(nested)
    assert nested[-1] == pytest.approx(float((p - y).abs().mean()), rel=1e-12)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        metrics.expected_calibration_error(logits, labels, bins=0)


def test_expected_calibration_error_sees_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200_000, generator=generator)
    labels = (torch.rand(200_000, generator=generator) < torch.sigmoid(logits)).float()
    assert metrics.expected_calibration_error(logits, labels) < 0.01
    shifted = metrics.expected_calibration_error(logits + 0.5, labels)
    gap = float((torch.sigmoid(logits + 0.5) - torch.sigmoid(logits)).mean())
    assert shifted == pytest.approx(gap, abs=0.01)
