"""Tables of configuration: name, type, default and meaning of every field of a pydantic class."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable
from inspect import cleandoc
from textwrap import indent
from typing import Any, NamedTuple

import annotated_types
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo


class FieldRow(NamedTuple):
    """One field of a configuration, as text.

    Attributes:
        name: key in a recipe.
        type: with its bounds: `int >= 1`, `list[float >= 0] or null`, `"sum" or "concat"`.
        default: as in a recipe; `required` if there is none.
        meaning: one line; empty if the class does not say.
    """

    name: str
    type: str
    default: str
    meaning: str


def field_rows(config: type[BaseModel]) -> list[FieldRow]:
    """A row for each field, inherited ones first, in the order of definition.

    Meanings are those of the docstring's section `Attributes`, for inherited fields of the base's; where there is none,
    the field's own description.
    """
    meanings: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        meanings |= attributes(kind.__dict__.get("__doc__") or "")
    return [
        FieldRow(
            name,
            type_text(field.annotation, field.metadata),
            _default(field),
            meanings.get(name) or field.description or "",
        )
        for name, field in config.model_fields.items()
    ]


def attributes(docstring: str) -> dict[str, str]:
    """Name -> text of a docstring's section `Attributes`; `first, second: text` is said of both."""
    texts: dict[str, list[str]] = {}
    names: list[str] = []
    inside = False
    text = cleandoc(docstring)
    if text.startswith("Attributes:"):  # the formatter moves the entries of a section in the first line to the margin
        text = indent(text, "    ").lstrip()
    for line in text.splitlines():
        if not line.startswith(" "):
            inside = line == "Attributes:" or (inside and not line)
            continue
        entry = re.fullmatch(r" {4}(\w+(?:, \w+)*):(?: (.*))?", line)
        if inside and entry:
            names = entry[1].split(", ")
            texts |= {name: [entry[2] or ""] for name in names}
        elif inside:
            for name in names:
                texts[name].append(line)
    return {name: " ".join(" ".join(lines).split()) for name, lines in texts.items()}


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type as the writer of a recipe thinks of it: a tuple is a list, None is null, bounds follow what they bound."""
    bounds = _bounds(metadata)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0], [*arguments[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        # Bounds of the whole are those of what is not null.
        return " or ".join(type_text(item, () if item is type(None) else metadata) for item in arguments)
    if origin is typing.Literal:
        return " or ".join(json.dumps(item) for item in arguments)
    if annotation in (None, type(None)):
        return "null"
    if origin is tuple and arguments[-1:] != (...,):
        text = f"list[{', '.join(map(type_text, arguments))}]"
    elif origin in (tuple, list, set, frozenset):
        text = f"list[{type_text(arguments[0])}]"
    elif origin is not None and issubclass(origin, typing.Mapping):
        text = f"{{{type_text(arguments[0])}: {type_text(arguments[1])}}}"
    else:
        text = {"Any": "any", "Path": "path"}.get(name := getattr(annotation, "__name__", str(annotation)), name)
    return text + bounds


def _bounds(metadata: Iterable[Any]) -> str:
    found: list[str] = []
    for item in metadata:
        for bound in item.metadata if isinstance(item, FieldInfo) else [item]:
            match bound:
                case annotated_types.Ge(ge=least):
                    found.append(f">= {least}")
                case annotated_types.Gt(gt=least):
                    found.append(f"> {least}")
                case annotated_types.Le(le=most):
                    found.append(f"<= {most}")
                case annotated_types.Lt(lt=most):
                    found.append(f"< {most}")
                case annotated_types.MinLen(min_length=least):
                    found.append(f"of length >= {least}")
                case annotated_types.MaxLen(max_length=most):
                    found.append(f"of length <= {most}")
    return " " + ", ".join(found) if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return json.dumps(TypeAdapter(Any).dump_python(value, mode="json", exclude_defaults=True))
