"""Runs as a function: what they leave, and what they never harm."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import SCHEMA, clicks, frame
from torch import Tensor

from fullrank.data.dataset import Dataset, write_dataset
from fullrank.training import Callback, checkpoint, load_model, lock
from fullrank.training.lock import LEFT_OVER_AFTER, locked
from fullrank.training.run import Report, run, train_ranker
from fullrank.training.trainer import Trainer


def a_recipe(dataset: Path, **training: Any) -> dict[str, Any]:
    settings = {"batch_size": 64, "epochs": 2, "learning_rate": 0.01, "checkpoint_every": 3, **training}
    return {"data": {"dataset": str(dataset)}, "model": {"name": "lr"}, "training": settings}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


class Cut(Exception):
    pass


def cut_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From now on training ends before a step, as by a kill but for what a kill leaves."""
    real = Trainer.fit

    class Stop(Callback):
        def after_step(self, now: int, loss: Tensor) -> None:
            if now == step:
                raise Cut

    def fit(self: Trainer, *args: Any, **options: Any) -> Any:
        self.callbacks.append(Stop())
        return real(self, *args, **options)

    monkeypatch.setattr(Trainer, "fit", fit)


def test_a_run_is_the_ranker_it_says_with_or_without_files(dataset: Dataset, tmp_path: Path) -> None:
    report = run(a_recipe(dataset.path), tmp_path / "run")
    alone = run(a_recipe(dataset.path))
    assert report.bundle is not None and alone.bundle is None and alone.directory is None
    assert report.metrics == alone.metrics
    model, result = train_ranker("lr", dataset, _config(a_recipe(dataset.path)))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), load_model(report.bundle).parameters(), strict=True)
    )
    assert result.best["auc"] == report.metrics["valid"]["click"]["auc"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["bundle"] == str(report.bundle)


def _config(recipe: dict[str, Any]) -> Any:
    from fullrank.training import TrainerConfig

    return TrainerConfig(**recipe["training"])


def test_an_earlier_run_gives_way_only_to_a_complete_one(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run(a_recipe(dataset.path), out)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(ValueError, match="holds an earlier run: pass --resume"):
        run(a_recipe(dataset.path), out)
    with pytest.raises(ValueError, match="is not a dataset"):
        run(a_recipe(tmp_path / "nothing"), out, overwrite=True)
    assert contents(out) == before
    with monkeypatch.context() as patch:
        cut_at(patch, 8)
        with pytest.raises(Cut):
            run(a_recipe(dataset.path, seed=3), out, overwrite=True)
    after = contents(out)
    assert {name: after[name] for name in before} == before  # and what the new run has so far, beside it
    resumed = run(a_recipe(dataset.path, seed=3), out, resume=True)
    whole = run(a_recipe(dataset.path, seed=3))
    assert resumed.metrics == whole.metrics and resumed.bundle == out / "model"
    assert not (out / ".next").exists() and (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "recipe.json").read_text())["training"]["seed"] == 3


def test_curves_are_those_of_a_run_that_was_never_cut(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = a_recipe(dataset.path, validate_every=4, checkpoint_every=3)
    whole = run(recipe, tmp_path / "whole").summary()
    with monkeypatch.context() as patch:
        cut_at(patch, 14)  # between two validations, two steps after a checkpoint
        with pytest.raises(Cut):
            run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run", resume=True)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    keys = ("curves", "monitor", "best_step")
    assert {key: found[key] for key in keys} == {key: whole[key] for key in keys}
    curve = found["curves"]["final"]
    assert [point["step"] for point in curve] == [4, 8, 12, 16, 20] and found["monitor"] == {"final": "auc"}
    aucs = {point["step"]: point["valid"]["auc"] for point in curve}
    assert aucs[found["best_step"]["final"]] == max(aucs.values()) == found["valid"]["auc"]
    assert curve[0]["epoch"] == pytest.approx(0.4) and curve[0]["loss"] > curve[-1]["loss"]
    assert found["seconds"]["final"] > 0 and "train_loss" not in curve[0]["valid"]


def test_a_checkpoint_of_before_there_were_curves_is_resumed(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss had a third number, and a run without validation no history."""
    recipe = a_recipe(dataset.path, validate_every=4)
    with monkeypatch.context() as patch:
        cut_at(patch, 8)
        with pytest.raises(Cut):
            run(recipe, tmp_path / "run")
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    state = {**newest.state, "loss": [*newest.state["loss"], 0.5]}
    checkpoint.write(tmp_path / "run" / "checkpoints", newest.step, newest.tensors(), state, keep=10)
    resumed = run(recipe, tmp_path / "run", resume=True)
    assert resumed.metrics == run(recipe).metrics


def test_a_page_that_cannot_be_made_leaves_the_earlier_run_whole(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(a_recipe(dataset.path), out, page=lambda report: f"auc {report.metrics['test']['click']['auc']}")
    before = contents(out)
    assert b"auc 0." in before["report.html"]

    def fail(_: Report) -> str:
        raise Cut

    with pytest.raises(Cut):
        run(a_recipe(dataset.path, seed=3), out, overwrite=True, page=fail)
    after = contents(out)
    assert {name: after[name] for name in before} == before
    run(a_recipe(dataset.path, seed=3), out, overwrite=True, page=lambda report: "new")
    assert (out / "report.html").read_text() == "new"
    run(a_recipe(dataset.path, seed=3), out, overwrite=True)
    assert not (out / "report.html").exists()  # it is not about this run


def test_what_no_run_made_is_left_alone(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"mine/model was not made by a run: choose another --out"):
        run(a_recipe(dataset.path), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "model" / "thesis.txt").exists()


def test_resuming_needs_a_checkpoint_that_is_whole(dataset: Dataset, tmp_path: Path) -> None:
    fresh = run(a_recipe(dataset.path), tmp_path / "mistyped", resume=True)
    assert "there was no run in" in fresh.notes[0]
    run(a_recipe(dataset.path, keep_checkpoints=0), tmp_path / "without")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "empty").mkdir()
    for place in ("without", "home", "empty"):
        with pytest.raises(ValueError, match="has no checkpoint to resume from"):
            run(a_recipe(dataset.path), tmp_path / place, resume=True)
    for file in (tmp_path / "mistyped" / "checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"x" * 40)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="every checkpoint is damaged"):
        run(a_recipe(dataset.path), tmp_path / "mistyped", resume=True)


def test_a_run_is_not_resumed_on_other_rows_of_the_same_shape(tmp_path: Path) -> None:
    data = clicks(tmp_path / "d")
    run(a_recipe(data.path), tmp_path / "run")
    parts = {"train": [frame(600, 8)], "valid": [frame(200, 2)], "test": [frame(200, 3)]}
    write_dataset(data.path, SCHEMA, parts, encoded=True, overwrite=True)
    with pytest.raises(ValueError, match="is of a run on other data: the dataset has changed"):
        run(a_recipe(data.path), tmp_path / "run", resume=True)


def test_files_have_the_modes_of_the_umask(dataset: Dataset, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run(a_recipe(dataset.path), tmp_path / "run")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o644}


def test_one_process_at_a_time_and_a_lock_that_is_left_over_is_taken(tmp_path: Path) -> None:
    message = f"is in use: another process is at a run there .process {os.getpid()} on"
    with locked(tmp_path, "a run"), pytest.raises(ValueError, match=message), locked(tmp_path, "a run"):
        raise AssertionError
    assert not list(tmp_path.iterdir())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for owner in (
        {"host": socket.gethostname(), "process": gone.pid},
        {"host": "elsewhere", "process": 1},
        "no JSON {",
    ):
        (tmp_path / ".lock").write_text(owner if isinstance(owner, str) else json.dumps(owner))
        if owner != {"host": socket.gethostname(), "process": gone.pid}:
            with pytest.raises(ValueError, match="is in use"), locked(tmp_path, "a run"):
                raise AssertionError
            old = time.time() - LEFT_OVER_AFTER - 1
            os.utime(tmp_path / ".lock", (old, old))
        with locked(tmp_path, "a run"):
            assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_of_two_that_find_a_lock_left_over_one_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "process": 1, "token": "old"}))
    old = time.time() - LEFT_OVER_AFTER - 1
    os.utime(path, (old, old))
    faster = {"host": "a third", "process": 2, "token": "new"}
    judge = lock._is_left_over

    def judge_slowly(path: Path, owner: dict[str, Any]) -> bool:
        left_over = judge(path, owner)
        if owner["token"] == "old":
            path.unlink()
            path.write_text(json.dumps(faster))
        return left_over

    monkeypatch.setattr(lock, "_is_left_over", judge_slowly)
    with pytest.raises(ValueError, match="process 2 on a third"), locked(tmp_path, "a run"):
        raise AssertionError
    assert json.loads(path.read_text()) == faster
    assert list(tmp_path.iterdir()) == [path]
