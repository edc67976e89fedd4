"""`fullrank data` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from fullrank.cli.data import app
from fullrank.data.dataset import Dataset
from fullrank.data.planted import planted_dataset
from fullrank.schema import Schema


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    rows = [(n % 2, f"u{n % 7}", n % 5, n) for n in range(1000)]
    pl.DataFrame(rows, schema=["click", "user_id", "item_id", "timestamp"], orient="row").write_csv(path)
    return path


def test_inspect_edit_import(log: Path, tmp_path: Path) -> None:
    schema_path, out = tmp_path / "schema.json", tmp_path / "out"
    run("inspect", log, "--out", schema_path)
    schema = Schema.read(schema_path)
    edited = schema.model_copy(update={"features": schema.features[1:]})
    schema_path.write_text(edited.to_json())
    summary = json.loads(run("import", "csv", log, out, "--schema", schema_path, "--test", "0.2", "--json"))
    assert summary["rows"] == {"train": 700, "valid": 100, "test": 200}
    assert summary["tables"] == {"item_id": 7}
    dataset = Dataset.open(out)
    assert dataset.scan("test").collect()["__timestamp"].to_list() == list(range(800, 1000))


def test_inspect_prints_one_json_object_or_a_schema_to_edit(log: Path) -> None:
    found = json.loads(run("inspect", log, "--json"))
    assert [column["name"] for column in found["columns"]] == ["click", "user_id", "item_id", "timestamp"]
    assert Schema.model_validate(found["schema"]) == Schema.from_json(run("inspect", log))


def test_what_inspect_suggests_derives_a_history(log: Path, tmp_path: Path) -> None:
    schema_path = tmp_path / "schema.json"
    told = CliRunner().invoke(app, ["inspect", str(log), "--out", str(schema_path)]).stderr
    suggested = next(line for line in told.splitlines() if "earlier items" in line)
    schema = json.loads(schema_path.read_text())
    schema["features"].append(json.loads(suggested[suggested.index("{") : suggested.rindex("}") + 1]))
    schema_path.write_text(json.dumps(schema))
    text = run("import", "csv", log, tmp_path / "out", "--schema", schema_path)
    # Row n is of user n % 7 and clicked where n is odd: users know a click from their second or third row on.
    derived = Dataset.open(tmp_path / "out").derived["history"]
    assert derived["rows_with_events"] == 1000 - sum(1 if user % 2 else 2 for user in range(7))
    assert f"{derived['events']:,}" in text


def test_the_report_counts_every_row(log: Path, tmp_path: Path) -> None:
    with log.open("a") as file:
        file.write("7,u1,1,5\n")
    text = run("import", "csv", log, tmp_path / "out", "--max-bad", "0.01", "--split", "random", "--valid", "0")
    assert "rejected: label is not 0 or 1" in text
    assert str(tmp_path / "out" / "rejected.tsv") in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "weekly"], "split: kind: .* got 'weekly'"),
        (["--split", "given"], "needs the name of its column"),
        (["--valid", "0.9", "--test", "0.2"], "nothing is left to train on"),
        (["--max-bad", "2"], "max_bad is 2.0, expected a share from 0 to 1"),
        (["--schema", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_options_are_one_line(log: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        run("import", "csv", log, tmp_path / "out", *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_simulate_writes_a_planted_task_as_the_python_api_does(tmp_path: Path) -> None:
    options = ["--task", "timed", "--impressions", 2_000, "--seed", 3, "--json"]
    summary = json.loads(run("simulate", tmp_path / "out", *options, "--true-probabilities"))
    assert summary["rows"] == {"train": 1_600, "valid": 200, "test": 200}
    again = planted_dataset(tmp_path / "again", "timed", 2_000, 3)
    for split in ("train", "test"):
        assert Dataset.open(tmp_path / "out").scan(split).collect().equals(again.scan(split).collect())
    run("simulate", tmp_path / "bare", *options)
    assert "__true_click" not in Dataset.open(tmp_path / "bare").scan("train").collect_schema()
    with pytest.raises(ValueError, match='no planted task "order-9", expected one of order-1'):
        run("simulate", tmp_path / "other", "--task", "order-9")
