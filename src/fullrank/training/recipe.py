"""A recipe: everything that decides a training run, in one YAML file."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fullrank.data.forgotten import forgotten_users
from fullrank.data.splits import SplitSpec
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import RankerSpec
from fullrank.registry import Spec, import_modules
from fullrank.retrieval import RetrieverSpec
from fullrank.schema import describe_errors
from fullrank.training.config import TrainerConfig
from fullrank.training.shipped import find_recipe, here_or_shipped
from fullrank.training.stream_config import StreamConfig

# What a recipe may train: one of these sections.
SECTIONS = ("model", "funnel", "retrieval", "transfer")


class Section(BaseModel):
    """Base of the sections: unknown keys are errors, values do not change after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ImportSpec(Section):
    """A log to import before training, with the arguments of `fullrank data import`.

    Attributes:
        format: name of the log's format.
        path: the log: a file or a directory, as the format expects.
        schema_file: for formats that do not bring a schema.
        split: how rows become training, validation and test rows; default that of the format.
        max_bad: share of bad rows above which the import fails.
        forgotten: directory of a server's store, or URL of its Redis: rows of users that it was told to forget are left
            out.
    """

    format: str
    path: Path
    schema_file: Annotated[Path, AfterValidator(here_or_shipped)] | None = None
    split: SplitSpec | None = None
    max_bad: float = Field(default=0.001, ge=0, le=1)
    forgotten: Path | str | None = None

    def forgotten_users(self) -> frozenset[str]:
        """Digests of the users whose rows are left out, as of now."""
        return frozenset() if self.forgotten is None else forgotten_users(self.forgotten)


class DataSpec(Section):
    """Where the rows are.

    Attributes:
        dataset: a dataset directory; made from `source` first if it does not exist yet.
        source: the log.
        workers: threads that put training batches together.
        extra: further columns of the dataset that a model or a loss wants, for `Batch.extra`; kept by the import.
    """

    dataset: Path
    source: ImportSpec | None = None
    workers: int = Field(default=1, ge=0)
    extra: tuple[str, ...] = ()


class Recipe(Section):
    """One run of `fullrank train`: one model, a whole funnel, or a retriever.

    Attributes:
        imports: modules to import first, such as `my_package.models`: they register rankers, retrievers, formats or
            table kinds of one's own.
        data: where the rows are.
        model: `name` and the fields of that model's `Config`.
        funnel: instead of `model`: the stages, each with its own model and training (`fullrank.funnel.FunnelConfig`).
        retrieval: instead of `model`: a retriever that stands alone, `name` and the fields of its `Config`.
        transfer: instead of `model`: a teacher and its students (`fullrank.transfer.config.TransferConfig`), for
            `fullrank transfer`.
        training: how `model` is fitted.
        embedding: how the tables of `model` learn.
        threads: of PyTorch; default one per core.
        stream: how `fullrank stream` goes through the log; `fullrank train` leaves it aside.
    """

    imports: tuple[str, ...] = ()
    data: DataSpec
    model: RankerSpec | None = None
    funnel: dict[str, Any] | None = None
    retrieval: RetrieverSpec | None = None
    transfer: dict[str, Any] | None = None
    training: TrainerConfig = TrainerConfig()
    embedding: EmbeddingOptimizer = EmbeddingOptimizer()
    threads: int | None = Field(default=None, ge=1)
    stream: StreamConfig = StreamConfig()

    @model_validator(mode="after")
    def _one_section(self) -> Self:
        given = [name for name in SECTIONS if getattr(self, name) is not None]
        if len(given) != 1:
            found = "neither" if not given else "both" if len(given) == 2 else "all"
            raise ValueError(f"expected either {', '.join(SECTIONS[:-1])} or {SECTIONS[-1]}, got {found}")
        if self.model is None and {"training", "embedding"} & self.model_fields_set:
            whose = {
                "funnel": "those of a funnel's stages are in its stages",
                "retrieval": "a retriever has its own",
                "transfer": "a teacher and students have their own",
            }[given[0]]
            raise ValueError(f"training and embedding belong to model; {whose}")
        return self

    @property
    def section(self) -> str:
        """The section that says what is trained: a name in `fullrank.training.run.RUNS`."""
        return next(name for name in SECTIONS if getattr(self, name) is not None)


