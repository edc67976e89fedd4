"""A recipe: everything that decides a training run, in one YAML file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fullrank.data.source import DataSpec, read_values
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import MODELS
from fullrank.schema import describe_errors
from fullrank.training.trainer import TrainerConfig


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
    values = read_values(path, overrides)
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
