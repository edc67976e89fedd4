"""Facts about the rules for parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fullrank.randomized
from fullrank.randomized import LogitCalibrator, leverage_scores, lstsq, sketch
from fullrank.randomized.inputs import TableEstimator
from fullrank.randomized.parameters import FLAG, NONE, integer, number, one_of

PUBLIC = [getattr(fullrank.randomized, name) for name in fullrank.randomized.__all__]
ESTIMATORS = [thing for thing in PUBLIC if isinstance(thing, type) and issubclass(thing, TableEstimator)]


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_parameter_of_a_wrong_type_is_named_in_one_line(kind: Any) -> None:
    X = np.random.default_rng(0).standard_normal((60, 2))
    for name in kind().get_params():
        for value in (object(), ("no", "such"), np.ones((3, 3, 3))):
            with pytest.raises(ValueError, match=rf"\b{name}\b") as caught:
                kind(**{name: value}).fit(X, (X[:, 0] > 0).astype(float))
            assert len(str(caught.value).splitlines()) == 1, name


@pytest.mark.parametrize("name", ["method", "n_knots", "smoothing"])
def test_so_are_those_of_a_calibrator(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is None, expected "):
        LogitCalibrator(**{name: None}).fit([0.0, 1.0], [0, 1])


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (lstsq, ("precision", "method", "sketch", "alpha", "fit_intercept", "refine", "tol", "max_iter")),
        (leverage_scores, ("p", "method", "ridge")),
        (sketch, ("kind", "random_state")),
    ],
)
def test_and_those_of_functions(function: Any, arguments: tuple[str, ...]) -> None:
    A = np.ones((9, 1))
    for name in arguments:
        with pytest.raises(ValueError, match=f"{'sketch' if name == 'kind' else name} is "):
            function(*((A, A) if function is lstsq else (A,)), **{name: object()})


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        (integer(2), (2, np.int32(7)), (1, 2.0, True, "2", None)),
        (number(least=0), (0, 1.5, np.float32(2)), (-1, np.nan, np.inf, False, "1", None)),
        (number(above=0, below=1), (0.5,), (0, 1)),
        (number(least=0, most=1), (0, 1), (1.1,)),
        (FLAG, (True, np.False_), (0, "no", None)),
        (one_of("a", None) | NONE, ("a", None), ("b", ["a"], 0)),
    ],
)
def test_a_rule_holds_for_values_of_its_type_and_range(rule: Any, right: Any, wrong: Any) -> None:
    assert all(rule.holds(value) for value in right)
    assert not any(rule.holds(value) for value in wrong)
