"""What `verbose=True` tells of a fit, and where."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from fullrank.randomized import (
    ArraySource,
    PreconditionedSGDRegressor,
    QMCFeatures,
    QuantileRegressor,
    RandomizedRidge,
    SubsampledNewtonClassifier,
    TensorMachineRegressor,
)
from fullrank.randomized import progress as module
from fullrank.randomized.engine import map_reduce
from fullrank.randomized.progress import Progress

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3000, 3))
y = (X @ [1.0, -1.0, 0.5] + RNG.standard_normal(3000) > 0).astype(float)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            QuantileRegressor([0.2, 0.7], solver="passes", random_state=0),
            ("2 of 2 quantiles", "quantile 0.7: relative"),
        ),
        (QuantileRegressor(solver="interior_point"), ("quantile 0.5: relative gap",)),
        (SubsampledNewtonClassifier(random_state=0), ("step 0: objective", "step 1")),
        (RandomizedRidge(method="lsqr", random_state=0), ("iteration 1: gradient", "method lsqr")),
        (PreconditionedSGDRegressor(n_steps=500, random_state=0), ("steps on",)),
        (TensorMachineRegressor(max_iter=3, tol=1, random_state=0), ("objective", "held out")),
        (QMCFeatures(sequence="empirical", n_components=8, refine_iter=2, random_state=0), ("refined", "kernel error")),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_fit_tells_of_its_steps_on_standard_error_if_asked(model, words, capsys):
    silent = model.fit(X, y)
    assert capsys.readouterr() == ("", "")
    seen = vars(silent).get("coef_")
    model.set_params(verbose=True).fit(X, y)
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    assert all(line.startswith(f"{type(model).__name__}, ") for line in err.splitlines())
    assert all(word in err for word in words)
    np.testing.assert_array_equal(vars(model).get("coef_"), seen)


def test_a_source_is_quiet_again_after_the_fit(capsys):
    source = ArraySource(X, y)
    model = QuantileRegressor(solver="passes", verbose=True).fit(source)
    capsys.readouterr()
    model.predict(source)
    model.set_params(verbose=False).fit(source)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_slow_pass_rewrites_its_line_in_a_terminal_and_leaves_few_elsewhere(terminal, monkeypatch):
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    clock = iter(np.arange(0, 10_000, 0.25))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(sys, "stderr", Stream())
    source = ArraySource(X, y, fragment_rows=30)
    source.progress = Progress("Model")
    assert map_reduce(source, lambda blocks: sum(len(block) for block in blocks)) == 3000
    source.tell("done")
    text = sys.stderr.getvalue()
    assert "of 100 fragments" in text
    assert text.count("\r") > 5 if terminal else 1 <= text.count("\n") <= 5
    last = text.replace("\r", "\n").splitlines()[-1]
    assert last.rstrip().endswith("done")
    if terminal:  # what was there is written over
        assert len(last) >= len(text.split("\r")[-2].rstrip())
