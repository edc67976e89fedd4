"""Facts about tables that estimators are given: all of them treat names, sources and targets alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fullrank.randomized
from fullrank.randomized import ArraySource, ParquetSource, PreconditionedSGDRegressor, QMCFeatures
from fullrank.randomized.inputs import TableEstimator

NAMES = ["a", "b", "c"]
PUBLIC = {name: getattr(fullrank.randomized, name) for name in fullrank.randomized.__all__}
ESTIMATORS = {
    name: thing for name, thing in PUBLIC.items() if isinstance(thing, type) and issubclass(thing, TableEstimator)
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    """Columns a, b, c and what they make clicked, in memory and as Parquet of three row groups."""
    frame = pd.DataFrame(np.random.default_rng(0).standard_normal((600, 3)), columns=NAMES)
    frame["click"] = (frame["a"] + 2 * frame["b"] + 3 * frame["c"] > 0).astype(float)
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    frame.to_parquet(path, row_group_size=200)
    return frame, path


def made(name: str) -> Any:
    settings = {"max_iter": 5} if name.startswith("TensorMachine") else {}
    return ESTIMATORS[name](random_state=0, **settings)


def answers(model: Any, X: Any) -> Any:
    return model.transform(X) if isinstance(model, QMCFeatures) else model.predict(X)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_fit_to_a_source_is_one_to_a_data_frame(name: str, log: tuple[pd.DataFrame, Path]) -> None:
    frame, path = log
    X, source = frame[NAMES], ParquetSource(path, NAMES, "click")
    model = made(name).fit(X.rename(columns={"a": "z"}), frame["click"]).fit(source)
    assert list(model.feature_names_in_) == NAMES and model.n_features_in_ == 3
    np.testing.assert_allclose(answers(model, source), answers(model, X), rtol=1e-12)
    np.testing.assert_allclose(answers(model, X), answers(made(name).fit(X, frame["click"]), X), rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="feature names"):
        answers(model, X[["c", "b", "a"]])
    with pytest.raises(ValueError, match=f'column 0 of X is "c", {name} was fitted on "a" there'):
        answers(model, ParquetSource(path, ["c", "b", "a"]))
    with pytest.raises(ValueError, match=f"X has 2 features, {name} was fitted on 3"):
        answers(model, ParquetSource(path, ["a", "b"]))
    with pytest.warns(UserWarning, match=f"{name} was fitted with feature names, X has none"):
        answers(model, ArraySource(X.to_numpy()))
    plain = model.fit(ArraySource(X.to_numpy(), frame["click"]))
    assert not hasattr(plain, "feature_names_in_")
    with pytest.warns(UserWarning, match=f"{name} was fitted without feature names, X has names"):
        answers(plain, source)


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"QMCFeatures"}))
def test_targets_and_weights_are_refused_alike(name: str, log: tuple[pd.DataFrame, Path]) -> None:
    frame, path = log
    X, y = frame[NAMES], frame["click"]
    for weight in (np.zeros(600), np.where(np.arange(600) == 5, -1.0, 1.0), np.ones(599), np.full(600, np.nan)):
        with pytest.raises(ValueError, match=r"(?i)sample.weight"):
            made(name).fit(X, y, weight)
    with pytest.raises(ValueError, match="leave y and sample_weight out"):
        made(name).fit(ParquetSource(path, NAMES, "click"), y)
    with pytest.raises(ValueError, match=r"target"):
        made(name).fit(ParquetSource(path, NAMES))
    if not name.startswith("Randomized"):
        with pytest.raises(ValueError, match="the source has 2 targets, expected 1"):
            made(name).fit(ParquetSource(path, ["a"], ["b", "c"]))
    if name.endswith("Classifier"):
        with pytest.raises(ValueError, match=f"^{name} needs two classes, the target has one class"):
            made(name).fit(X, np.ones(600))


def test_a_fit_that_goes_on_takes_the_columns_that_it_began_with(log: tuple[pd.DataFrame, Path]) -> None:
    frame, path = log
    model = PreconditionedSGDRegressor(random_state=0).partial_fit(ParquetSource(path, NAMES, "click"))
    model.partial_fit(frame[NAMES], frame["click"])
    with pytest.raises(ValueError, match='column 0 of X is "b"'):
        model.partial_fit(ParquetSource(path, ["b", "a", "c"], "click"))
    with pytest.raises(ValueError, match="X has 1 features"):
        model.partial_fit(ParquetSource(path, ["b"], "click"))
