"""A recipe: everything that decides a training run, in one YAML file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fullrank.data.splits import SplitSpec
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import MODELS
from fullrank.schema import describe_errors
from fullrank.training.trainer import TrainerConfig


class ImportSpec(BaseModel):
    """A log to import before training, with the arguments of `fullrank data import`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str
    path: Path
    schema_file: Path | None = None
    split: SplitSpec | None = None
    max_bad: float = Field(default=0.001, ge=0, le=1)


class DataSpec(BaseModel):
    """Where the rows are.

    Attributes:
        dataset: a dataset directory; made from `source` first if it does not exist yet.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Path
    source: ImportSpec | None = None


class Recipe(BaseModel):
    """One run of `fullrank train`.

    Attributes:
        model: `name` and the fields of that model's `Config`.
        threads: of PyTorch; default one per core.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: DataSpec
    model: dict[str, Any]
    training: TrainerConfig = TrainerConfig()
    embedding: EmbeddingOptimizer = EmbeddingOptimizer()
    threads: int | None = Field(default=None, ge=1)

    @property
    def model_name(self) -> str:
        return str(self.model["name"])

    @property
    def model_config_values(self) -> dict[str, Any]:
        return {key: value for key, value in self.model.items() if key != "name"}


def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe; each override is `dotted.key=value` with the value as YAML.

    Relative paths in the recipe are relative to the current directory.

    Raises:
        ValueError: one line per wrong field, with the file and the path of the field.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping with data, model, ...; got {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError(_with_suggestions(describe_errors(error, str(path)), error)) from None
    name = recipe.model.get("name")
    if name not in MODELS:
        raise ValueError(f"{path}: model.name: expected one of {', '.join(MODELS)}, got {name!r}")
    try:
        MODELS[str(name)].Config.model_validate(recipe.model_config_values)
    except ValidationError as error:
        text = describe_errors(error, f"{path}: model")
        raise ValueError(_with_suggestions(text, error, MODELS[str(name)].Config)) from None
    return recipe


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {override}: expected key=value, such as training.learning_rate=0.002")
    place = values
    *parents, last = key.split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ValueError(f'--set {override}: "{parent}" is not a section')
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {override}: the value is not YAML") from None


def _with_suggestions(text: str, error: ValidationError, base: type[BaseModel] = Recipe) -> str:
    """Add "did you mean" to unknown keys."""
    lines = text.split("\n")
    for index, item in enumerate(error.errors()):
        if item["type"] != "extra_forbidden":
            continue
        owner: Any = base
        for step in item["loc"][:-1]:
            known = getattr(owner, "model_fields", {})
            owner = known[step].annotation if step in known else None
        names = list(getattr(owner, "model_fields", {}))
        close = difflib.get_close_matches(str(item["loc"][-1]), names, n=1)
        lines[index] += f'; did you mean "{close[0]}"?' if close else f"; known are {', '.join(names)}"
    return "\n".join(lines)