def read_recipe(path: Path, overrides: Sequence[str] | None = None) -> Recipe:
    """Read a recipe; each override is `dotted.key=value` with the value as YAML.

    Relative paths in the recipe are relative to the current directory. A recipe that is not there may be one that comes
    with the package, by its name: `movielens-1m-dcn_v2`; so may the schema file that it names.

    Raises:
        ValueError: one line per wrong field, with the file and the path of the field.
    """
    values = read_values(path)
    for override in overrides or []:
        _override(values, override)
    return parse_recipe(values, str(path))


def read_values(path: Path) -> dict[str, Any]:
    """The content of a recipe's file, or of one that comes with the package, as it is written.

    Raises:
        ValueError: if it is no YAML or no mapping.
    """
    try:
        values = yaml.load(find_recipe(path).read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for a recipe") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping with data, model, ...; got {type(values).__name__}")
    return values


def parse_recipe(values: dict[str, Any], place: str = "recipe") -> Recipe:
    """A recipe from its content.

    Raises:
        ValueError: one line per wrong field, with `place` and the path of the field.
    """
    values = {key: value for key, value in values.items() if value is not None}  # a section left empty is not there
    names = values.get("imports", [])
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        import_modules(names, f"{place}: imports")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error, place, Recipe, values)) from None


def explain(error: ValidationError, place: str, base: type[BaseModel], values: Any, *, separator: str = ": ") -> str:
    """One line per wrong field: what was expected, what was found, and for an unknown key the nearest known one.

    Args:
        values: what `base` was made from.
        separator: between `place` and the path of a field.
    """
    lines = describe_errors(error, "").split("\n")
    for index, item in enumerate(error.errors()):
        lines[index] = lines[index].replace("Input should be ", "expected ", 1)
        if item["type"] == "extra_forbidden":
            owner: type[BaseModel] | None = base
            found = values
            for step in item["loc"][:-1]:
                found = _within(found, step)
                if isinstance(step, str) and owner is not None:
                    owner = _section(owner, step)
                if owner is not None and issubclass(owner, Spec) and isinstance(found, Mapping):
                    name = found.get("name")
                    owner = owner.registry[str(name)].Config if name in owner.registry else None
            wrong = str(item["loc"][-1])
            known = list(owner.model_fields) if owner is not None else []
            elsewhere = [f"{section}.{wrong}" for section, keys in _sections(base) if wrong in keys]
            lines[index] += (
                _near(wrong, known)
                or (f'; did you mean "{elsewhere[0]}"?' if elsewhere else "")
                or (f"; known are {', '.join(known)}" if known else "")
            )
    return "\n".join(
        f"{place}{separator if item['loc'] else ': '}{line}" for line, item in zip(lines, error.errors(), strict=True)
    )


def _within(value: Any, step: str | int) -> Any:
    try:
        return value[step]
    except (KeyError, IndexError, TypeError):
        return None


def _near(wrong: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _sections(base: type[BaseModel]) -> Iterator[tuple[str, list[str]]]:
    for name in base.model_fields:
        part = _section(base, name)
        if part is not None:
            yield name, list(part.model_fields)


def _section(owner: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model class of a field, also where the field may be None."""
    if name not in owner.model_fields:
        return None
    annotation = owner.model_fields[name].annotation
    options = typing.get_args(annotation) or (annotation,)
    return next((kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {override}: expected key=value, such as training.learning_rate=0.002")
    place = values
    *parents, last = key.split(".")
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise ValueError(f'--set {override}: "{parent}" is not a section')
    try:
        place[last] = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, RecursionError):
        raise ValueError(f"--set {override}: the value is not YAML") from None


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's safe subset, in which a key that is given twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'the key "{key}" is given twice', node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping
