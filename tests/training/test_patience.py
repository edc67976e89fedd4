"""Plateau and early stopping on scripted validations."""

from __future__ import annotations

import math

import pytest

from fullrank.training.patience import Patience


def _watch(patience: Patience, values: list[float]) -> list[tuple[bool, float, bool]]:
    seen = []
    for step, value in enumerate(values):
        improved = patience.observe(step, {patience.monitor: value})
        seen.append((improved, patience.scale, patience.stopped))
        if patience.stopped:
            break
    return seen


def test_each_validation_without_gain_lowers_the_rate_and_two_in_a_row_end_training() -> None:
    patience = Patience("auc", factor=0.1, limit=2)
    seen = _watch(patience, [0.70, 0.72, 0.71, 0.73, 0.73, 0.72, 0.99])
    assert [improved for improved, _, _ in seen] == [True, True, False, True, False, False]
    assert [scale for _, scale, _ in seen] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001])
    assert [stopped for _, _, stopped in seen] == [False] * 5 + [True]
    assert patience.best_step == 3 and patience.best == {"auc": 0.73}


def test_losses_are_better_when_lower() -> None:
    assert [improved for improved, *_ in _watch(Patience("logloss"), [0.5, 0.4, 0.45, 0.39])] == [
        True,
        True,
        False,
        True,
    ]


def test_a_gain_within_rounding_is_none() -> None:
    assert [improved for improved, *_ in _watch(Patience("auc"), [0.7, 0.7 + 1e-7, 0.7 + 2e-6])] == [True, False, True]


def test_without_a_limit_training_never_stops() -> None:
    assert not any(stopped for *_, stopped in _watch(Patience("auc"), [0.7] * 50))


def test_an_undefined_metric_is_worse_than_any_number() -> None:
    assert [improved for improved, *_ in _watch(Patience("auc"), [math.nan, 0.4, math.nan])] == [True, True, False]


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match='"gauc".*it has auc, ne'):
        Patience("gauc").observe(1, {"auc": 0.5, "ne": 1.0})


def test_state_restores_it() -> None:
    patience = Patience("auc", factor=0.5, limit=3)
    _watch(patience, [0.7, 0.6])
    assert Patience(**patience.state()) == patience


def test_a_sum_of_metrics_is_watched_as_one() -> None:
    patience = Patience("auc+gauc", limit=2)
    assert patience.observe(1, {"auc": 0.70, "gauc": 0.60})
    assert not patience.observe(2, {"auc": 0.71, "gauc": 0.58})
    assert patience.observe(3, {"auc": 0.69, "gauc": 0.62})
    with pytest.raises(ValueError, match="does not have gauc"):
        patience.observe(4, {"auc": 0.7})
