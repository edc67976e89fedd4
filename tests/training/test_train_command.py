"""`fullrank train` from a log to a model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tables import frame

from fullrank.cli.train import train
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import Encoders
from fullrank.data.loader import Loader, batch_from_frame
from fullrank.training import checkpoint, evaluate, load_model, save_model


def _recipe(path: Path, dataset: Path, extra: str = "") -> Path:
    path.write_text(
        f"data: {{dataset: {dataset}}}\n"
        "model: {name: deepfm, hidden: [8], embedding_dim: 4, embedding_init: 0.01}\n"
        f"training: {{batch_size: 64, epochs: 2, learning_rate: 0.01}}\n{extra}"
    )
    return path


def _train(capsys: pytest.CaptureFixture[str], recipe: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"set_": None, "resume": False, "overwrite": False, "as_json": True, **options}
    train(recipe, out=out, **options)
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_a_run_leaves_a_model_that_has_the_reported_metrics(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _train(capsys, _recipe(tmp_path / "r.yaml", dataset.path), tmp_path / "run")
    model = load_model(tmp_path / "run" / "model")
    assert model.schema == dataset.schema
    again = evaluate(model, Loader(dataset, "test", 50))["click"]
    for name in ("auc", "ne", "logloss"):
        assert report["test"][name] == pytest.approx(again[name], rel=1e-6)
    assert report["parameters"]["total"] == sum(model.num_parameters())
    assert report["samples_per_second"] > 0 and report["seconds"]["total"] > report["seconds"]["fit"] > 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == report
    encoders = Encoders.load(tmp_path / "run" / "model" / "encoders")
    raw = frame(5, 9).rename({"__user_id": "user_key"}).with_columns(pl.col("user", "item").cast(pl.String))
    batch = batch_from_frame(encoders.transform(raw), model.schema)
    with torch.no_grad():
        assert model(batch).logits_BT.shape == (5, 1)


def test_an_earlier_run_is_kept_unless_told(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = _recipe(tmp_path / "r.yaml", dataset.path), tmp_path / "run"
    first = _train(capsys, recipe, out)
    with pytest.raises(ValueError, match="holds an earlier run: pass --resume"):
        _train(capsys, recipe, out)
    resumed = _train(capsys, recipe, out, resume=True)
    assert resumed["test"] == first["test"] and resumed["steps"] == first["steps"]
    train(recipe, set_=None, out=out, resume=True, overwrite=False, as_json=False)
    assert "nothing was left to train" in capsys.readouterr().err
    with pytest.raises(ValueError, match="another training"):
        _train(capsys, recipe, out, resume=True, set_=["training.learning_rate=0.5"])
    changed = _train(capsys, recipe, out, overwrite=True, set_=["training.epochs=1"])
    assert changed["epochs"] == 1
    assert checkpoint.list_steps(out / "checkpoints") == [10]


def test_a_log_is_imported_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    rows = 800
    log = pl.DataFrame(
        {
            "click": random.integers(0, 2, rows),
            "user": random.integers(0, 30, rows),
            "item": random.integers(0, 30, rows),
        }
    )
    log.write_csv(tmp_path / "log.csv")
    (tmp_path / "schema.json").write_text(
        '{"features": [{"kind": "categorical", "name": "user"}, {"kind": "categorical", "name": "item"}],'
        '"labels": [{"name": "click"}]}'
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"data:\n  dataset: {tmp_path}/data\n"
        f"  source: {{format: csv, path: {tmp_path}/log.csv, schema_file: {tmp_path}/schema.json}}\n"
        "model: {name: lr}\n"
    )
    report = _train(capsys, recipe, tmp_path / "run")
    dataset = Dataset.open(tmp_path / "data")
    assert sum(dataset.rows(split) for split in dataset.splits) == rows
    assert report["test"]["rows"] == dataset.rows("test")


def test_a_metric_that_is_undefined_is_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tables import SCHEMA

    from fullrank.data.dataset import write_dataset

    single = frame(40, 2).with_columns(pl.lit(0.0, pl.Float32).alias("click"))
    data = write_dataset(tmp_path / "d", SCHEMA, {"train": [frame(100, 1)], "test": [single]}, encoded=True)
    report = _train(capsys, _recipe(tmp_path / "r.yaml", data.path), tmp_path / "run")
    assert report["test"]["auc"] is None and report["test"]["logloss"] > 0


def test_a_last_batch_of_one_row_is_no_obstacle_to_batch_norm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tables import clicks

    data = clicks(tmp_path / "d", train=129)
    recipe = _recipe(tmp_path / "r.yaml", data.path)
    report = _train(capsys, recipe, tmp_path / "run", set_=["model.batch_norm=true", "training.epochs=1"])
    assert report["steps"] == 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("manifest.json", lambda b: b.replace(b"deepfm", b"deepxx"), 'ranker "deepxx" is unknown; .*"deepfm"'),
        ("manifest.json", lambda b: b[:-4], "is damaged"),
        ("weights.safetensors", lambda b: b[:-4], "does not match its hash"),
        ("manifest.json", lambda b: b.replace(b'"embedding_dim": 4', b'"embedding_dim": 8'), "has shape .*expected"),
        (
            "manifest.json",
            lambda b: b.replace(b'"embedding_dim": 4', b'"embedding_dim": -4'),
            "embedding_dim: .*got -4",
        ),
    ],
)
def test_a_damaged_model_directory_is_refused(
    dataset: Dataset, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    from fullrank.models import MODELS

    model = MODELS["deepfm"].from_config(dataset.schema, {"hidden": (8,), "embedding_dim": 4})
    save_model(model, tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")


def test_what_could_not_be_loaded_is_not_saved(dataset: Dataset, tmp_path: Path) -> None:
    from fullrank.models import RANKERS, register
    from fullrank.models.lr import LR

    class Own(LR):
        name = "own_of_a_test"

    class Pretender(LR):
        pass

    own = Own.from_config(dataset.schema)
    with pytest.raises(ValueError, match=r"Own could not be loaded again, it is not registered: .*models.register"):
        save_model(own, tmp_path / "own")
    with pytest.raises(ValueError, match="another class is registered as 'lr'"):
        save_model(Pretender.from_config(dataset.schema), tmp_path / "own")
    assert not (tmp_path / "own").exists()
    register(Own)
    save_model(own, tmp_path / "own")
    assert isinstance(load_model(tmp_path / "own"), Own)
    RANKERS.unregister("own_of_a_test")
    with pytest.raises(
        ValueError, match=f'"own_of_a_test" is unknown; .*import the package that registers it, {__name__}'
    ):
        load_model(tmp_path / "own")
