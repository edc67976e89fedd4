"""Recipes: what they become, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fullrank.models import RANKERS, RankerSpec
from fullrank.schema import EventId, Schema, Sequence
from fullrank.training.recipe import Recipe, read_recipe

GOOD = """
data: {dataset: logs/clicks}
model: {name: dcn_v2, num_cross_layers: 2, hidden: [32, 16]}
training:
  epochs: 3
  learning_rate: 1e-3
embedding: {kind: row_wise_adagrad, learning_rate: 0.02}
"""


def _read(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path, overrides)


def test_a_recipe_and_its_overrides(tmp_path: Path) -> None:
    recipe = _read(
        tmp_path, GOOD, "training.epochs=5", "model.hidden=[8]", "data.source.format=csv", "data.source.path=x"
    )
    assert recipe.training.epochs == 5
    assert recipe.training.learning_rate == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert recipe.model == RankerSpec.of({"name": "dcn_v2", "num_cross_layers": 2, "hidden": [8]})
    assert recipe.data.source is not None and recipe.data.source.format == "csv"
    assert recipe.embedding.kind == "row_wise_adagrad"


def test_an_empty_section_is_as_good_as_none(tmp_path: Path) -> None:
    recipe = _read(tmp_path, "data: {dataset: d}\nmodel: {name: lr}\ntraining:\n", "embedding.kind=sgd")
    assert recipe.training == Recipe.model_fields["training"].default and recipe.embedding.kind == "sgd"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("epochs", "epoch"), 'training.epoch: unknown key; did you mean "epochs"?'),
        (GOOD.replace("embedding:", "embeding:"), 'embeding: unknown key; did you mean "embedding"?'),
        (GOOD.replace("  epochs: 3", "  kind: adam"), 'training.kind: unknown key; did you mean "embedding.kind"?'),
        (
            GOOD.replace("num_cross_layers", "num_cross_layer"),
            'model.num_cross_layer: unknown key; did you mean "num_c',
        ),
        (GOOD.replace("dcn_v2", "dcnv2"), 'model.name: ranker "dcnv2" is unknown; .*; did you mean "dcn_v2"'),
        (GOOD.replace("name: dcn_v2, ", ""), "model.name: expected one of lr, "),
        (GOOD.replace("epochs: 3", "epochs: 0"), "training.epochs: expected greater than or equal to 1, got 0"),
        (GOOD.replace("epochs: 3", "epochs: two"), "training.epochs: expected a valid integer.*got 'two'"),
        (GOOD.replace("{dataset: logs/clicks}", "{}"), "data.dataset: Field required"),
        (GOOD + "funnel: {}\n", "expected either model, funnel, retrieval or transfer, got both"),
        ("data: {dataset: d}\n", "expected either model, funnel, retrieval or transfer, got neither"),
        ("data: {dataset: d}\nfunnel: {}\ntraining: {epochs: 2}\n", "training and embedding belong to model"),
        (GOOD + "data: {dataset: other}\n", 'the key "data" is given twice'),
        ("- a\n- b\n", "expected a mapping"),
        ("a: [", "is not YAML"),
        (
            GOOD.replace("kind: row_wise_adagrad", "kind: row_wise_adagrad, l2: 0.1"),
            'embedding: l2_mode "exact" does not',
        ),
    ],
)
def test_a_wrong_field_is_one_line_with_file_and_path(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        _read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "recipe.yaml"))
    assert "\n" not in str(caught.value)


def test_every_wrong_field_has_its_line(tmp_path: Path) -> None:
    text = GOOD.replace("epochs: 3", "epochs: 0\n  precison: float32").replace("kind: row_wise_adagrad", "kind: lamb")
    with pytest.raises(ValueError) as caught:
        _read(tmp_path, text)
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[1] for line in lines] == ["training.epochs", "training.precison", "embedding.kind"]
    assert 'did you mean "precision"?' in lines[1]


def test_a_wrong_field_inside_a_model_inside_a_model_is_found(tmp_path: Path) -> None:
    text = "data: {dataset: d}\nmodel: {name: cetnet, members: [lr, {name: dcn_v2, hiden: [3]}]}\n"
    with pytest.raises(ValueError, match=r'model.members.1.hiden: unknown key; did you mean "hidden"') as caught:
        _read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_modules_of_ones_own_are_imported_before_the_model_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rankers_of_a_test.py").write_text(
        "from fullrank.models import register\nfrom fullrank.models.lr import LR\n\n\n"
        '@register\nclass Mine(LR):\n    name = "mine_of_a_recipe"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = "data: {dataset: d}\nmodel: {name: mine_of_a_recipe}\n"
    with pytest.raises(ValueError, match="has to be registered first"):
        _read(tmp_path, text)
    recipe = _read(tmp_path, "imports: [my_rankers_of_a_test]\n" + text)
    assert recipe.model is not None and recipe.model.kind.__name__ == "Mine"
    RANKERS.unregister("mine_of_a_recipe")
    with pytest.raises(ValueError, match=r"recipe.yaml: imports: cannot import no_such_module"):
        _read(tmp_path, "imports: [no_such_module]\n" + text)


@pytest.mark.parametrize("override", ["training.epochs", "=3", "model.name.x=3", "training.epochs=[1"])
def test_a_wrong_override_is_quoted(tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError, match="--set") as caught:
        _read(tmp_path, GOOD, override)
    assert override in str(caught.value)


def test_committed_recipes_are_right() -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        read_recipe(path)


def test_every_recipe_of_a_table_builds_its_model_on_its_schema() -> None:
    root = Path(__file__).parents[2]
    built = 0
    for path in sorted((root / "recipes").glob("*.yaml")):
        if "model" not in yaml.safe_load(path.read_text()):
            continue  # a funnel
        recipe = read_recipe(path)
        if recipe.data.source is None or recipe.data.source.schema_file is None:
            continue
        schema = Schema.read(root / recipe.data.source.schema_file)
        sized = [
            feature.model_copy(update={"num_embeddings": 5} if hasattr(feature, "num_embeddings") else {})
            if not isinstance(feature, Sequence)
            else feature.model_copy(
                update={"fields": tuple(f.model_copy(update={"num_embeddings": 5}) if isinstance(f, EventId) else f
                                        for f in feature.fields)})
            for feature in schema.features
        ]  # fmt: skip
        schema = schema.model_copy(update={"features": tuple(sized)})
        assert recipe.model is not None
        model = recipe.model.build(schema)
        assert model.num_parameters().dense > 0, path.name
        built += 1
    assert built >= 30
