from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def fullrank(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = "from fullrank.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_help_names_every_command() -> None:
    done = fullrank("--help")
    assert done.returncode == 0
    for command in (
        "demo",
        "data",
        "train",
        "evaluate",
        "compare",
        "serve",
        "plan-memory",
        "inspect",
        "models",
        "doctor",
    ):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("data: {dataset: d}\nmodel: {name: dcn_v2, num_cross_layer: 3}\n", "num_cross_layer.*did you mean"),
        ("data: {dataset: d}\nmodel: {name: dcn_v3}\n", "model.name.*dcn_v2"),
        ("data: {dataset: d}\nmodel: {name: lr}\ntraining: {epochs: two}\n", "training.epochs.*'two'"),
        ("data: {dataset: nowhere}\nmodel: {name: lr}\n", "nowhere is not a dataset"),
    ],
)
def test_a_bad_recipe_is_one_line_and_exit_code_2(tmp_path: Path, recipe: str, message: str) -> None:
    import re

    (tmp_path / "recipe.yaml").write_text(recipe)
    done = fullrank("train", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_missing_file_is_named() -> None:
    done = fullrank("train", "no-such-recipe.yaml")
    assert done.returncode == 2
    assert "no-such-recipe.yaml" in done.stderr and "Traceback" not in done.stderr


def test_models_as_json() -> None:
    done = fullrank("models", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)["models"]}
    assert set(rows) >= {"lr", "fm", "deepfm", "dcn_v2", "dlrm", "autoint", "finalmlp", "din", "mmoe", "ple"}
    assert rows["lr"]["embedding_parameters"] == 39_000
    assert rows["dcn_v2"]["flops_per_example"] > rows["dlrm"]["flops_per_example"] > 0


def test_the_fields_of_a_model_are_listed() -> None:
    done = fullrank("models", "dcn_v2", "--json")
    fields = {row["name"]: row for row in json.loads(done.stdout)["fields"]}
    assert fields["low_rank"]["type"] == "int >= 0" and fields["low_rank"]["default"] == "0"
    assert fields["low_rank"]["meaning"].startswith("rank R of the mixture")
    assert fields["embedding_dim"]["meaning"].startswith("width of every table")
    done = fullrank("models", "dcn_v2")
    assert all(name in done.stdout for name in fields)


def test_an_unknown_model_is_one_line() -> None:
    done = fullrank("models", "dcn_v3")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "dcn_v3" in done.stderr and 'did you mean "dcn_v2"?' in done.stderr


def test_doctor_measures_this_machine() -> None:
    done = fullrank("doctor", "--json")
    report = json.loads(done.stdout)
    assert report["float32_gflops"] > 1 and report["memory_gb_per_s"] > 0.1
