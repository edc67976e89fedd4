"""Facts about metrics of streams: nothing depends on how the rows were cut, and the binned AUC keeps its bound."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fullrank import metrics
from fullrank.metrics import BinaryMetrics, BinnedMetrics

Row = tuple[float, float, float, int]


def _rows(min_size: int = 1) -> st.SearchStrategy[list[Row]]:
    logit = st.one_of(st.floats(-20, 20, width=32), st.sampled_from([0.0, -0.0, 3e38, -3e38, 16.0, -16.0, 15.999]))
    label = st.sampled_from([0.0, 1.0, 1.0, math.nan])
    row = st.tuples(logit, label, st.integers(0, 3).map(float), st.integers(0, 4))
    return st.lists(row, min_size=min_size, max_size=40).filter(
        lambda rows: any(w > 0 and not math.isnan(y) for _, y, w, _ in rows)
    )


def _columns(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, y, w, g = zip(*rows, strict=True)
    return torch.tensor(z), torch.tensor(y), torch.tensor(w), torch.tensor(g)


def _data(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, generator=generator)
    labels = (torch.rand(n, generator=generator) < torch.sigmoid(logits)).float()
    return logits, labels, torch.rand(n, generator=generator), torch.arange(n) % 40


@given(_rows(), st.integers(0, 40))
def test_merging_is_concatenation(rows: list[Row], cut: int) -> None:
    z, y, w, g = _columns(rows)
    whole, left, right = BinaryMetrics(), BinaryMetrics(), BinaryMetrics()
    whole.update(z, y, w, g)
    left.update(z[:cut], y[:cut], w[:cut], g[:cut])
    right.update(z[cut:], y[cut:], w[cut:], g[cut:])
    left.merge(right)
    assert left.compute() == pytest.approx(whole.compute(), abs=0, rel=0, nan_ok=True)
    binned_whole, binned_left, binned_right = BinnedMetrics(), BinnedMetrics(), BinnedMetrics()
    binned_whole.update(z, y, w)
    binned_left.update(z[:cut], y[:cut], w[:cut])
    binned_right.update(z[cut:], y[cut:], w[cut:])
    binned_right.merge(binned_left)
    assert binned_right.compute() == pytest.approx(binned_whole.compute(), rel=1e-12, nan_ok=True)


@given(_rows())
def test_a_weight_is_a_row_repeated_and_a_zero_one_a_row_removed(rows: list[Row]) -> None:
    z, y, w, g = _columns(rows)
    weighted, repeated = BinaryMetrics(), BinaryMetrics()
    weighted.update(z, y, w, g)
    order = torch.arange(len(w)).repeat_interleave(w.long())
    repeated.update(z[order], y[order], None, g[order])
    expected, found = repeated.compute(), weighted.compute()
    for name in ("rate", "logloss", "ne", "auc", "calibration", "ece", "gauc", "groups_used"):
        assert found[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-12, nan_ok=True), name


def test_the_stream_says_what_the_functions_say() -> None:
    logits, labels, weights, users = _data(1000, 3)
    stream = BinaryMetrics(background="train", train_rate=0.3, weighting="clicks")
    for part in torch.arange(1000).split(77):
        stream.update(logits[part], labels[part], weights[part], users[part])
    found = stream.compute()
    grouped = metrics.gauc(logits, labels, users, weights, weighting="clicks")
    assert found == {
        "rows": 1000,
        "rate": pytest.approx(float((weights.double() * labels).sum() / weights.double().sum()), rel=1e-14),
        "logloss": metrics.log_loss(logits, labels, weights),
        "ne": metrics.normalized_entropy(logits, labels, weights, background=0.3),
        "auc": metrics.auc(logits, labels, weights),
        "calibration": metrics.calibration(logits, labels, weights),
        "ece": metrics.expected_calibration_error(logits, labels, weights),
        "gauc": grouped.value,
        "groups": 40,
        "groups_used": grouped.groups_used,
    }


def test_a_stream_keeps_double_precision() -> None:
    # In float32 these two scores tie.
    stream = BinaryMetrics()
    stream.update(torch.tensor([1.0, 1.0 + 2**-40], dtype=torch.float64), torch.tensor([0.0, 1.0]))
    assert stream.compute()["auc"] == 1.0


def test_unobserved_labels_do_not_count() -> None:
    logits, labels, _, _ = _data(100, 4)
    for make in (BinaryMetrics, BinnedMetrics):
        stream, clean = make(), make()
        clean.update(logits, labels)
        # Whatever was predicted for them.
        more = torch.tensor([0.0, math.nan, math.inf])
        stream.update(torch.cat([logits, more]), torch.cat([labels, torch.full((3,), math.nan)]))
        assert stream.compute() == clean.compute()


def test_undefined_values_are_nan_and_no_rows_are_refused() -> None:
    for make in (BinaryMetrics, BinnedMetrics):
        stream = make()
        with pytest.raises(ValueError, match="at least one row"):
            stream.compute()
        stream.update(torch.zeros(2), torch.full((2,), math.nan))
        with pytest.raises(ValueError, match="at least one row"):
            stream.compute()
        stream.update(torch.tensor([0.0, 1.0]), torch.zeros(2))
        found = stream.compute()
        assert all(math.isnan(found[name]) for name in ("ne", "auc", "calibration"))
        assert found["rate"] == 0 and found["logloss"] > 0
        for bad, message in ((math.nan, "NaN or infinity"), (-math.inf, "NaN or infinity")):
            with pytest.raises(ValueError, match=message):
                stream.update(torch.tensor([bad]), torch.ones(1))
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            stream.update(torch.zeros(1), torch.tensor([1.1]))
        with pytest.raises(ValueError, match="non-negative"):
            stream.update(torch.zeros(1), torch.ones(1), -torch.ones(1))
        # A refused batch leaves no trace.
        assert stream.compute() == pytest.approx(found, nan_ok=True)


def test_weights_and_groups_come_with_every_batch_or_with_none() -> None:
    logits, labels, weights, users = _data(10, 5)
    stream, other = BinaryMetrics(), BinaryMetrics()
    stream.update(logits, labels, weights, users)
    with pytest.raises(ValueError, match="either every update has weights or none has"):
        stream.update(logits, labels, None, users)
    with pytest.raises(ValueError, match="either every update has groups or none has"):
        stream.update(logits, labels, weights)
    other.update(logits, labels, weights)
    with pytest.raises(ValueError, match="either every update has groups or none has"):
        stream.merge(other)
    empty = BinaryMetrics()
    stream.merge(empty)
    empty.merge(stream)
    assert empty.compute() == stream.compute()


@given(_rows(), st.sampled_from([1, 2, 7, 64, 16_384]))
def test_the_binned_auc_is_within_the_bound_it_states(rows: list[Row], bins: int) -> None:
    z, y, w, _ = _columns(rows)
    binned, exact = BinnedMetrics(bins), BinaryMetrics()
    binned.update(z, y, w)
    exact.update(z, y, w)
    found, expected = binned.compute(), exact.compute()
    for name in ("rows", "rate", "logloss", "ne", "calibration"):
        assert found[name] == pytest.approx(expected[name], rel=1e-12, nan_ok=True)
    if math.isnan(expected["auc"]):
        assert math.isnan(found["auc"]) and math.isnan(found["auc_error"])
    else:
        assert abs(found["auc"] - expected["auc"]) <= found["auc_error"] + 1e-12
        assert 0 <= found["auc_error"] <= 0.5


def test_the_bound_is_reached_and_vanishes() -> None:
    # All in one bin, perfectly ordered: the worst case.
    binned = BinnedMetrics(bins=1)
    binned.update(torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert binned.compute()["auc"] == 0.5 and binned.compute()["auc_error"] == 0.5
    # No bin has both classes: exact, however large the logits.
    binned = BinnedMetrics()
    logits, labels = torch.tensor([3e38, 5.0, 1.0, -3e38]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    binned.update(logits, labels)
    assert binned.compute()["auc"] == metrics.auc(logits, labels) == 0.75 and binned.compute()["auc_error"] == 0


def test_the_bound_is_below_a_thousandth_for_predictions_that_differ() -> None:
    logits, labels, _, _ = _data(200_000, 6)
    for scale, shift in ((0.4, -7.0), (1.0, 0.0), (3.0, -3.0)):
        binned = BinnedMetrics()
        binned.update(scale * logits + shift, labels)
        found = binned.compute()
        assert found["auc_error"] < 1e-3
        assert found["auc"] == pytest.approx(metrics.auc(scale * logits + shift, labels), abs=1e-4)


def test_histograms_of_other_bins_do_not_merge() -> None:
    with pytest.raises(ValueError, match="histogram of 5 bins into one of 4"):
        BinnedMetrics(4).merge(BinnedMetrics(5))
    with pytest.raises(ValueError, match="bins must be at least 1"):
        BinnedMetrics(0)


def test_columns_of_a_matrix_with_gradients_are_read_and_left_as_they_were() -> None:
    logits, labels, weights, users = _data(200, 7)
    expected = BinaryMetrics()
    expected.update(logits, labels, weights, users)
    logits_BT, labels_BT = torch.stack([logits, logits], 1).requires_grad_(), torch.stack([labels, labels], 1)
    before = [t.detach().clone() for t in (logits_BT, labels_BT, weights, users)]
    stream = BinaryMetrics()
    stream.update(logits_BT[:, 1], labels_BT[:, 1], weights, users)
    assert stream.compute() == expected.compute()
    assert metrics.gauc(logits_BT[:, 0], labels_BT[:, 0], users) == metrics.gauc(logits, labels, users)
    assert metrics.kendall_tau(logits_BT.T, logits_BT.T) == 1.0
    for old, new in zip(before, (logits_BT, labels_BT, weights, users), strict=True):
        assert torch.equal(old, new)
