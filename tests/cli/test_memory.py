"""`fullrank plan-memory` and `fullrank inspect`: what is planned is what a trained bundle stores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fullrank.cli.main import main
from fullrank.data.dataset import Dataset
from fullrank.data.lookups import lookup_counts
from fullrank.data.simulate import simulate_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data") / "clicks"
    simulate_dataset(place, 3000, seed=1)
    return place


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fullrank", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def recipe(place: Path, data: Path, **model: Any) -> Path:
    values = {"data": {"dataset": str(data)}, "model": {"name": "dlrm", **model}}
    place.write_text(yaml.safe_dump({**values, "training": {"max_steps": 2, "batch_size": 100}}))
    return place


def test_lookups_are_those_of_a_loop(data: Path) -> None:
    dataset = Dataset.open(data)
    frame, counts = dataset.scan("train").collect(), lookup_counts(dataset)
    expected = {table: [0] * rows for table, rows in dataset.schema.tables().items()}
    for name, feature in dataset.schema.embedded().items():
        for value in frame[name].to_list():
            for number in value if isinstance(value, list) else [value]:
                expected[feature.table_name][number] += 1
    assert {table: found.tolist() for table, found in counts.items()} == expected
    assert any(name in dataset.schema.jagged_keys for name in dataset.schema.embedded())


@pytest.mark.parametrize(
    "model",
    [
        {"tables": {"item_id": {"kind": "prefix", "levels": 2, "codebook_size": 16}}},
        {"name": "deepfm"},  # has first-order terms that no kind is for
        {"name": "cetnet", "members": [{"name": "dlrm"}, {"name": "dcn_v2"}]},
    ],
    ids=["prefix", "deepfm", "cetnet"],
)
def test_a_planned_recipe_is_trained_to_a_bundle_of_the_planned_bytes(
    model: dict[str, Any], data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    source, out = recipe(tmp_path / "in.yaml", data, **model), tmp_path / "out.yaml"
    arguments = ["plan-memory", data, "--budget", "45%", "--recipe", source, "--out", out, "--json"]
    code, printed, error = run(capsys, monkeypatch, *arguments)
    assert (code, error) == (0, f"recipe: {out}\n")
    plan = json.loads(printed)
    assert plan["bytes"] <= plan["budget"] == int(0.45 * plan["bytes_of_plain_tables"])
    assert any(table["settings"]["kind"] == "mixed_dimension" for table in plan["tables"].values())
    first = out.read_bytes()
    assert run(capsys, monkeypatch, *arguments)[1] == printed and out.read_bytes() == first
    written = yaml.safe_load(first)
    assert written["training"] == {"max_steps": 2, "batch_size": 100}
    if "tables" in model:
        assert written["model"]["tables"]["item_id"] == model["tables"]["item_id"] and "item_id" not in plan["tables"]
    assert run(capsys, monkeypatch, "train", out, "--out", tmp_path / "run", "--json")[0] == 0

    code, printed, _ = run(capsys, monkeypatch, "inspect", tmp_path / "run" / "model", "--json")
    contents = json.loads(printed)
    (stage,) = contents["stages"]
    assert code == 0 and stage["table_bytes"] == plan["bytes"]
    assert sum(table["bytes"] for table in stage["tables"]) == stage["table_bytes"]
    weights = tmp_path / "run" / "model" / "weights.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert stage["table_bytes"] + stage["dense_bytes"] + header == stage["files"] == weights.stat().st_size
    vocabularies = Dataset.open(data).encoders.vocabularies
    assert contents["vocabularies"] == {name: len(each.values) for name, each in vocabularies.items()}
    code, printed, _ = run(capsys, monkeypatch, "inspect", tmp_path / "run" / "model")
    assert code == 0 and "mixed_dimension" in printed and f"{stage['table_bytes']:,}" in printed


def test_the_stages_of_a_funnel_are_inspected(data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    small = {"training": {"max_steps": 2, "batch_size": 100}}
    model = {"name": "dlrm", "hidden": [8], "tables": {"user_id": {"kind": "mixed_dimension", "temperature": 0.5}}}
    values = {
        "data": {"dataset": str(data)},
        "funnel": {"retrieval": {"name": "popularity"}, "early": small, "final": {"model": model, **small}},
    }
    (tmp_path / "funnel.yaml").write_text(yaml.safe_dump(values))
    code, _, error = run(
        capsys, monkeypatch, "plan-memory", data, "--budget", "1MB", "--recipe", tmp_path / "funnel.yaml"
    )
    assert code == 2 and "expected a recipe with a model" in error
    assert run(capsys, monkeypatch, "train", tmp_path / "funnel.yaml", "--out", tmp_path / "run", "--json")[0] == 0
    bundle = tmp_path / "run" / "bundle"
    code, printed, _ = run(capsys, monkeypatch, "inspect", bundle, "--json")
    contents = json.loads(printed)
    assert code == 0 and [stage["stage"] for stage in contents["stages"]] == ["retrieval", "early", "final"]
    assert contents["bytes"] == sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    final = contents["stages"][2]
    user = next(table for table in final["tables"] if table["table"] == "user_id")
    assert user["kind"] == "mixed_dimension" and user["bytes"] == 4 * user["parameters"] != user["plain_bytes"]
    assert run(capsys, monkeypatch, "inspect", bundle)[0] == 0
    packed = tmp_path / "packed"
    assert run(capsys, monkeypatch, "quantize", bundle, packed)[0] == 0
    small = json.loads(run(capsys, monkeypatch, "inspect", packed, "--json")[1])["stages"][2]
    item = next(table for table in small["tables"] if table["table"] == "item_id")
    assert item["store"] == "int4" and item["bytes"] == item["rows"] * (-(-item["width"] // 2) + 4)
    assert small["parameters"] == final["parameters"] and small["dense_bytes"] == final["dense_bytes"]
    assert "full, int4" in run(capsys, monkeypatch, "inspect", packed)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "10B"], "a budget of 10 bytes is too small: the tables take at least"),
        (["--budget", "ten"], 'expected a number of bytes, such as 200MB, 1.5GiB or 25%, got "ten"'),
        (["--budget", "1MB", "--kinds", "full,tt"], 'kind to plan with "tt" is unknown'),
        (["--budget", "1MB", "--out", "out.yaml"], "--out writes the recipe of --recipe"),
        (["--budget", "1MB", "--recipe", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_a_wrong_plan_is_one_line(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, error = run(capsys, monkeypatch, "plan-memory", data, *arguments)
    assert (code, printed) == (2, "") and message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
