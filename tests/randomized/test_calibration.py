from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

from fullrank.randomized import LogitCalibrator


def log(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """True log-odds and clicks."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-2, 1.5, n)
    return z, (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)


def log_loss(z: np.ndarray, y: np.ndarray) -> float:
    return float((np.logaddexp(0, z) - y * z).mean())


def test_an_affine_distortion_is_undone() -> None:
    z, y = log(200_000, 0)
    for method in ("affine", "piecewise"):
        back = LogitCalibrator(method).fit(2 * z + 1, y).transform(2 * z + 1)
        middle = np.abs(z + 2) < 3
        assert np.abs(back - z)[middle].max() < (0.03 if method == "affine" else 0.25)
    cool = LogitCalibrator("temperature").fit(3 * z, y)
    assert cool.transform(np.array([0.0, 3.0])) == pytest.approx([0.0, 1.0], abs=0.02)


def test_sampling_of_negatives_is_undone_by_the_logarithm_of_its_rate() -> None:
    z, y = log(300_000, 1)
    kept = (y == 1) | (np.random.default_rng(2).random(len(y)) < 0.1)
    biased = z - np.log(0.1)  # what a model learns from the kept rows
    assert 1 / (1 + np.exp(-biased)).mean() != pytest.approx(y.mean(), rel=0.3)
    model = LogitCalibrator("affine").fit(biased, y)
    np.testing.assert_allclose(model.transform(np.array([-1.0, 1.0])) - [-1.0, 1.0], np.log(0.1), atol=0.05)
    assert kept.mean() < 0.5


def test_a_bent_distortion_needs_knots() -> None:
    z, y = log(100_000, 3)
    bent = np.sign(z) * np.abs(z) ** 1.7 + 1
    fresh, truth = log(100_000, 4)
    fresh_bent = np.sign(fresh) * np.abs(fresh) ** 1.7 + 1
    losses = {
        m: log_loss(LogitCalibrator(m).fit(bent, y).transform(fresh_bent), truth) for m in ("affine", "piecewise")
    }
    best = log_loss(fresh, truth)
    assert losses["piecewise"] - best < 5e-4 < 2e-3 < losses["affine"] - best


def test_predictions_around_every_knot_sum_to_what_happened() -> None:
    z, y = log(50_000, 5)
    weight = np.random.default_rng(6).random(50_000)
    model = LogitCalibrator(n_knots=8, smoothing=1e-9).fit(0.3 * z, y, weight)
    assert len(np.unique(model.values_)) == 8
    for knot in range(8):
        near = np.interp(0.3 * z, model.knots_, np.eye(8)[knot]) * weight
        assert near @ model.predict_proba(0.3 * z) == pytest.approx(near @ y, rel=1e-5)
    assert weight @ model.predict_proba(0.3 * z) == pytest.approx(weight @ y, rel=1e-6)


def test_where_the_clicks_fall_the_function_is_flat_and_the_best_that_never_falls() -> None:
    rng = np.random.default_rng(7)
    z = rng.uniform(-2, 2, 3000)
    y = (rng.random(3000) < 0.5 + 0.2 * np.sin(3 * z) + 0.1 * z).astype(float)  # falls, rises, falls
    model = LogitCalibrator(n_knots=7, smoothing=1e-6).fit(z, y)
    steps = np.diff(model.values_)
    assert (steps >= 0).all() and (steps == 0).any() and (steps > 0).any()
    near = np.column_stack([np.interp(z, model.knots_, row) for row in np.eye(7)])
    rising = {"type": "ineq", "fun": lambda v: np.diff(v), "jac": lambda v: np.diff(np.eye(7), axis=0)}

    def slope(v: np.ndarray) -> np.ndarray:
        return near.T @ (1 / (1 + np.exp(-near @ v)) - y) / len(y)

    best = minimize(
        lambda v: log_loss(near @ v, y), np.linspace(-1, 1, 7), jac=slope, constraints=rising, tol=1e-14, method="SLSQP"
    )
    assert log_loss(model.transform(z), y) == pytest.approx(best.fun, rel=1e-6)


def test_whole_weights_are_repetitions_and_weight_zero_is_absence() -> None:
    z, y = log(2000, 8)
    weight = np.random.default_rng(9).integers(0, 4, 2000)
    for method in ("affine", "temperature"):
        weighted = LogitCalibrator(method).fit(z, y, weight).transform(z)
        np.testing.assert_allclose(
            weighted, LogitCalibrator(method).fit(z.repeat(weight), y.repeat(weight)).transform(z)
        )
    present = weight > 0
    pieces = LogitCalibrator().fit(z, y, weight)
    np.testing.assert_array_equal(
        pieces.values_, LogitCalibrator().fit(z[present], y[present], weight[present]).values_
    )


def test_the_order_of_candidates_is_kept_even_beyond_the_knots() -> None:
    z, y = log(20_000, 10)
    model = LogitCalibrator().fit(z, y)
    ends = np.concatenate([z.min() - np.arange(5.0)[::-1], z.max() + np.arange(5.0)])
    assert (np.diff(model.transform(ends))[[0, 1, 2, 3, 5, 6, 7, 8]] > 0.99).all()


def test_log_odds_that_say_nothing_become_the_base_rate() -> None:
    y = (np.arange(1000) % 4 == 0).astype(float)
    for method in ("piecewise", "affine"):
        found = LogitCalibrator(method).fit(np.full(1000, 3.0), y).predict_proba(np.full(3, 3.0))
        np.testing.assert_allclose(found, 0.25, atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0, 1.0], [1, 1]), "all targets are the same"),
        (([0.0, np.nan], [0, 1]), "logits: NaN or infinity, first in row 1"),
        (([[0.0, 1.0]], [1]), r"logits has shape \(1, 2\)"),
        (([0.0, 1.0], [0, 2]), "target of row 1 is 2.0"),
        (([0.0, 1.0], [0, 1], [1, -1]), "weight of row 1 is -1"),
        (([0.0, 1.0], [0]), "expected as many of each"),
    ],
)
def test_impossible_input_is_refused(arguments: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogitCalibrator().fit(*arguments)


@pytest.mark.parametrize("settings", [{"method": "beta"}, {"n_knots": 1}, {"smoothing": 0}])
def test_parameters_out_of_range_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        LogitCalibrator(**settings).fit([0.0, 1.0], [0, 1])


@parametrize_with_checks([LogitCalibrator(), LogitCalibrator("affine")])
def test_scikit_learn_contract(estimator: Any, check: Any) -> None:
    check(estimator)


def test_a_calibrator_ends_a_pipeline() -> None:
    z, y = log(4000, 7)
    frame = pd.DataFrame({"logit": 2 * z + 1})
    pipeline = make_pipeline(FunctionTransformer(), LogitCalibrator("affine")).fit(frame, y)
    np.testing.assert_allclose(pipeline.transform(frame)[:, 0], LogitCalibrator("affine").fit_transform(2 * z + 1, y))
    np.testing.assert_allclose(pipeline.predict_proba(frame), 1 / (1 + np.exp(-pipeline.transform(frame)[:, 0])))
    for wrong, message in ((np.ones((3, 2)), "logits has shape"), (["a", "b"], "logits are no numbers")):
        with pytest.raises(ValueError, match=message):
            LogitCalibrator().fit(wrong, y[:3])
    assert clone(LogitCalibrator("affine", n_knots=5)).get_params() == {
        "method": "affine",
        "n_knots": 5,
        "smoothing": 10.0,
    }
