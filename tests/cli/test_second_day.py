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
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from fullrank.cli.main import app
from fullrank.data.dataset import Dataset
from fullrank.serving import create_app
from fullrank.training import load_model


def fullrank(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fullrank.cli.main import main; main()", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True)


def done(*words: object) -> dict[str, Any]:
    finished = CliRunner().invoke(app, [*(str(word) for word in words), "--json"])
    assert finished.exit_code == 0, finished.output
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
        recipe = {"data": {"dataset": str(work / f"day{number}")}, "model": model}
        recipe["training"] = {"batch_size": 64, "epochs": 2, "learning_rate": 0.02}
        (work / f"{number}.yaml").write_text(json.dumps(recipe))
    done("train", work / "1.yaml", "--out", work / "run1")
    return work


def test_a_new_day_is_evaluated_and_trained_on_with_the_old_encoders(first: Path) -> None:
    bundle = first / "run1" / "model"
    done("data", "import", "csv", day(first / "strange.csv", 5), first / "strange")
    refused = fullrank("evaluate", bundle, first / "strange")
    assert refused.returncode == 2 and "fullrank data import ... --like BUNDLE" in refused.stderr
    refused = fullrank("train", first / "2.yaml", "--set", f"data.dataset={first / 'strange'}", "--from", bundle)
    assert refused.returncode == 2 and "--like" in refused.stderr

    done("data", "import", "csv", day(first / "2.csv", 1), first / "day2", "--like", bundle)
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


def test_new_items_are_learnt_evaluated_and_served_day_after_day(first: Path) -> None:
    old = first / "run1" / "model"
    for number in (2, 3):
        log = day(first / f"{number}.csv", number)
        grown = done("data", "import", "csv", log, first / f"grown{number}", "--like", old, "--extend")
        assert grown["new_ids"] == {"item_id": 2 if number == 2 else 1}
        done("data", "import", "csv", log, first / f"plain{number}", "--like", old)
        seen, known = (done("evaluate", old, first / f"{kind}{number}") for kind in ("grown", "plain"))
        assert seen == known  # to the old bundle new items are unknown
        words = ["train", first / "2.yaml", "--set", f"data.dataset={first / f'grown{number}'}", "--from", old]
        report = done(*words, "--out", first / f"grown_run{number}")
        bundle = first / f"grown_run{number}" / "model"
        assert (
            report["test"]["ne"] == done("evaluate", bundle, first / f"grown{number}")["stages"]["final"]["click"]["ne"]
        )
        items = f"i{5 + number}", f"i{6 + number}", "never seen"
        rows = [{"user_id": "u1", "item_id": item} for item in items]
        scores = []
        for served in (old, bundle):
            with TestClient(create_app(served)) as client:
                answer = client.post("/v1/score", json={"rows": rows}).json()["items"]
                scores.append([row["predictions"]["click"] for row in answer])
        if number == 2:
            assert scores[0][0] == scores[0][1] == scores[0][2]
        else:
            assert scores[0][1] == scores[0][2] != scores[0][0]
        assert len(set(scores[1])) == 3
        old = bundle
    values = Dataset.open(first / "grown3").encoders.vocabularies["item_id"].values.to_list()
    assert values == [f"i{number}" for number in range(10)]


def test_what_does_not_go_together_is_one_line(first: Path) -> None:
    bundle = first / "run1" / "model"
    for words, message in (
        (("train", first / "1.yaml", "--set", "model.hidden=[4]", "--from", bundle), "with other settings than"),
        (("train", first / "1.yaml", "--from", first / "nothing"), "is not a bundle"),
        (("data", "import", "csv", first / "1.csv", first / "x", "--like", first / "nothing"), "encoders"),
        (("data", "import", "csv", first / "1.csv", first / "x", "--extend"), "name it with --like BUNDLE or DATASET"),
    ):
        finished = fullrank(*words, *(("--out", first / "other") if words[0] == "train" else ()))
        assert finished.returncode == 2 and message in finished.stderr, finished.stderr
        assert len(finished.stderr.strip().splitlines()) == 1
