"""Every kind of bad input, through the command line: one line, exit code 2, and nothing half made or lost."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from fullrank.cli.main import main

SCHEMA = {
    "features": [
        {"kind": "categorical", "name": "item", "role": "item", "encoding": "identity", "num_embeddings": 5},
        {"kind": "numeric", "name": "price"},
    ],
    "labels": [{"name": "click"}],
    "keys": {"request_id": "id", "timestamp": "time"},
}
HEADER = "id,click,item,price,time\n"
GOOD = [f"{n},{n % 2},{n % 5},1.5,{n}\n" for n in range(200)]


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fullrank", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def log(tmp_path: Path, *lines: str) -> Path:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "log.csv").write_text(HEADER + "".join((*GOOD, *lines)))
    return tmp_path / "log.csv"


BAD_ROWS = {
    "wrong type": ("900,1,1,cheap,900\n", 'column "price" is "cheap": not a number'),
    "label outside {0,1}": ("900,2,1,1.5,900\n", 'column "click" is "2": label is not 0 or 1'),
    "infinity": ("900,1,1,inf,900\n", 'column "price" is "inf": not a finite number'),
    "NaN label": ("900,nan,1,1.5,900\n", 'column "click" is "nan": no label'),
    "duplicate key": ("7,1,1,1.5,900\n", 'column "id" is "7": duplicate request id'),
    "id out of range": ("900,1,5,1.5,900\n", 'column "item" is "5": id is not an integer from 0 to 4'),
    "wrong number of fields": ("900,1,1\n", "3 fields, expected 5"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_listed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, message = BAD_ROWS[name]
    path, out = log(tmp_path, line), tmp_path / "out"
    options = ["--schema", tmp_path / "schema.json"]
    code, printed, error = run(capsys, monkeypatch, "data", "import", "csv", path, out, *options)
    assert (code, printed) == (2, "")
    assert len(error.splitlines()) == 1 and f"line 202: {message}" in error
    assert not out.exists()
    assert len((tmp_path / "out.rejected.tsv").read_text().splitlines()) == 2
    code, printed, _ = run(
        capsys, monkeypatch, "data", "import", "csv", path, out, *options, "--max-bad", 0.01, "--json"
    )
    summary = json.loads(printed)
    assert code == 0 and sum(summary["rows"].values()) == 200 and sum(summary["rejected"].values()) == 1


def test_rows_out_of_time_order_are_kept_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = log(tmp_path, "900,1,1,1.5,0\n")
    code, printed, _ = run(
        capsys, monkeypatch, "data", "import", "csv", path, tmp_path / "out", "--schema", tmp_path / "schema.json"
    )
    assert code == 0
    assert any("rows older than the row before" in line and " 1 " in line for line in printed.splitlines())


FILES = {
    "empty": (b"", "log.csv is empty"),
    "not UTF-8": ("caf\xe9,id\n".encode("latin-1"), "log.csv line 1: not UTF-8 text"),
    "unknown column": (b"id,click,item,time\n1,1,1,1\n", 'column "price" is missing; the file has id, click, item'),
    "truncated gzip": (gzip.compress((HEADER + "".join(GOOD)).encode())[:-20], "gzip stream is damaged or cut short"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, message = FILES[name]
    path = log(tmp_path)
    if content[:2] == b"\x1f\x8b":
        path = path.with_suffix(".csv.gz")
    path.write_bytes(content)
    out = tmp_path / "out"
    code, printed, error = run(
        capsys, monkeypatch, "data", "import", "csv", path, out, "--schema", tmp_path / "schema.json"
    )
    assert (code, printed) == (2, "")
    assert len(error.splitlines()) == 1 and message in error
    assert not out.exists()


def test_a_dataset_that_its_schema_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(capsys, monkeypatch, "data", "import", "csv", log(tmp_path), out, "--schema", tmp_path / "schema.json")
    schema = json.loads((out / "schema.json").read_text())
    schema["features"].append({"kind": "numeric", "name": "age"})
    (out / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "recipe.yaml").write_text(f"data: {{dataset: {out}}}\nmodel: {{name: lr}}\n")
    code, _, error = run(capsys, monkeypatch, "train", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert code == 2 and len(error.splitlines()) == 1
    assert 'column "age" of schema.json is missing' in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'"),
        (["train"], "Missing argument 'recipe'; see fullrank train --help"),
        (["demo", "--impressions", "ten"], "Invalid value for '--impressions'"),
        (["models", "--jsn"], "No such option: --jsn"),
        (["serve", "x", "--port", "99999"], "Invalid value for '--port'"),
        (["serve", "x", "--port", "0", "--import", "no_such"], "--import: cannot import no_such: No module named"),
    ],
)
def test_a_mistyped_command_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed, error = run(capsys, monkeypatch, *arguments)
    assert (code, printed) == (2, "")
    assert len(error.splitlines()) == 1 and error.startswith(f"fullrank: {message}")


def test_values_in_brackets_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "[x].csv").write_text("click,c\n1,[/b]\n0,[/b]\n")
    code, _, error = run(capsys, monkeypatch, "data", "inspect", tmp_path / "[x].csv")
    assert code == 0 and "[/b]" in error and "[x].csv" in error


def test_every_help_has_an_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [[], ["data"], *(["data", name] for name in ("import", "simulate", "inspect"))]
    commands += [[name] for name in ("demo", "train", "evaluate", "compare", "serve", "models", "doctor")]
    for command in commands:
        code, printed, _ = run(capsys, monkeypatch, *command, "--help")
        assert code == 0 and "Example: fullrank" in " ".join(printed.split()), command
