"""Codes of numbers are what the paper says, and models learn from them what scalars cannot say."""

# Shapes: B rows, N numeric columns, T components of a piecewise linear code, D width.

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.encoders import Encoders
from fullrank.embeddings import Tables
from fullrank.layers.numbers import NumberCodes, NumberVectors
from fullrank.models import RANKERS, Ranker
from fullrank.models.base import example_batch
from fullrank.schema import Categorical, Label, Numeric, Schema
from fullrank.training import TrainerConfig
from fullrank.training.manifest import read_manifest, write_manifest
from fullrank.training.run import train_ranker
from fullrank.training.saving import load_model, save_model

TABLES = Tables(embedding_dim=3, init_std=1.0)
MIXED = Schema(
    features=(
        Numeric(name="plain", encoding="scalar"),
        Numeric(name="bins", bins=5, missing_indicator=True),
        Numeric(name="wave", encoding="periodic"),
        Numeric(name="more", bins=8),
        Categorical(name="c", num_embeddings=4),
    ),
    labels=(Label(name="y"),),
)


def batch(schema: Schema, rows: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.rand(rows, len(schema.numeric_columns), generator=generator) * 6 - 1
    return replace(example_batch(schema, rows), numeric_BN=numbers)


def definition(x: float, knots: list[float]) -> list[float]:
    """Equation (1) of the paper, clipped at both ends."""
    code = []
    for low, high in itertools.pairwise(knots):
        code.append(0.0 if x < low else 1.0 if x >= high else (x - low) / (high - low))
    return code


@pytest.mark.parametrize("transform", ["none", "standard"])
def test_a_piecewise_linear_code_is_its_definition(transform: str) -> None:
    rng = np.random.default_rng(0)
    train, rows = rng.lognormal(size=500), [-3.0, 0.0, 0.4, 1.0, 5.0, 1e9, *rng.lognormal(size=20)]
    feature = Numeric(name="x", bins=6, transform=transform)  # type: ignore[arg-type]
    encoders = Encoders.fit(Schema(features=(feature,)), [pl.DataFrame({"x": train})])
    knots = list(encoders.numbers["x"].knots)
    assert len(knots) == 7
    encoded = encoders.transform(pl.DataFrame({"x": rows}))
    numbers_B1 = torch.from_numpy(encoded["x"].to_numpy().copy())[:, None]
    assert numbers_B1.dtype == torch.float32
    codes_BT = NumberCodes(encoders.schema)(replace(example_batch(encoders.schema, len(rows)), numeric_BN=numbers_B1))
    expected = torch.tensor([definition(x, knots) for x in rows], dtype=torch.float32)
    torch.testing.assert_close(codes_BT[:, 1:], expected, atol=1e-5, rtol=0.0)
    assert bool((codes_BT[:, 0] == 0).all())
    in_order = codes_BT[torch.tensor(np.argsort(rows))]
    assert bool((in_order.diff(dim=0) >= 0).all())


def test_a_missing_number_has_a_component_of_its_own_where_training_misses_some() -> None:
    rows = pl.DataFrame({"x": [None, 2.0]}, schema={"x": pl.Float64})
    for train, code in (([0.0, 2.0, 4.0, None], [1.0, 0.0, 0.0]), ([0.0, 2.0, 4.0], [0.0, 1.0, 0.0])):
        encoders = Encoders.fit(
            Schema(features=(Numeric(name="x", bins=2),)), [pl.DataFrame({"x": train}, schema={"x": pl.Float64})]
        )
        numbers_B1 = torch.from_numpy(encoders.transform(rows)["x"].to_numpy().copy())[:, None]
        codes_BT = NumberCodes(encoders.schema)(replace(example_batch(encoders.schema, 2), numeric_BN=numbers_B1))
        assert codes_BT.tolist() == [code, [0.0, 1.0, 0.0]]


def test_vectors_are_in_the_order_of_the_columns_and_linear_in_their_codes() -> None:
    torch.manual_seed(0)
    module, rows = NumberVectors(MIXED, TABLES), batch(MIXED, 7)
    assert MIXED.numeric_columns == ("plain", "bins", "bins__missing", "wave", "more")
    tokens_BND = module(rows)
    for index, column in ((0, 0), (1, 2)):
        torch.testing.assert_close(tokens_BND[:, column], rows.numeric_BN[:, column, None] * module.weight_ND[index])
    for index, column in ((0, 1), (1, 4)):
        for row, x in enumerate(rows.numeric_BN[:, column].tolist()):
            code = torch.tensor([max(-x, 0.0), *(min(max(x - t, 0.0), 1.0) for t in range(8))])
            expected = code @ module.piecewise_PTD[index] + module.piecewise_bias_PD[index]
            torch.testing.assert_close(tokens_BND[row, column], expected, atol=1e-5, rtol=1e-5)
    angles = 2 * math.pi * rows.numeric_BN[:, 3, None] * module.codes.frequencies_QK[0]
    wave = torch.cat([angles.sin(), angles.cos()], 1) @ module.periodic_QKD[0] + module.periodic_bias_QD[0]
    torch.testing.assert_close(tokens_BND[:, 3], wave.relu(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in RANKERS if not RANKERS[name].__module__.startswith("tests")])
def test_no_model_knows_how_a_number_is_encoded(name: str) -> None:
    """Every ranker reads every component of every code, and nothing of a row but its own."""
    torch.manual_seed(0)
    try:
        model = RANKERS[name].from_config(MIXED, {"embedding_init": 0.3})
    except ValueError:
        pytest.skip("wants features that this schema does not have")
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some start at 0
            parameter += 0.1 * torch.randn_like(parameter)
    rows = batch(MIXED, 6)
    logits_BT = model(rows).logits_BT
    for column in range(len(MIXED.numeric_columns)):
        other = rows.numeric_BN.clone()
        other[2, column] = 3.3 - other[2, column]
        changed_B = (model(replace(rows, numeric_BN=other)).logits_BT - logits_BT).abs().amax(1) > 1e-6
        assert changed_B.tolist() == [row == 2 for row in range(6)], MIXED.numeric_columns[column]


def steps(rows: int, seed: int) -> pl.DataFrame:
    """A click is likely for 3 < x < 7 and for the zeros of a zero-inflated number."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 10, rows)
    gain = np.where(rng.random(rows) < 0.7, 0.0, rng.lognormal(5, 1, rows))
    likely: npt.NDArray[np.bool_] = ((x > 3) & (x < 7)) ^ (gain > 0)
    return pl.DataFrame({"x": x, "gain": gain, "click": (rng.random(rows) < np.where(likely, 0.9, 0.1)).astype(int)})


def planted(encoding: str, path: Path) -> tuple[Dataset, Ranker, float]:
    """The dataset, a factorisation machine, and its AUC on validation rows; 0.9 is the best there can be."""
    features = tuple(
        Numeric(name=name, transform="standard", encoding=encoding)  # type: ignore[arg-type]
        for name in ("x", "gain")
    )
    schema = Schema(features=features, labels=(Label(name="click"),))
    dataset = write_dataset(path, schema, {"train": [steps(6000, 0)], "valid": [steps(2000, 1)]})
    training = TrainerConfig(learning_rate=0.02, batch_size=500, epochs=6, seed=0)
    model, result = train_ranker({"name": "fm", "embedding_dim": 4}, dataset, training)
    return dataset, model, next(iter(result.best_tasks.values()))["auc"]


def test_steps_and_zeros_that_scalars_cannot_say_are_learnt(tmp_path: Path) -> None:
    assert planted("scalar", tmp_path / "scalar")[2] < 0.65
    assert planted("piecewise_linear", tmp_path / "piecewise")[2] > 0.85


def test_a_bundle_of_before_encodings_predicts_what_it_did(tmp_path: Path) -> None:
    """Its schema has no encodings, and its weights those of scalars."""
    schema = Schema(
        features=(
            Numeric(name="a", encoding="scalar", missing_indicator=True),
            Numeric(name="b", encoding="scalar"),
            Categorical(name="c", num_embeddings=4),
        ),
        labels=(Label(name="y"),),
    )
    for name, weight in (("dcn_v2", "features.numbers.weight_ND"), ("lr", "terms.0.numeric_N")):
        torch.manual_seed(0)
        model = RANKERS[name].from_config(schema).eval()
        place = tmp_path / name
        save_model(model, place)
        stages = read_manifest(place).stages
        (place / "manifest.json").unlink()
        assert load_file(place / "weights.safetensors")[weight].shape[0] == 3
        written = json.loads((place / "schema.json").read_text())
        for feature in written["features"]:
            if feature["kind"] == "numeric":
                del feature["encoding"], feature["bins"]
        (place / "schema.json").write_text(json.dumps(written))
        write_manifest(place, stages)
        again = load_model(place)
        assert [feature.encoding for feature in again.schema.numeric] == ["scalar", "scalar"]
        rows = batch(schema, 5)
        assert torch.equal(again(rows).logits_BT, model(rows).logits_BT)


def test_knots_that_do_not_fit_the_schema_are_refused(tmp_path: Path) -> None:
    encoders = Encoders.fit(Schema(features=(Numeric(name="x", bins=3),)), [pl.DataFrame({"x": [1.0, 2.0, 3.0]})])
    for knots, message in (([1.0, 3.0, 2.0], "increase"), ([1.0, 2.0, 3.0, 4.0, 5.0], "more than 3 bins")):
        encoders.save(tmp_path)
        stored = json.loads((tmp_path / "encoders.json").read_text())
        stored["numbers"]["x"]["knots"] = knots
        (tmp_path / "encoders.json").write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=message):
            Encoders.load(tmp_path)


def test_a_model_without_numbers_starts_as_it_would_without_this_module() -> None:
    """No random number is drawn for numbers that are not there."""
    schema = Schema(features=(Categorical(name="c", num_embeddings=4),), labels=(Label(name="y"),))
    torch.manual_seed(3)
    NumberVectors(schema, TABLES)
    after = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(2))
