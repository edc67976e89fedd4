"""Facts about the room where its extra is not installed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fullrank.extras import MissingExtra
from fullrank.randomized import QuantileRegressor

INSTALL = "pip install 'fullrank[randomized]'"
IMPORT = """
import sys
sys.modules["{missing}"] = None
from fullrank.randomized import {name}
"""


@pytest.mark.parametrize(("missing", "package"), [("scipy", "scipy"), ("sklearn", "scikit-learn")])
def test_an_estimator_says_what_it_needs_in_one_line(missing: str, package: str) -> None:
    code = IMPORT.format(missing=missing, name="QuantileRegressor")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = ran.stderr.strip().splitlines()[-1]
    assert last == f"fullrank.extras.MissingExtra: fullrank.randomized needs {package}: {INSTALL}"


def test_dask_is_needed_only_by_those_who_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name == "dask" or name.startswith("dask.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "dask", None)
    X = np.arange(20.0)[:, None]
    assert QuantileRegressor().fit(X, X[:, 0]).coef_ == pytest.approx([1.0])
    with pytest.raises(MissingExtra) as caught:
        QuantileRegressor(executor="dask").fit(X, X[:, 0])
    assert str(caught.value) == f'executor "dask" needs dask: {INSTALL}'
