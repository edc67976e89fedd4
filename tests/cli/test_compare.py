"""Facts about `fullrank evaluate` and `fullrank compare` on small logs, run as a user would."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import fullrank as fr
from fullrank.cli.main import main


def log(rows: int, shift: int = 0) -> pl.DataFrame:
    items = [(7 * k + k // 11) % 23 for k in range(rows)]
    return pl.DataFrame(
        {
            "user": [f"u{(k * 31) % 37}" for k in range(rows)],
            "item": [f"i{n + shift}" for n in items],
            "price": [float(n % 6) for n in items],
            "time": [60 * k for k in range(rows)],
            "click": [int((k * 7919) % 10 < (6 if n < 8 else 1)) for k, n in enumerate(items)],
        }
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compare")
    keys: dict[str, Any] = {"label": "click", "user_id": "user", "item_id": "item", "timestamp": "time"}
    data = fr.Dataset.from_frame(log(4000), path=place / "data", **keys)
    fr.Dataset.from_frame(log(4000, 5), path=place / "other", **keys)
    fr.Dataset.from_frame(log(4000).with_columns(click=pl.lit(0)), path=place / "never", **keys)
    for name, epochs, rate in (("good", 15, 0.05), ("poor", 1, 1e-6)):
        training = {"epochs": epochs, "learning_rate": rate}
        fr.fit(data, model={"name": "lr"}, training=training).save(place / name)
    return place


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fullrank", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_better_model_is_named(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("compare", work / "poor", work / "good", work / "data")
    code, out, error = run(capsys, monkeypatch, *words, "--json")
    report = strict(out)
    assert (code, error) == (0, "") and report["verdict"] == "B is better"
    auc = report["tasks"]["click"]["auc"]
    assert auc["interval"][0] > 0.02 and auc["difference"] == pytest.approx(auc["b"] - auc["a"])
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and f"{auc['difference']:+.4f}" in out and out.strip().endswith("B is better (click, NE)")
    _, out, _ = run(capsys, monkeypatch, "compare", work / "good", work / "poor", work / "data", "--split", "valid")
    assert out.strip().endswith("A is better (click, NE)")
    again = strict(run(capsys, monkeypatch, *words, "--json", "--seed", 1)[1])["tasks"]["click"]["auc"]
    assert again["difference"] == auc["difference"] and again["interval"] != auc["interval"]


def test_slices_and_warnings_are_printed(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("evaluate", work / "poor", work / "data", "--slice", "price", "--slice", "user")
    code, out, error = run(capsys, monkeypatch, *words)
    assert code == 0 and "other values" in out and "torso" in out
    warning, place = error.strip().splitlines()
    assert place == f"report: {work / 'report-data-test.html'}"
    assert warning.startswith("warning: final, click: NE ") and "of the item's rate in training" in warning
    report = strict(run(capsys, monkeypatch, *words, "--json")[1])
    prices = [part for part in report["slices"] if part["by"] == "price"]
    assert {part["slice"] for part in prices} == {*"012345"}
    assert sum(part["rows"] for part in prices) == report["rows"]
    code, out, error = run(capsys, monkeypatch, "evaluate", work / "good", work / "data")
    assert code == 0 and "warning" not in error


def test_a_log_without_a_positive_is_evaluated_without_nan(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("evaluate", work / "good", work / "never")
    code, out, error = run(capsys, monkeypatch, *words, "--json")
    assert code == 0, error
    assert strict(out)["stages"]["final"]["click"]["auc"] is None
    assert "labels of test are 0: NE and AUC are undefined" in error
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and "undefined" in out and "nan" not in out
    code, out, _ = run(capsys, monkeypatch, "compare", work / "poor", work / "good", work / "never", "--json")
    assert code == 0 and strict(out)["verdict"] == "undefined"
    code, out, _ = run(capsys, monkeypatch, "compare", work / "poor", work / "good", work / "never")
    assert code == 0 and "nan" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("evaluate", "good", "data", "--slice", "prise"),
            'no feature and no further column "prise" to slice by; it has ',
        ),
        (("compare", "good", "poor", "other"), "has another schema or other vocabularies than the bundle"),
        (("compare", "good", "nothing", "data"), "nothing is not a bundle"),
        (("compare", "good", "poor", "data", "--split", "tset"), 'no split "tset"'),
        (("compare", "good", "poor"), "Missing argument 'data'"),
    ],
)
def test_a_mistake_is_one_line(
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    name, *rest = words
    places = {"good", "poor", "other", "data", "nothing"}
    code, out, error = run(capsys, monkeypatch, name, *(work / word if word in places else word for word in rest))
    assert (code, out) == (2, "") and message in error
    assert len(error.strip().splitlines()) == 1
