"""Facts about pruned bundles: written by the command, opened, served, inspected, quantised after."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import fullrank as fr
from fullrank.cli.main import main
from fullrank.data.dataset import Dataset
from fullrank.funnel import Funnel, load_bundle, save_bundle
from fullrank.training.manifest import read_manifest
from fullrank.training.run import run


@pytest.fixture(scope="module")
def bundle(funnel: Funnel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pruning") / "bundle"
    save_bundle(funnel, path, about={"seed": 3})
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run_it(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fullrank", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run_it


def test_a_pruned_funnel_is_smaller_served_inspected_and_quantised(
    bundle: Path, dataset: Dataset, command: Any
) -> None:
    pruned, both = bundle.with_name("pruned"), bundle.with_name("both")
    code, out, _ = command("prune", bundle, pruned, "--share", 0.6, "--by", "norm", "--json")
    report = json.loads(out)
    assert code == 0 and report["left"] == ["retrieval"]
    done = [part for part in report["parts"] if not part["left"]]
    assert {part["stage"] for part in done} == {"early", "final"}
    for part in done:  # the two reserved ids are kept
        assert part["after"] < part["before"]
        assert part["rows"] - part["kept"] == int(0.6 * (part["rows"] - 2))
    settings = {"from": str(bundle), "by": "norm", "min_count": None, "share": 0.6}
    assert read_manifest(pruned).about == {"seed": 3, "pruned": settings}
    code, out, _ = command("inspect", pruned, "--json")
    told = [table for stage in json.loads(out)["stages"] for table in stage["tables"]]
    assert sum(table["bytes"] for table in told if table["kind"] == "pruned") == sum(part["after"] for part in done)
    code, out, _ = command("quantize", pruned, both, "--json")
    assert code == 0 and json.loads(out)["after"] < json.loads(out)["before"]
    ne = []
    for path in (bundle, pruned, both):
        fitted = fr.load(path)
        assert fitted.recommend(["1"], 5).height == 5
        ne.append(fitted.evaluate(dataset)["stages"]["final"]["click"]["ne"])
    again = fr.load(bundle).prune(share=0.6, by="norm").quantize()
    assert again.evaluate(dataset)["stages"]["final"]["click"]["ne"] == ne[2]
    assert len(set(ne)) == 3 and ne[2] == pytest.approx(ne[1], rel=0.01)


def test_a_threshold_of_zero_writes_the_same_weights(bundle: Path, command: Any) -> None:
    same = bundle.with_name("same")
    code, out, err = command("prune", bundle, same, "--min-count", 0)
    assert code == 0 and "no id would be dropped" in out and "fullrank compare" in err
    for stage in ("early", "final"):
        assert (same / f"{stage}.safetensors").read_bytes() == (bundle / f"{stage}.safetensors").read_bytes()


def test_a_mistake_is_one_line(bundle: Path, command: Any) -> None:
    none = bundle.with_name("none")
    for words, message in (
        ([], "expected either a minimum count or a share"),
        (["--share", 2], "share is 2.0, expected 0 to 1"),
        (["--min-count", 2, "--tables", "items"], 'there is no table "items"; the model has '),
    ):
        code, out, err = command("prune", bundle, none, *words)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"fullrank: {bundle}: {message}")
        assert not none.exists()


def test_a_recipe_of_plain_tables_does_not_start_from_a_pruned_bundle(
    dataset: Dataset, tmp_path: Path, command: Any
) -> None:
    model = {"name": "fm", "embedding_dim": 8}
    fr.fit(dataset, model=model, training={"epochs": 1}).save(tmp_path / "model")
    assert command("prune", tmp_path / "model", tmp_path / "small", "--share", 0.5)[0] == 0
    assert load_bundle(tmp_path / "small")
    recipe = {"data": {"dataset": str(dataset.path)}, "model": model}
    with pytest.raises(ValueError, match="small holds a fm with other settings than the recipe's model"):
        run(recipe, start=tmp_path / "small")
