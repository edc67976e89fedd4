"""Names find what they stand for, and say so when they do not."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fullrank import registry as registries
from fullrank.registry import Registry, Spec, import_modules
from fullrank.schema import describe_errors


class Thing:
    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)
        sizes: tuple[int, ...] = (1,)
        rate: int = Field(default=1, ge=1)


def a_registry() -> Registry[type[Thing]]:
    registry: Registry[type[Thing]] = Registry("thing", "fullrank.tests", {"decoder": "json:JSONDecoder"})
    registry.register("mine", Thing)
    return registry


class ThingSpec(Spec):
    registry = a_registry()


class Recipe(BaseModel):
    thing: ThingSpec


def test_a_listed_place_is_imported_when_asked_for() -> None:
    import json

    assert a_registry()["decoder"] is json.JSONDecoder


def test_a_name_is_taken_once() -> None:
    registry = a_registry()
    registry.register("mine", Thing)
    with pytest.raises(ValueError, match='"mine" exists already'):
        registry.register("mine", type("Other", (Thing,), {}))
    again = type("Thing", (), {"__module__": __name__})
    assert registry.register("mine", again) is registry["mine"] is again  # defined anew, as in a notebook
    registry.unregister("mine")
    assert "mine" not in registry


def test_entry_points_of_installed_packages_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", f"{__name__}:Thing", "fullrank.tests")
    monkeypatch.setattr(registries, "entry_points", lambda group: [point] if group == "fullrank.tests" else [])
    registry: Registry[object] = Registry("thing", "fullrank.tests", {})
    assert list(registry) == ["theirs"]
    assert registry["theirs"].__name__ == "Thing"  # type: ignore[attr-defined]


def test_a_package_may_both_declare_an_entry_point_and_register_in_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry: Registry[object] = Registry("thing", "fullrank.tests", {"decoder": "json:JSONDecoder"})
    (tmp_path / "their_things.py").write_text(
        "import sys\n\nclass Theirs: ...\n\nsys.modules['registry under test'].register('theirs', Theirs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "registry under test", registry)  # type: ignore[arg-type]
    point = EntryPoint("theirs", "their_things:Theirs", "fullrank.tests")
    monkeypatch.setattr(registries, "entry_points", lambda group: [point])
    assert registry["theirs"] is sys.modules.pop("their_things").Theirs
    for name in ("theirs", "decoder"):
        with pytest.raises(ValueError, match="exists already"):
            registry.register(name, Thing)


@pytest.mark.parametrize(
    ("name", "defined_in", "expected"),
    [
        ("mime", None, 'did you mean "mine"'),
        ("other", None, "has to be registered first"),
        ("other", "their_package.things", "import the package that registers it, their_package.things, before"),
        (3, None, "thing 3 is unknown; choose one of decoder, mine"),
    ],
)
def test_an_unknown_name_says_what_there_is_and_how_to_add_to_it(
    name: object, defined_in: str | None, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        a_registry().find(name, defined_in)


def test_a_spec_is_one_mapping_and_survives_the_round_trip() -> None:
    spec = ThingSpec.of({"name": "mine", "sizes": [3, 2]})
    assert spec.kind is Thing
    assert spec.model_dump() == {"name": "mine", "sizes": [3, 2], "rate": 1}
    assert ThingSpec.of(spec.model_dump()) == spec
    assert ThingSpec.of("mine").config == Thing.Config()
    assert Recipe(thing=spec).thing == spec


def test_wrong_fields_of_a_spec_keep_their_places() -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"thing": {"name": "mine", "sizes": ["a"], "rate": 0, "other": 1}})
    places = [line.split(": ")[1] for line in describe_errors(caught.value, "recipe.yaml").splitlines()]
    assert places == ["thing.sizes.0", "thing.rate", "thing.other"]


def test_a_module_that_cannot_be_imported_is_named() -> None:
    import_modules(["json"], "recipe.yaml: imports")
    with pytest.raises(ValueError, match=r"recipe.yaml: imports: cannot import no_such_module"):
        import_modules(["no_such_module"], "recipe.yaml: imports")


def test_a_named_module_may_be_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "things_of_mine.py").write_text("mine = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    import_modules(["things_of_mine"], "--import")
    assert sys.modules.pop("things_of_mine").mine == 3
    assert sys.path[-1] == str(tmp_path)  # what is installed is found first
