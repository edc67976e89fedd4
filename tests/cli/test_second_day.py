"""The day after: a new log with the encoders of the old one, evaluated and trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset
from fullrank.training import load_model


def fullrank(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fullrank.cli.main import main; main()", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True)


def done(*words: object) -> dict[str, Any]:
    finished = fullrank(*words, "--json")
    assert finished.returncode == 0, finished.stderr
    printed: dict[str, Any] = json.loads(finished.stdout)
    return printed


def day(path: Path, number: int) -> Path:
    """Clicks of a day; from the second day on there is a new item."""
    items = [f"i{k % (7 + number)}" for k in range(900)]
    clicks = [int((k * 7919 + number) % 10 < (6 if item in ("i0", "i3") else 2)) for k, item in enumerate(items)]
    times = [1_700_000_000 + 86_400 * number + 30 * k for k in range(900)]
    users = [f"u{k % 11}" for k in range(900)]
    frame = pl.DataFrame({"user_id": users, "item_id": items, "timestamp": times, "click": clicks})
    frame.write_csv(path)
    return path


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("days")
    done("data", "import", "csv", day(work / "1.csv", 0), work / "day1")
    model = {"name": "dcn_v2", "hidden": [8], "embedding_dim": 4, "embedding_init": 0.05}
    for number in (1, 2):
        recipe = {"data": {"dataset": str(work / f"day{number}")}, "model": model, "threads": 1}
        recipe["training"] = {"batch_size": 64, "epochs": 2, "learning_rate": 0.02}
        (work / f"{number}.yaml").write_text(json.dumps(recipe))
    done("train", work / "1.yaml", "--out", work / "run1")
    return work


def test_a_new_day_is_evaluated_and_trained_on_with_the_old_encoders(first: Path) -> None:
    bundle = first / "run1" / "model"
    done("data", "import", "csv", day(first / "2.csv", 1), first / "strange")
    refused = fullrank("evaluate", bundle, first / "strange")
    assert refused.returncode == 2 and "fullrank data import ... --like BUNDLE" in refused.stderr
    refused = fullrank("train", first / "2.yaml", "--set", f"data.dataset={first / 'strange'}", "--from", bundle)
    assert refused.returncode == 2 and "--like" in refused.stderr

    done("data", "import", "csv", first / "2.csv", first / "day2", "--like", bundle)
    assert Dataset.open(first / "day2").encoders.agrees_with(Dataset.open(first / "day1").encoders)
    evaluated = done("evaluate", bundle, first / "day2")
    before = evaluated["stages"]["final"]["click"]
    # The item of the second day is new to the model, though this day's training part has it.
    rows = {part["slice"]: part["rows"] for part in evaluated["slices"] if part["by"] == "item"}
    test = Dataset.open(first / "day2").scan("test").collect()
    assert rows["new"] == (test["__item_id"] == "i7").sum() > 0
    report = done("train", first / "2.yaml", "--out", first / "run2", "--from", bundle)
    assert report["test"]["ne"] < before["ne"] + 0.02
    old, new = load_model(bundle).state_dict(), load_model(first / "run2" / "model").state_dict()
    assert old.keys() == new.keys() and not all(torch.equal(old[name], new[name]) for name in old)


def test_what_does_not_go_together_is_one_line(first: Path) -> None:
    bundle = first / "run1" / "model"
    for words, message in (
        (("train", first / "1.yaml", "--set", "model.hidden=[4]", "--from", bundle), "with other settings than"),
        (("train", first / "1.yaml", "--from", first / "nothing"), "is not a bundle"),
        (("data", "import", "csv", first / "1.csv", first / "x", "--like", first / "nothing"), "encoders"),
    ):
        finished = fullrank(*words, *(("--out", first / "other") if words[0] == "train" else ()))
        assert finished.returncode == 2 and message in finished.stderr, finished.stderr
        assert len(finished.stderr.strip().splitlines()) == 1
