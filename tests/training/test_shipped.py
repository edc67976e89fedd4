"""Facts about recipes that come with the package, seen from a directory without them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fullrank
from fullrank.training.recipe import read_recipe
from fullrank.training.shipped import here_or_shipped, shipped_recipes

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["movielens-1m-dcn_v2", "recipes/movielens-1m-dcn_v2.yaml"])
def test_a_recipe_and_its_schema_are_found_by_name(name: str) -> None:
    recipe = read_recipe(Path(name))
    assert recipe == read_recipe(ROOT / "recipes/movielens-1m-dcn_v2.yaml")
    assert recipe.data.source is not None and recipe.data.source.schema_file is not None
    assert recipe.data.source.schema_file.samefile(ROOT / "recipes/movielens-1m.schema.json")
    assert recipe.data.source.path == Path("tables/ml1m_ctr")  # the log is the user's


def test_all_are_there_and_can_be_read() -> None:
    assert len(shipped_recipes()) == len(list((ROOT / "recipes").rglob("*.yaml")))
    for name in shipped_recipes():
        source = read_recipe(Path(name)).data.source
        assert source is None or source.schema_file is None or source.schema_file.is_file(), name


def test_a_file_here_wins() -> None:
    Path("recipes").mkdir()
    Path("recipes/movielens-1m-dcn_v2.yaml").write_text("data: {dataset: mine}\nmodel: {name: lr}\n")
    assert read_recipe(Path("recipes/movielens-1m-dcn_v2.yaml")).data.dataset == Path("mine")


def test_an_unknown_one_names_those_that_are_near() -> None:
    with pytest.raises(
        ValueError, match=r"^movielens-dcn: no such file, .*; did you mean movielens-1m-dcn_v2 or "
    ) as error:
        read_recipe(Path("movielens-dcn"))
    assert "\n" not in str(error.value)


def test_only_recipes_are_found_in_the_package() -> None:
    for path in (Path("../training/recipe.py"), Path("/globo-din"), Path("recipes"), Path("."), Path("bars")):
        assert here_or_shipped(path) == path


def test_installed_they_lie_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "site-packages/fullrank/recipes")
    monkeypatch.setattr(fullrank, "__file__", str(tmp_path / "site-packages/fullrank/__init__.py"))
    assert here_or_shipped(Path("globo-din")) == tmp_path / "site-packages/fullrank/recipes/globo-din.yaml"
