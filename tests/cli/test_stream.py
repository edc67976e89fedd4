"""`fullrank stream` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fullrank.cli.main import app, main
from fullrank.data.simulate import simulate_dataset


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stream")
    simulate_dataset(place / "data", 900, days=3, items=60, users=40)
    settings = {
        "data": {"dataset": str(place / "data")},
        "model": {"name": "lr"},
        "training": {"batch_size": 64},
        "stream": {"window": 86_400},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return place / "recipe.yaml"


def test_it_prints_what_it_did_and_goes_on(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = CliRunner().invoke(app, ["stream", str(recipe), "--out", str(out), "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert found["windows"] == lines and [line["rows"] for line in lines] == [300, 300, 300]
    assert found["current"] == json.loads((out / "current.json").read_text())
    page = (out / "report.html").read_text()
    assert f"{lines[2]['metrics']['click']['ne']:.4f}" in page and "lower NE is better" in page
    again = CliRunner().invoke(app, ["stream", str(recipe), "--out", str(out)])
    assert again.exit_code == 0 and "no window has ended" in again.output
    assert "3 windows so far: 900 events learnt" in again.output
    assert (out / "report.html").read_text() == page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "stream.window=0"], "stream.window: expected"),
        (["--set", "stream.arrivals=true"], "data.source.path is nothing, expected a directory that files arrive in"),
        (["--set", "stream.keep=2"], "stream.keep"),
        (["--set", "training.epochs=3"], "training.epochs is 3"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["fullrank", "stream", str(recipe), "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "current.json").exists()
