"""The programs in benchmarks/: all of them start, and what pages, recipes and sources call by name is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A subprocess: programs of the randomised room set the number of threads when they are imported.
IMPORT_ALL = """
import importlib
from benchmarks.__main__ import programs
for module in programs():
    importlib.import_module(module)
"""


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def listed() -> dict[str, str]:
    lines = python("-m", "benchmarks").partition("\n\n")[0].splitlines()
    return {module: text.strip() for module, _, text in (line.partition("  ") for line in lines)}


def test_every_program_is_listed_with_what_it_measures_and_can_be_imported():
    programs = listed()
    assert {"benchmarks.tables", "benchmarks.ranking.compare", "benchmarks.randomized.pwsgd"} <= programs.keys()
    assert "benchmarks.machine" not in programs and not any(".peers." in module for module in programs)
    assert all(text.endswith(".") for text in programs.values())
    python("-c", IMPORT_ALL)


def test_programs_that_are_named_anywhere_exist():
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    for folder in ("docs", "recipes", "benchmarks", "src"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py", ".yaml")]
    named = 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"\bbenchmarks((?:\.[a-z]\w*)+)", text):
            # `benchmarks.randomized.cpu_seconds`, a package, or `benchmarks.machine.table` in a program.
            place = ROOT.joinpath("benchmarks", *name[1:].split("."))
            known = (place, place.with_suffix(".py"), place.parent.with_suffix(".py"))
            assert any(way.exists() for way in known), f"{path}: benchmarks{name}"
            named += 1
        for script in re.findall(r"python (benchmarks/\S+\.py)", text):
            assert script.startswith("benchmarks/peers/") and (ROOT / script).exists(), f"{path}: {script}"
    assert named > 50
