"""A stream predicts, learns and publishes window by window; killed anywhere, it comes to the same."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from streams import HOUR, START, TIMED, KillAt, Killed, clicks_in_time, files, recipe, run, weights

from fullrank.data.dataset import Dataset, write_dataset
from fullrank.training import Trainer, TrainerConfig, checkpoint, evaluate, load_model
from fullrank.training.deltas import apply_delta, position_of
from fullrank.training.learner import batches_of, fresh_ranker
from fullrank.training.lock import locked
from fullrank.training.publishing import open_current, read_pointer
from fullrank.training.recipe import parse_recipe
from fullrank.training.stream import Hook, Window, stream

SETTINGS: dict[str, dict[str, Any]] = {
    "bundles": {"window": HOUR},
    "deltas": {"window": HOUR, "delta": HOUR // 3},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return clicks_in_time(tmp_path_factory.mktemp("log") / "data")


@pytest.fixture(scope="module")
def whole(log: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The streams of `SETTINGS` that nobody interrupted."""
    place = tmp_path_factory.mktemp("whole")
    for name, settings in SETTINGS.items():
        run(log.path, place / name, settings)
    return place


def hour_of(log: Dataset, hour: int) -> pl.DataFrame:
    return log.scan("train").filter((pl.col("__timestamp") - START) // HOUR == hour).collect()


def test_each_window_is_predicted_by_what_was_published_before_it_and_then_learnt(log: Dataset, whole: Path) -> None:
    """By hand: fits of one pass over each hour, evaluated on the next one."""
    settings = parse_recipe(recipe(log.path, **SETTINGS["bundles"]))
    assert settings.model is not None
    model = fresh_ranker(settings.model, log.encoders, settings.training.seed)
    trainer = Trainer(settings.training, settings.embedding)
    records = [json.loads(line) for line in (whole / "bundles" / "metrics.jsonl").read_text().splitlines()]
    assert [record["begin"] for record in records] == [START + HOUR * hour for hour in (0, 1, 2, 4, 5)]
    assert [record["empty_before"] for record in records] == [0, 0, 0, 1, 0]
    for number, record in enumerate(records):
        hour = (record["begin"] - START) // HOUR
        rows = hour_of(log, hour)
        batches = list(batches_of(rows, model.schema, 1000))
        if number:
            assert record["metrics"]["click"]["ne"] == evaluate(model, batches)["click"]["ne"]
        else:
            assert record["metrics"] == {} and record["served"] is None
        seed = (settings.training.seed * 1_000_003 + record["begin"] // HOUR) % (1 << 31)
        mixed = rows[np.random.default_rng(seed).permutation(rows.height)]
        trainer.config = TrainerConfig.model_validate(
            {**settings.training.model_dump(), "seed": seed, "keep_checkpoints": 0}
        )
        trainer.fit(model, list(batches_of(mixed, model.schema, 32)), warm_start=number > 0)
    served, pointer, _ = open_current(whole / "bundles")
    assert pointer.until == START + 6 * HOUR
    assert all(torch.equal(value, served.state_dict()[name]) for name, value in model.state_dict().items())


def test_deltas_lead_from_each_bundle_to_the_next(whole: Path) -> None:
    place = whole / "deltas"
    names = sorted(path.name for path in (place / "bundles").iterdir())
    assert len(names) == 3  # keep
    for before, after in itertools.pairwise(names):
        model, position = load_model(place / "bundles" / before), position_of(place / "bundles" / before)
        for delta in sorted((place / "deltas" / before).iterdir()):
            position = apply_delta(model, delta, position)
        full = load_model(place / "bundles" / after).state_dict()
        assert position.number == 3 and all(torch.equal(full[name], v) for name, v in model.state_dict().items())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_kill_at_any_call_leaves_something_whole_and_the_stream_goes_on_to_the_same(
    name: str, log: Dataset, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, out, random_ = files(whole / name), tmp_path / "out", random.Random(name)
    at, ended = 1, False
    while not ended:
        with monkeypatch.context() as patched:
            killer = KillAt(patched, at)
            try:
                run(log.path, out, SETTINGS[name])
                ended = True
            except Killed:
                pass
        if (out / "current.json").exists():
            pointer = read_pointer(out)
            _, opened, position = open_current(out)
            assert pointer == opened and position.number == len(opened.deltas)
        at = random_.randint(1, max(2, killer.count + 60))
    assert files(out) == expected


def test_sigkill_loses_nothing(log: Dataset, whole: Path, tmp_path: Path) -> None:
    context, random_ = multiprocessing.get_context("fork"), random.Random(5)
    out, kills = tmp_path / "out", 0
    while kills < 4:
        process = context.Process(target=run, args=(log.path, out, SETTINGS["deltas"]))
        process.start()
        process.join(random_.uniform(0.05, 0.6))
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        process.join()
    run(log.path, out, SETTINGS["deltas"])
    assert files(out) == files(whole / "deltas")


def test_a_damaged_checkpoint_is_gone_behind(log: Dataset, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "bundles", tmp_path / "out")
    newest = checkpoint.list_steps(tmp_path / "out" / "checkpoints")[-1]
    (tmp_path / "out" / "checkpoints" / f"step-{newest:010d}" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="damaged"):
        run(log.path, tmp_path / "out", SETTINGS["bundles"])
    assert files(tmp_path / "out") == files(whole / "bundles")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_that_got_worse_gives_way_and_what_it_learnt_is_as_if_it_had_never_been(
    name: str, tmp_path: Path
) -> None:
    """In hour 2 the labels are the wrong way round, and the model that has learnt more is the worse one there: hour 1
    is forgotten. What has learnt hour 2 is worse in hour 4: hour 2 is forgotten too."""
    settings = {**SETTINGS[name], "rollback": 0.02}
    poisoned = clicks_in_time(tmp_path / "data", rows=600, flipped=2)
    report = run(poisoned.path, tmp_path / "out", settings)
    reasons = [record["rolled_back"] for record in report.windows]
    assert [reason is not None for reason in reasons] == [False, False, True, True, False]
    first = report.windows[0]["published"]
    assert reasons[3].startswith('NE of "click" is 1.') and f"of {first}: more than 2.00% worse, by " in reasons[3]
    assert report.counts["rolled_back"] == 2 * 600 and report.counts["trained"] == 3 * 600
    rest = poisoned.scan("train").filter(((pl.col("__timestamp") - START) // HOUR).is_in([0, 4, 5])).collect()
    clean = write_dataset(tmp_path / "clean", TIMED, {"train": [rest]}, encoded=True)
    run(clean.path, tmp_path / "other", settings)
    last = report.windows[-1]["published"]
    assert weights(tmp_path / "out" / "bundles" / last) == weights(tmp_path / "other" / "bundles" / last)


def test_chance_is_no_reason_for_a_rollback(log: Dataset, tmp_path: Path) -> None:
    """Without a threshold, a difference still has to be more than two standard errors, which are these."""
    report = run(log.path, tmp_path / "out", {"window": HOUR, "rollback": 0.0})
    last = report.windows[-1]
    rows = hour_of(log, 5)
    (batch,) = batches_of(rows, TIMED, 1000)
    losses = []
    for bundle in (last["served"], last["older"]["bundle"]):
        with torch.no_grad():
            logits = load_model(tmp_path / "out" / "bundles" / bundle)(batch).logits_BT
        losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels_BT, reduction="none"))
    worse = (losses[0] - losses[1]).double().flatten()
    expected = float(worse.mean() / (worse.std() / len(worse) ** 0.5))
    assert last["older"]["standard_errors"] == pytest.approx(expected, rel=1e-4)
    for window in report.windows:
        assert window["rolled_back"] is None or window["older"]["standard_errors"] > 2


def test_a_hook_adds_columns_and_sees_what_was_published(log: Dataset, tmp_path: Path) -> None:
    seen: list[str] = []

    class Teacher(Hook):
        def rows(self, window: Window, rows: pl.DataFrame) -> pl.DataFrame:
            assert rows["__timestamp"].is_between(window.begin, window.end - 1).all()
            return rows.with_columns(teacher=pl.lit(0.5, pl.Float32))

        def published(self, window: Window, bundle: Path, record: Any) -> None:
            assert load_model(bundle) and record["published"] == bundle.name
            seen.append(window.name)

    report = stream(recipe(log.path, window=2 * HOUR), tmp_path / "out", hooks=[Teacher()])
    assert seen == [record["window"] for record in report.windows] and len(seen) == 3


def test_one_stream_at_a_time_and_one_recipe_for_ever(log: Dataset, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", "a stream"), pytest.raises(ValueError, match="another process is at a stream there"):
        run(log.path, tmp_path / "out", SETTINGS["bundles"])
    with pytest.raises(ValueError, match=r"holds a stream of another recipe \(stream differ\)"):
        run(log.path, whole / "bundles", SETTINGS["deltas"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="was not made by a stream"):
        run(log.path, tmp_path / "mine", SETTINGS["bundles"])


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("training", "epochs", 2, "training.epochs is 2"),
        ("training", "schedule", "linear", "training.schedule is linear"),
        ("training", "precision", "auto", 'training.precision is "auto"'),
        ("stream", "delta", 7, "expected a multiple of delta"),
    ],
)
def test_settings_that_have_no_meaning_are_refused(
    section: str, field: str, value: object, message: str, log: Dataset, tmp_path: Path
) -> None:
    settings = recipe(log.path)
    settings[section] = {**settings[section], field: value}
    with pytest.raises(ValueError, match=message):
        stream(settings, tmp_path / "out")
