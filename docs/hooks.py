"""Tables of configuration, made from the pydantic classes when the site is built; what mkdocs.yml calls a hook.

A page of `fields/` asks by a line of its own: `{{ fields fullrank.training.recipe:Recipe }}`, or, for everything in a
registry, `{{ rankers }}`, `{{ retrievers }}`, `{{ indexes }}`, `{{ tables }}`, `{{ policies }}`. `{{ names }}` are
those of `import fullrank`.
"""

from __future__ import annotations

import html
import re
import typing
from collections.abc import Iterator, Mapping
from importlib import import_module
from inspect import cleandoc
from operator import attrgetter
from typing import Any

from pydantic import BaseModel

import fullrank
from fullrank.embeddings import TABLE_KINDS, EmbeddingOptimizer, TableConfig
from fullrank.fields import field_rows, type_text
from fullrank.funnel.policies import POLICIES, SlotPolicy
from fullrank.models import RANKERS, Ranker
from fullrank.registry import Registry, Spec
from fullrank.retrieval import RETRIEVERS, Retriever
from fullrank.retrieval.vectors import VECTOR_INDEXES, VectorIndex
from fullrank.training import TrainerConfig

LISTS: dict[str, tuple[Mapping[str, Any], type[BaseModel]]] = {
    "rankers": (RANKERS, Ranker.Config),
    "retrievers": (RETRIEVERS, Retriever.Config),
    "indexes": (VECTOR_INDEXES, VectorIndex.Config),
    "tables": (TABLE_KINDS, TableConfig),
    "policies": (POLICIES, SlotPolicy.Config),
}

# Class -> heading and anchor of its table, in the order in which a page shows them.
Places = dict[type[BaseModel], tuple[str, str]]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    return expanded(markdown, page.file.src_uri.removeprefix("fields/").removesuffix(".md"))


def expanded(markdown: str, page: str) -> str:
    """The Markdown of the page `fields/<page>.md` with tables in the place of the lines that ask for them."""
    return re.sub(r"^\{\{ (.+) \}\}$", lambda found: answer(found[1], page), markdown, flags=re.MULTILINE)


def on_page_content(content: str, **_: Any) -> str:
    """Numbers of a table stay whole: no line ends inside `9.0e-5` or `.8743 ± .0006`."""

    def whole(cell: re.Match[str]) -> str:
        return re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", cell[0]).replace(" ± ", "\u00a0±\u00a0")

    return re.sub(r"<td.*?</td>", whole, content, flags=re.DOTALL)


def answer(question: str, page: str) -> str:
    """Markdown in the place of a line that asks, on the page `fields/<page>.md`.

    Raises:
        ValueError: if there is no such thing.
    """
    if question == "names":
        return names()
    if question in LISTS:
        return "\n\n".join(registered(*LISTS[question], page))
    if question.startswith("fields "):
        module, name = question.removeprefix("fields ").split(":")
        config = attrgetter(name)(import_module(module))
        return "\n\n".join(tables(config, places(config, page)))
    raise ValueError(f"{page}.md: there is nothing called {question!r} to put here")


def names() -> str:
    """What `import fullrank` offers, and where each thing is described."""
    lines = ["| name | what |", "| --- | --- |"]
    for name in fullrank.__all__:
        thing = getattr(fullrank, name)
        if not isinstance(thing, str):
            first = cleandoc(thing.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
            lines.append(f"| [`fr.{name}`][{thing.__module__}.{name}] | {first} |")
    return "\n".join(lines)


def registered(things: Mapping[str, Any], base: type[BaseModel], page: str) -> Iterator[str]:
    """A section for each thing of this library: what it is, and the fields that it adds to the base's."""
    for name in things.places if isinstance(things, Registry) else things:
        kind = things[name]
        yield f"## `{name}` {{ #{name} }}"
        yield summary(kind)
        yield from tables(kind.Config, places(kind.Config, page, name, level=3), without=base)


def home(kind: type[BaseModel]) -> tuple[str, str] | None:
    """Page of `fields/` and anchor where a class that several pages name has its table."""
    if issubclass(kind, Spec):
        return next(page for page, (things, _) in LISTS.items() if things is kind.registry), ""
    shared = {
        TableConfig: ("tables", ""),
        TrainerConfig: ("recipe", "training"),
        EmbeddingOptimizer: ("recipe", "embedding"),
    }
    return shared.get(kind)


def places(config: type[BaseModel], page: str, path: str = "", level: int = 2) -> Places:
    """The configurations inside of one that have their tables on this page."""
    found: Places = {}
    for name, field in config.model_fields.items():
        inner = list(classes(field.annotation))
        for kind in inner:
            place = f"{path}.{name}" if path else name
            if kind in found or home(kind) not in (None, (page, place)):
                continue
            variant = str(kind.model_fields["kind"].default) if len(inner) > 1 else ""
            title = f"`{place}`: `{variant}`" if variant else f"`{place}`"
            anchor = re.sub(r"\W+", "-", f"{place}-{variant}".strip("-")).lower()
            found[kind] = (f"{'#' * level} {title} {{ #{anchor} }}", anchor)
            for key, value in places(kind, page, place, level).items():
                found.setdefault(key, value)
    return found


def classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configurations that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from classes(argument)


def tables(config: type[BaseModel], inner: Places, without: type[BaseModel] | None = None) -> Iterator[str]:
    """The table of a configuration, then one with a heading for each configuration inside of it."""
    yield table(config, inner, without)
    for kind, (heading, _) in inner.items():
        yield heading
        yield summary(kind)
        yield table(kind, inner)


def summary(kind: type) -> str:
    """What a class's own docstring says up to its first section; `<` outside of code is no HTML."""
    text = cleandoc(kind.__dict__.get("__doc__") or "")
    text = re.sub(r"`[^`]*`|<", lambda found: "&lt;" if found[0] == "<" else found[0], text)
    return re.split(r"\n*^(?:Attributes|Args|Raises|Returns):$", text, maxsplit=1, flags=re.MULTILINE)[0]


def table(config: type[BaseModel], inner: Places, without: type[BaseModel] | None = None) -> str:
    """The fields of a configuration; those that are as in another one are left out."""
    known = set(field_rows(without)) if without else set()
    rows = [row for row in field_rows(config) if row not in known]
    if not rows:
        return "No fields of its own."
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for row in rows:
        kind = linked(row.type, config.model_fields[row.name].annotation, inner)
        default = f"`{row.default}`" if row.default != "required" else "required {.required}"
        lines.append(f"| `{row.name}` | <code>{kind}</code> | {default} | {row.meaning} |")
    return '<div class="fields" markdown>\n\n' + "\n".join(lines) + "\n\n</div>"


def linked(text: str, annotation: Any, inner: Places) -> str:
    """A type as HTML, in which the name of a configuration leads to its table."""
    links: dict[str, str] = {}
    for kind in classes(annotation):
        place = home(kind)
        if kind in inner:
            links[type_text(kind)] = f"#{inner[kind][1]}"
        elif place is not None:
            links[type_text(kind)] = f"../{place[0]}/" + (f"#{place[1]}" if place[1] else "")
    # Braces and brackets as entities: Markdown would read attributes and links into them.
    entities = {character: f"&#{ord(character)};" for character in "{}[]*_|"}
    words = re.split(r"(\w+)", text)
    return "".join(
        f'<a href="{links[word]}">{word}</a>' if word in links else html.escape(word).translate(str.maketrans(entities))
        for word in words
    )
