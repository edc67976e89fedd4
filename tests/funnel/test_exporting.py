"""Facts about rankers as programs of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fullrank.cli.main import app
from fullrank.data.encoders import Encoders
from fullrank.data.simulate import simulate_dataset
from fullrank.extras import EXTRAS
from fullrank.funnel import Scorer, exporting, save_bundle
from fullrank.funnel.exporting import export_ranker, random_batch
from fullrank.models import RANKERS, Ranker

# Pooled by attention, encoders over histories, several tasks by two sides.
EXPORTED = ["din", "bst", "early_stage"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    path = tmp_path_factory.mktemp("log") / "data"
    return simulate_dataset(path, 1500, 3, items=60, users=40).encoders


def made(encoders: Encoders, name: str) -> Ranker:
    torch.manual_seed(0)
    model = RANKERS[name].from_config(encoders.schema, {"embedding_dim": 8})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_random_batches_are_valid(encoders: Encoders) -> None:
    batch = random_batch(encoders.schema, 50, seed=1)
    model = made(encoders, "din")
    assert model(batch).logits_BT.shape == (50, 3) and len(batch) == 50
    item, _ = batch.jagged("history.item")
    age, lengths_B = batch.events("history.age")
    assert len(item) == len(age) == int(lengths_B.sum()) > 50
    assert int(random_batch(encoders.schema, 5, seed=1, empty=True).jagged_lengths_KB.sum()) == 0


@pytest.mark.parametrize("name", EXPORTED)
def test_the_program_is_the_ranker_at_any_size(encoders: Encoders, name: str, tmp_path: Path) -> None:
    model = made(encoders, name)
    said = export_ranker(model, tmp_path / "out")
    assert said == json.loads((tmp_path / "out" / "model.json").read_text()) and said["max_difference"] <= 1e-5
    assert [task["name"] for task in said["tasks"]] == ["click", "conversion", "hide"]
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    batch = random_batch(encoders.schema, 77, seed=5)
    tensors = {
        "numbers": batch.numeric_BN,
        "ids": batch.ids_BF,
        "list_lengths": batch.jagged_lengths_KB,
        "list_values": batch.jagged_values,
        "event_lengths": batch.event_lengths_EB,
        "event_values": batch.event_values,
    }
    given = [tensors[part["name"]] for part in said["inputs"]]
    for part, tensor in zip(said["inputs"], given, strict=True):
        assert str(tensor.dtype) == f"torch.{part['dtype']}" and len(part["shape"]) == tensor.dim()
    torch.testing.assert_close(program(*given), model(batch).logits_BT, rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_refused_in_one_line(encoders: Encoders, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^dien cannot be exported as torch-export: [^\n]+$"):
        export_ranker(made(encoders, "dien"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_program_that_says_something_else_is_not_written(
    encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def skewed(program: exporting.Program, path: Path) -> exporting.Run:
        def run(tensors: dict[str, Tensor]) -> Tensor:
            logits_BT: Tensor = program(*tensors.values())
            return logits_BT + 2e-5

        return run

    monkeypatch.setattr(exporting, "_torch_export", skewed)
    with pytest.raises(ValueError, match="lr as torch-export says something else: logits differ by up to 2"):
        export_ranker(made(encoders, "lr"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_exports_a_stage_of_a_bundle(encoders: Encoders, tmp_path: Path) -> None:
    save_bundle(Scorer(encoders, made(encoders, "lr")), tmp_path / "bundle")
    run = CliRunner().invoke
    done = run(app, ["export", str(tmp_path / "bundle"), str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["file"] == "model.pt2"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "model.pt2"]
    for wrong, line in (
        (["--stage", "early"], 'has no ranker "early"; it has final'),
        (["--format", "tf"], '--format is "tf", expected torch-export or onnx'),
        ([], "exists"),
    ):
        refused = run(app, ["export", str(tmp_path / "bundle"), str(tmp_path / "out"), *wrong])
        assert isinstance(refused.exception, ValueError | FileExistsError) and line in str(refused.exception)


def test_onnx_is_the_ranker_too(encoders: Encoders, tmp_path: Path) -> None:
    if EXTRAS["onnx"].missing():
        with pytest.raises(ValueError, match=r"an ONNX file needs \w+: pip install 'fullrank\[onnx\]'"):
            export_ranker(made(encoders, "lr"), tmp_path / "out", "onnx")
        pytest.skip("the extra onnx is not installed")
    for name in ("lr", "din"):
        said = export_ranker(made(encoders, name), tmp_path / name, "onnx")
        assert said["max_difference"] <= 1e-5 and (tmp_path / name / "model.onnx").stat().st_size > 1000
