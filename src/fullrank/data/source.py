"""The `data` section of a recipe: where the rows are, and the log that they come from.

Apart from the rest of a recipe, so that a log can be imported by a process that never loads PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec
from fullrank.schema import Schema


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


def import_source(data: DataSpec) -> None:
    """Import the section's log into its dataset directory.

    Raises:
        ValueError: as `import_dataset`, and if there is nothing to import.
    """
    source = data.source
    if source is None:
        raise ValueError(f"{data.dataset} does not exist and the recipe names no data.source to make it from")
    schema = None if source.schema_file is None else Schema.read(source.schema_file)
    data.dataset.parent.mkdir(parents=True, exist_ok=True)
    import_dataset(source.format, source.path, data.dataset, schema=schema, split=source.split, max_bad=source.max_bad)


def read_values(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The YAML mapping of a recipe with overrides `dotted.key=value` applied, not yet validated.

    Raises:
        ValueError: if the file is not a YAML mapping or an override cannot be read.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping with data, model, ...; got {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    return values


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
