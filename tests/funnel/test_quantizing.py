"""Facts about bundles of codes: written by the command, opened, served, refused for training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fullrank as fr
from fullrank.cli.main import main
from fullrank.data.dataset import Dataset
from fullrank.embeddings import EmbeddingCollection
from fullrank.funnel import Funnel, Request, load_bundle, save_bundle
from fullrank.training.manifest import read_manifest
from fullrank.training.run import run


@pytest.fixture(scope="module")
def bundle(funnel: Funnel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantizing") / "bundle"
    save_bundle(funnel, path, about={"seed": 3})
    return path


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fullrank", "quantize", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_a_funnel_of_codes_is_smaller_and_served(bundle: Path, dataset: Dataset, capsys: Any, monkeypatch: Any) -> None:
    small = bundle.with_name("small")
    code, out, _ = command(capsys, monkeypatch, bundle, small, "--json")
    assert code == 0 and "stage retrieval" not in out
    report = json.loads(out)
    assert report["after"] < 0.3 * report["before"] and report["left"] == ["retrieval"]
    assert {part["stage"] for part in report["parts"]} == {"early", "final"}
    for stage in ("early", "final"):
        state = load_file(small / f"{stage}.safetensors")
        packed = {part["name"]: part["after"] for part in report["parts"] if part["stage"] == stage}
        assert {n: t.nbytes for n, t in state.items() if t.dtype == torch.uint8} == packed
    manifest = read_manifest(small)
    assert manifest.about == {"seed": 3, "quantized": {"from": str(bundle), "bits": 4, "method": "greedy"}}
    stores = {table["store"] for stage in manifest.stages[1:] for table in stage.config["tables"].values()}
    assert stores == {"int4"}
    before, after = fr.load(bundle), fr.load(small)
    found = after.recommend(["1"], 5)
    assert found.height == 5
    close = [fitted.evaluate(dataset)["stages"]["final"]["click"]["ne"] for fitted in (before, after)]
    assert close[1] == pytest.approx(close[0], rel=0.01) and close[0] != close[1]


def test_the_server_holds_the_codes_and_nothing_wider(
    bundle: Path, funnel: Funnel, capsys: Any, monkeypatch: Any
) -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from fullrank.serving import create_app

    small = bundle.with_name("served")
    assert command(capsys, monkeypatch, bundle, small, "--method", "least_squares", "--bits", 8)[0] == 0
    content = load_bundle(small)
    assert isinstance(content, Funnel)
    for module in content.final.modules():
        if isinstance(module, EmbeddingCollection):
            assert not list(module.parameters())
    with TestClient(create_app(small)) as client:
        answer = client.post("/v1/recommend", json={"user_id": "1", "k": 3})
    assert answer.status_code == 200, answer.text
    expected = content.recommend([Request("1")], 3)[0]
    assert [item["item_id"] for item in answer.json()["items"]] == [item.item_id for item in expected.items]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", 5], "bits is 5, expected 2, 4 or 8"),
        (["--tables", "items"], 'there is no table "items"; the model has '),
        (["--method", "best"], "method best has no form that is served: expected one of minmax, "),
        (["--max-error", 0], "no table would become smaller: there is nothing to quantise"),
    ],
)
def test_a_mistake_is_one_line(bundle: Path, capsys: Any, monkeypatch: Any, words: list[Any], message: str) -> None:
    code, out, err = command(capsys, monkeypatch, bundle, bundle.with_name("none"), *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"fullrank: {bundle}: {message}")
    assert not bundle.with_name("none").exists()


def test_a_ranker_of_codes_is_served_and_not_trained_further(
    dataset: Dataset, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    model = {"name": "fm", "embedding_dim": 8, "tables": {"item_id": {"kind": "quotient_remainder"}}}
    fitted = fr.fit(dataset, model=model, training={"epochs": 1})
    fitted.save(tmp_path / "model")
    code, out, err = command(capsys, monkeypatch, tmp_path / "model", tmp_path / "small", "--tables", "item_id")
    assert code == 0 and "1 wide" in out and "not chosen" in out and "fullrank compare" in err
    assert fr.load(tmp_path / "small").ranker.packed_tables() == ["item_id"]
    code, _, err = command(capsys, monkeypatch, tmp_path / "small", tmp_path / "again")
    assert code == 2 and 'table "item_id" is quantised already' in err
    recipe = {"data": {"dataset": str(dataset.path)}, "model": model}
    with pytest.raises(
        ValueError, match="small is quantised, and cannot be trained: start from the bundle that it was"
    ):
        run(recipe, start=tmp_path / "small")
    model["tables"] = {"item_id": {"kind": "full", "store": "int4"}}
    with pytest.raises(ValueError, match='table "item_id" is quantised, which is for serving'):
        run(recipe)
