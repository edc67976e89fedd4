"""Facts about `fullrank funnel tune`, run as a user would, and about what it chooses."""

from __future__ import annotations

import json
import sys
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest

from fullrank.cli.main import main
from fullrank.data.dataset import Dataset
from fullrank.data.simulate import simulate_dataset
from fullrank.funnel import Funnel, FunnelConfig, StageSizes, load_bundle, save_bundle, train_funnel
from fullrank.funnel.training import EarlyConfig, FinalConfig
from fullrank.funnel.tuning import tune
from fullrank.training import TrainerConfig
from fullrank.training.manifest import read_manifest


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tune")
    dataset = simulate_dataset(place / "data", 3000, 3, items=80, users=60)
    training = TrainerConfig(batch_size=256)
    final = FinalConfig(model={"name": "din", "hidden": [16], "embedding_dim": 8}, training=training)
    sizes = StageSizes(retrieve=50, keep=20)
    config = FunnelConfig(retrieval="popularity", early=EarlyConfig(training=training), final=final, sizes=sizes)
    funnel = train_funnel(dataset, config)[0]
    save_bundle(funnel, place / "bundle")
    save_bundle(funnel.scorer, place / "ranker")
    return place


@pytest.fixture(scope="module")
def funnel(work: Path) -> Funnel:
    opened = load_bundle(work / "bundle")
    assert isinstance(opened, Funnel)
    return opened


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fullrank", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_the_chosen_sizes_are_the_best_that_the_budget_allows(funnel: Funnel, work: Path) -> None:
    dataset, shares = Dataset.open(work / "data"), []
    for budget in (1.4e6, 2.5e6, 1e9):
        found = tune(funnel, dataset, flops=budget, requests=20)
        chosen = found["chosen"]
        assert chosen["flops"] <= budget
        affordable = [point["value"] for point in found["front"] if point["flops"] <= budget]
        assert chosen["value"] == max(affordable)
        shares.append(chosen["share"])
    assert shares == sorted(shares) and shares[0] < shares[-1] == pytest.approx(1.0)
    low, high = found["gain"]["interval"]
    gain = found["gain"]["value"]
    assert low <= gain <= high and gain == pytest.approx(chosen["value"] - found["current"]["value"])
    assert "true_value" not in chosen  # no world was given
    by_time = tune(funnel, dataset, milliseconds=1e6, requests=5)
    assert by_time["chosen"]["share"] == pytest.approx(1.0) and by_time["costs"]["milliseconds"].keys() == {
        "retrieval",
        "early",
        "final",
    }


def test_write_sets_the_sizes_of_the_bundle_and_nothing_else(
    work: Path, funnel: Funnel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, before = work / "bundle", read_manifest(work / "bundle")
    words = ("funnel", "tune", bundle, work / "data", "--flops", "2.5e6", "--requests", "15")
    code, printed, said = run(capsys, monkeypatch, *words)
    assert code == 0 and "chosen" in printed and "current" in printed and "--write sets them" in said
    assert read_manifest(bundle) == before
    code, printed, said = run(capsys, monkeypatch, *words, "--write", "--json", "--out", work / "found.json")
    assert code == 0 and "written: " in said
    found: dict[str, Any] = json.loads(printed)
    assert json.loads((work / "found.json").read_text()) == found
    assert found["chosen"]["true_value"] <= found["best_true_value"]
    chart = xml.dom.minidom.parseString((work / "found.svg").read_text())
    assert {"chosen", "budget"} <= {node.firstChild.data for node in chart.getElementsByTagName("text")}  # type: ignore[union-attr]
    after = read_manifest(bundle)
    retrieve, keep = found["chosen"]["sizes"]
    assert after.sizes == {"retrieve": retrieve, "keep": keep} != before.sizes
    assert after.model_copy(update={"sizes": before.sizes}) == before
    opened = load_bundle(bundle)
    assert isinstance(opened, Funnel) and opened.sizes == StageSizes(retrieve=retrieve, keep=keep)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bundle", "data"), "expected either --flops or --milliseconds, got neither"),
        (("bundle", "data", "--flops", 1e6, "--milliseconds", 3), "got both"),
        (("bundle", "data", "--flops", "nan"), "--flops is nan, expected a number above 0"),
        (("bundle", "data", "--flops", 10), "no sizes cost 10 flops a request or less: the cheapest cost"),
        (("ranker", "data", "--flops", 1e6), "is the bundle of a single ranker"),
        (("bundle", "data", "--flops", 1e6, "--split", "tset"), 'no split "tset"'),
    ],
)
def test_a_mistake_is_one_line(
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[Any, ...],
    message: str,
) -> None:
    monkeypatch.chdir(work)
    code, printed, said = run(capsys, monkeypatch, "funnel", "tune", *words, "--requests", 3, "--out", "wrong.json")
    assert code == 2 and printed == "" and message in said and said.strip().count("\n") == 0
    assert not (work / "wrong.json").exists()
