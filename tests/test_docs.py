"""The pages of the documentation: their Python runs, their recipes are valid, their commands and links exist."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest
import typer
import yaml
from typer.testing import CliRunner

from fullrank.cli.main import app
from fullrank.data.formats import FORMATS
from fullrank.data.simulate import SimulationConfig, simulate, simulate_dataset
from fullrank.embeddings import TABLE_KINDS
from fullrank.embeddings.planning import OFFERS
from fullrank.fields import field_rows
from fullrank.funnel import FunnelConfig
from fullrank.models import RANKERS, Ranker, RankerSpec
from fullrank.models.dhen import INTERACTIONS
from fullrank.retrieval import RETRIEVERS
from fullrank.training.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r'^```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Fenced text of a page; `line` is that of its first line."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 2, found["language"], found["title"], found["text"])
        for found in FENCE.finditer(text)
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


BLOCKS = {page: blocks(page) for page in PAGES}
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in BLOCKS[page])]


def shell(block: Block) -> Iterator[tuple[int, str]]:
    """Line and text of every `fullrank ...` in a shell block."""
    if block.language in ("", "sh"):
        for number, line in enumerate(block.text.splitlines(), block.line):
            if line.startswith("fullrank "):
                yield number, line.partition(" # ")[0].strip()


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every `fullrank ...` in the shell blocks and in the sentences of a page."""
    for block in BLOCKS[page]:
        yield from shell(block)
    prose = page.read_text(encoding="utf-8")
    prose = FENCE.sub(lambda found: "\n" * found[0].count("\n"), prose)
    for found in re.finditer(r"`(fullrank [a-z][^`]*)`", prose):
        yield prose.count("\n", 0, found.start()) + 1, " ".join(found[1].split())


COMMANDS = [pytest.param(command, id=f"{name_of(page)}:{line}") for page in PAGES for line, command in commands(page)]


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of the pages has: a log, `clicks.parquet`, and a dataset, `data/clicks`."""
    place = tmp_path_factory.mktemp("logs")
    pl.concat(simulate(SimulationConfig(impressions=4000, seed=1))).write_parquet(place / "clicks.parquet")
    simulate_dataset(place / "data" / "clicks", 4000, seed=1)
    return place


@pytest.fixture
def reader(logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory in which a reader works; modules and names that the page adds are gone afterwards."""
    shutil.copytree(logs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    registries = (RANKERS, RETRIEVERS, FORMATS, TABLE_KINDS, OFFERS, INTERACTIONS)
    known = [set(registry) for registry in registries]
    yield tmp_path
    for registry, names in zip(registries, known, strict=True):
        for name in set(registry) - names:
            registry.unregister(name)
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page_runs_as_written(page: Path, reader: Path) -> None:
    """And the commands of the tutorial and of the guides between it."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    if page.stem == "tutorial":  # begins with nothing
        shutil.rmtree(reader / "data")
    for block in BLOCKS[page]:
        if block.title is not None:
            (reader / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            # Empty lines before it, so that an error shows the line of the page.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            try:
                exec(code, namespace)
            except Exception as error:
                raise AssertionError(f"{name_of(page)}, block at line {block.line}: {error}") from error
        elif page.stem == "tutorial" or page.parent.name == "extend":
            for line, command in shell(block):
                if command.startswith("fullrank serve "):  # does not end by itself
                    continue
                ran = CliRunner().invoke(app, shlex.split(command)[1:])
                assert ran.exit_code == 0, f"{name_of(page)}, line {line}: {ran.output}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_page_is_one_of_ours(command: str) -> None:
    words = shlex.split(command.translate(str.maketrans("", "", "[]")))
    inner = typer.main.get_command(app)
    name = words.pop(0)
    while isinstance(inner, typer.core.TyperGroup):
        name = words.pop(0)
        inner = inner.commands[name]
    try:
        inner.make_context(name, [*words])  # parses, and runs nothing
    except Exception as error:
        # In a sentence a command may stand without its arguments. Typer has errors of its own, or Click's.
        if type(error).__name__ != "MissingParameter":
            raise
    for recipe in [word for word in words if word.startswith("recipes/")]:
        assert (ROOT / recipe).is_file()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "yaml" for b in BLOCKS[page])], ids=name_of
)
def test_the_recipes_of_a_page_are_valid(page: Path, reader: Path) -> None:
    for block in BLOCKS[page]:
        if block.language == "yaml" and block.title is None:
            values = yaml.safe_load(block.text)
            if set(values) == {"model"}:
                RankerSpec.of(values["model"])
            elif set(values) == {"funnel"}:
                FunnelConfig.model_validate(values["funnel"])
            else:
                Recipe.model_validate(values)


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links and [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_tables_of_fields_have_every_field_and_lead_to_each_other() -> None:
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    pages = (ROOT / "docs" / "fields").glob("*.md")
    text = {page.stem: hooks["expanded"](page.read_text(encoding="utf-8"), page.stem) for page in pages}
    for name in RANKERS.places:
        section = re.split(r"\n## ", text["rankers"].partition(f"## `{name}`")[2])[0]
        own = set(field_rows(RANKERS[name].Config)) - set(field_rows(Ranker.Config))
        assert {row.name for row in own} <= set(re.findall(r"^\| `(\w+)` \|", section, re.M)), name
    for page, content in text.items():
        for target, anchor in re.findall(r'<a href="(?:\.\./(\w+)/)?#?([^"]*)">', content):
            assert not anchor or f"{{ #{anchor} }}" in text[target or page], (page, target, anchor)
