"""The names of the models, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from fullrank import models
from fullrank.schema import Categorical, Label, Schema


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


def test_members_have_the_tables_of_the_ranker_that_holds_them_unless_they_say_otherwise() -> None:
    outer = {"embedding_dim": 8, "embedding_init": 0.5, "members": ["lr", {"name": "dcn_v2", "embedding_dim": 4}]}
    config = models.MODELS["cetnet"].Config.model_validate(outer)
    assert [(m.config.embedding_dim, m.config.embedding_init) for m in config.members] == [(8, 0.5), (4, 0.5)]
    again = models.MODELS["cetnet"].Config.model_validate(config.model_dump(mode="json"))
    assert again == config
    assert models.MODELS["hilomoe"].Config(embedding_dim=6).backbone.config.embedding_dim == 6  # type: ignore[attr-defined]


def test_a_ranker_of_ones_own_is_named_like_the_others() -> None:
    class Mine(models.LR):  # type: ignore[misc, name-defined]
        name = "mine_in_a_test"

    schema = Schema(features=(Categorical(name="item", num_embeddings=5),), labels=(Label(name="y"),))
    with pytest.raises(ValidationError, match="has to be registered first"):
        models.RankerSpec.of("mine_in_a_test")
    assert models.register(Mine) is Mine
    assert isinstance(models.RankerSpec.of("mine_in_a_test").build(schema), Mine)
    with pytest.raises(ValueError, match='the ranker "lr" exists already'):
        models.register(type("LR", (models.LR,), {"name": "lr"}))


@pytest.mark.parametrize("name", list(models.MODELS))
def test_sizes_that_cannot_be_are_refused_by_every_ranker(name: str) -> None:
    config = models.MODELS[name].Config
    for field, info in config.model_fields.items():
        default = info.get_default(call_default_factory=True)
        numeric = isinstance(default, int | float) and not isinstance(default, bool)
        sizes = isinstance(default, tuple) and default and all(isinstance(size, int) for size in default)
        if field in ("seed",) or not (numeric or sizes):
            continue
        with pytest.raises(ValidationError) as caught:
            config.model_validate({field: [-1] if sizes else -1})
        assert caught.value.errors()[0]["loc"][0] == field


def test_a_ranker_of_histories_says_how_to_get_one() -> None:
    schema = Schema(features=(Categorical(name="item", num_embeddings=5),), labels=(Label(name="y"),))
    with pytest.warns(UserWarning, match='DIN reads .*"kind": "sequence".*import the log again'):
        models.RankerSpec.of("din").build(schema)
