"""The names of the models, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fullrank import models


def test_every_name_is_that_of_its_class() -> None:
    assert [models.MODELS[name].name for name in models.MODELS] == list(models.MODELS)
    assert len(models.MODELS) == len(list(models.MODELS)) and "nonsense" not in models.MODELS
    assert models.DLRM is models.MODELS["dlrm"]
    with pytest.raises(KeyError):
        models.MODELS["nonsense"]
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = models.Nonsense


def test_the_trainer_and_a_plain_model_load_neither_the_compiler_nor_pandas() -> None:
    script = (
        "import sys, fullrank.training, fullrank.data.loader; from fullrank.models import MODELS; MODELS['deepfm']\n"
        "import polars as pl; from fullrank.data.arrow import as_numpy; as_numpy(pl.Series([1, 2]).to_arrow())\n"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'pandas', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
