from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, PositiveInt, TypeAdapter, ValidationError

from fullrank.embeddings import TABLE_KINDS, EmbeddingOptimizer
from fullrank.fields import FieldRow, attributes, field_rows, type_text
from fullrank.funnel import DistillConfig
from fullrank.funnel.funnel import StageSizes
from fullrank.funnel.training import EarlyConfig, FinalConfig, FunnelConfig
from fullrank.models import RANKERS
from fullrank.retrieval import TwoTower
from fullrank.schema import Categorical, EventId, EventNumber, Keys, Label, MultiCategorical, Numeric, Schema, Sequence
from fullrank.training.recipe import DataSpec, ImportSpec, Recipe
from fullrank.training.trainer import TrainerConfig


class Base(BaseModel):
    """Shared.

    Attributes:
        width: of every table.
        rate: of the base;
            over two lines.
    """

    width: int = Field(default=16, ge=1)
    rate: float


class Derived(Base):
    """More.

    Attributes:
        rate: of the derived: another one.
        low, high: ends.

    A closing word: not a field.
    """

    rate: float = Field(default=0.5, ge=0, lt=1)
    low: tuple[PositiveInt, ...] | None = None
    high: Annotated[tuple[int, ...], Field(min_length=1)] = (1, 2)
    mode: Literal["sum", "concat"] = Field(default="sum", description="How parts join.")
    options: dict[str, Any] = Field(default_factory=lambda: {"heads": 4})


def test_rows_name_the_type_with_its_bounds_the_default_and_the_meaning() -> None:
    assert field_rows(Derived) == [
        FieldRow("width", "int >= 1", "16", "of every table."),
        FieldRow("rate", "float >= 0, < 1", "0.5", "of the derived: another one."),
        FieldRow("low", "list[int > 0] or null", "null", "ends."),
        FieldRow("high", "list[int] of length >= 1", "[1, 2]", "ends."),
        FieldRow("mode", '"sum" or "concat"', '"sum"', "How parts join."),
        FieldRow("options", "{str: any}", '{"heads": 4}', ""),
    ]
    assert field_rows(Base)[1] == FieldRow("rate", "float", "required", "of the base; over two lines.")


def test_a_default_that_is_a_configuration_says_what_differs_from_its_own_defaults() -> None:
    from fullrank.funnel import FunnelConfig
    from fullrank.funnel.training import FinalConfig

    defaults = {row.name: row.default for row in (*field_rows(FunnelConfig), *field_rows(FinalConfig))}
    assert defaults["retrieval"] == '{"name": "two_tower"}'
    assert defaults["early"] == "[{}]"
    assert defaults["model"] == '{"name": "din", "hidden": [128, 64], "batch_norm": true}'


def test_a_docstring_may_begin_with_its_attributes() -> None:
    class Short(BaseModel):
        """Attributes:
        size: of it,
            in bytes.
        """

        size: int = 1

    assert field_rows(Short) == [FieldRow("size", "int", "1", "of it, in bytes.")]


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Path, "path"),
        (tuple[int, str], "list[int, str]"),
        (dict[str, PositiveInt], "{str: int > 0}"),
        (int | Literal["auto"], 'int or "auto"'),
        (Base | None, "Base or null"),
    ],
)
def test_types_in_the_words_of_a_recipe(annotation: Any, text: str) -> None:
    assert type_text(annotation) == text


def test_a_default_as_printed_is_valid_in_a_recipe() -> None:
    import yaml

    for kind in RANKERS.values():
        for name, _, default, _ in field_rows(kind.Config):
            assert default != "required"
            try:
                TypeAdapter(kind.Config).validate_python({name: yaml.safe_load(default)})
            except ValidationError as error:  # pragma: no cover
                raise AssertionError(f"{kind.__name__}.{name}: {default}") from error


def test_only_the_section_of_attributes_is_read() -> None:
    assert attributes(
        "One.\n\n    Args:\n        a: no.\n\n    Attributes:\n        b: yes.\n    Raises:\n        c: no."
    ) == {"b": "yes."}
    assert attributes("Attributes:\n        a: one\n            line.\n        b: two.\n    ") == {
        "a": "one line.",
        "b": "two.",
    }
    assert attributes("") == {}


def test_no_field_of_a_recipe_or_a_schema_is_without_a_meaning() -> None:
    configs: list[type[BaseModel]] = [kind.Config for kind in RANKERS.values()]
    configs += [kind.Config for kind in TABLE_KINDS.values()]
    configs += [Recipe, DataSpec, ImportSpec, TrainerConfig, EmbeddingOptimizer, TwoTower.Config]
    configs += [FunnelConfig, EarlyConfig, DistillConfig, FinalConfig, StageSizes]
    configs += [Schema, Numeric, Categorical, MultiCategorical, Sequence, EventId, EventNumber, Label, Keys]
    for config in configs:
        # A field with one possible value, such as `kind: numeric`, is what tells the pieces apart.
        assert [row.name for row in field_rows(config) if not row.meaning and row.type != row.default] == [], config
