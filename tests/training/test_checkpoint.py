"""Checkpoints under damage and interruption; runs under SIGKILL."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from killable import CONFIG, STEPS, model, train
from safetensors.torch import load_file

from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.training import Trainer, TrainerConfig, checkpoint


def _write(directory: Path, step: int, keep: int = 10, **more: Any) -> Path:
    tensors = {"model|weight": torch.full((4, 3), float(step)), "random": torch.arange(5, dtype=torch.uint8)}
    return checkpoint.write(directory, step, tensors, {"epoch": step // 10}, keep=keep, **more)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = _write(tmp_path, 17)
    found = checkpoint.read(path)
    assert found.step == 17 and found.state == {"epoch": 1}
    assert torch.equal(found.tensors("model|")["weight"], torch.full((4, 3), 17.0))
    assert found.tensors("random")[""].tolist() == [0, 1, 2, 3, 4]


def test_views_of_one_buffer_are_stored_each_for_itself(tmp_path: Path) -> None:
    buffer = torch.arange(12.0).view(6, 2)
    checkpoint.write(tmp_path, 1, {"a": buffer[:4], "b": buffer[4:]}, {}, keep=1)
    found = checkpoint.read(tmp_path / "step-0000000001").tensors()
    assert torch.equal(found["a"], buffer[:4]) and torch.equal(found["b"], buffer[4:])


def test_the_newest_are_kept_and_the_protected(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        _write(tmp_path, step, keep=2, protect={1})
    assert checkpoint.list_steps(tmp_path) == [1, 4, 5]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_refused_by_name_and_skipped_in_a_search(
    tmp_path: Path, name: str, damage: str
) -> None:
    _write(tmp_path, 1)
    file = _write(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    if name == "checkpoint.json" and damage == "flip":  # a flipped bit may hit a checksum or the text around it
        file.write_bytes(file.read_bytes().replace(b'"sha256"', b'"sha255"'))
    with pytest.raises(ValueError, match="step-0000000002"):
        checkpoint.of_step(tmp_path, 2)
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint: .*step-0000000002"):
        found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1


def test_a_repeated_run_replaces_the_damaged_future(tmp_path: Path) -> None:
    """Resumed from step 1 because 2 and 3 are damaged, the run must not lose its new step 2 to the count of kept."""
    for step in (1, 2, 3):
        (_write(tmp_path, step) / "state.json").write_text("{}")
    _write(tmp_path, 2, keep=1)
    assert checkpoint.list_steps(tmp_path) == [2]
    assert checkpoint.of_step(tmp_path, 2).step == 2


def test_an_interrupted_write_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, 1)
    rename = os.rename

    def fail(*_: Any) -> None:
        raise OSError("power failure")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="power failure"):
        _write(tmp_path, 2, keep=1)
    monkeypatch.setattr(os, "rename", rename)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1


EMBEDDINGS: list[dict[str, Any]] = [
    {"kind": "dense", "l2": 1e-3},
    {"kind": "adagrad", "learning_rate": 0.05},
    {"kind": "adam", "learning_rate": 0.01, "l2": 1e-2, "l2_mode": "lazy"},
]


@pytest.fixture(scope="module")
def processes() -> Any:
    """Children forked from a server that has imported everything already: each is a real process, and starts fast."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fullrank.data.loader", "fullrank.training", "torch.utils.flop_counter"])
    return context


@pytest.mark.parametrize("embedding", EMBEDDINGS, ids=lambda e: str(e["kind"]))
def test_killed_at_random_moments_it_ends_with_the_bits_of_an_uninterrupted_run(
    dataset: Dataset, tmp_path: Path, processes: Any, embedding: dict[str, Any]
) -> None:
    def start(run: str) -> Any:
        process = processes.Process(
            target=train, args=(dataset.path, tmp_path / run, embedding, tmp_path / f"{run}.st")
        )
        process.start()
        return process

    whole = start("whole")
    whole.join(60)
    assert whole.exitcode == 0
    expected = load_file(tmp_path / "whole.st")
    dice = random.Random(str(embedding))
    log = tmp_path / "killed" / "steps"
    kills, resumed_from = 0, []
    # Strike after so many more steps and a random fraction of a step, which falls into a checkpoint now and then.
    for steps in dice.sample(range(1, 10), 4):
        process = start("killed")
        before = _lines(log)
        while process.is_alive() and _lines(log) < before + steps:
            time.sleep(0.0005)
        time.sleep(dice.random() * 0.01)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join(60)
        resumed_from.append(log.read_text().split()[before] if _lines(log) > before else None)
    last = start("killed")
    last.join(60)
    assert last.exitcode == 0
    found = load_file(tmp_path / "killed.st")
    assert kills >= 3 and any(step not in (None, "1") for step in resumed_from[1:])
    assert _lines(log) > STEPS  # some steps were lost and repeated
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert (tmp_path / "killed.curve").read_bytes() == (tmp_path / "whole.curve").read_bytes()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _fit(dataset: Dataset, run: Path, config: TrainerConfig = CONFIG, *, resume: bool = True) -> Any:
    ranker = model()
    loader = Loader(dataset, "train", 60, shuffle=True, seed=config.seed)
    trainer = Trainer(config, EmbeddingOptimizer(kind="adagrad", learning_rate=0.05))
    result = trainer.fit(ranker, loader, Loader(dataset, "valid", 100), run_directory=run, resume=resume)
    return result, ranker.state_dict()


def test_checkpoints_keep_the_newest_and_the_best_and_a_finished_run_stays_finished(
    dataset: Dataset, tmp_path: Path
) -> None:
    result, weights = _fit(dataset, tmp_path)
    steps = checkpoint.list_steps(tmp_path / "checkpoints")
    assert set(steps) == {28, 30, int(result.best["step"])}
    again, same = _fit(dataset, tmp_path)
    assert again.history == result.history and again.steps == result.steps
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_a_run_that_lost_its_newest_checkpoint_ends_the_same(dataset: Dataset, tmp_path: Path) -> None:
    _, expected = _fit(dataset, tmp_path / "whole")
    _fit(dataset, tmp_path / "cut", CONFIG.model_copy(update={"keep_checkpoints": 100}))
    for step in (26, 28, 30):
        file = tmp_path / "cut" / "checkpoints" / f"step-{step:010d}" / "tensors.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="skipping"):
        _, found = _fit(dataset, tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_another_recipe_is_not_resumed(dataset: Dataset, tmp_path: Path) -> None:
    _fit(dataset, tmp_path)
    with pytest.raises(ValueError, match=r"another training \(learning_rate\)"):
        _fit(dataset, tmp_path, CONFIG.model_copy(update={"learning_rate": 0.01}))
    with pytest.raises(ValueError, match="has checkpoints already"):
        _fit(dataset, tmp_path, resume=False)


def test_no_file_of_a_checkpoint_is_a_pickle(dataset: Dataset, tmp_path: Path) -> None:
    _fit(dataset, tmp_path)
    for path in (tmp_path / "checkpoints").rglob("*.*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".safetensors" and load_file(path)
