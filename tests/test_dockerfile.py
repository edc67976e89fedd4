"""What the Dockerfile names exists: no image is built in the tests."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from typer.main import get_command

from fullrank.cli.main import app
from fullrank.extras import EXTRAS
from fullrank.serving.routes import PATHS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
STEPS = [line.split(maxsplit=1) for line in TEXT.splitlines() if line and not line.startswith("#")]


def steps(kind: str) -> list[str]:
    return [rest for name, rest in STEPS if name == kind]


def test_what_is_copied_is_there_and_let_in() -> None:
    copied = {source for step in steps("COPY") for source in step.split()[:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_extras_and_pins_exist() -> None:
    extras = re.findall(r"\.\[([\w,]+)\]", TEXT)
    assert extras == ["serve"] and set(extras) <= set(EXTRAS)
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_it_serves_as_somebody_without_rights() -> None:
    order = [name for name, _ in STEPS]
    assert order.index("USER") < order.index("CMD") and steps("USER") not in (["root"], ["0"])
    command, bundle, *options = json.loads(steps("CMD")[0])
    assert json.loads(steps("ENTRYPOINT")[0]) == ["fullrank"]
    serve = get_command(app).commands[command]  # type: ignore[attr-defined]
    with serve.make_context(command, [bundle, *options]) as context:
        assert context.params["host"] == "0.0.0.0" and str(context.params["bundle"]) == "/bundle"
        port = str(context.params["port"])
    assert steps("EXPOSE") == [port]
    python, _, program = json.loads(steps("HEALTHCHECK")[0].partition("CMD ")[2])
    assert python == "python" and ast.parse(program)
    found = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", program)
    assert found is not None and found[1] == port and found[2] in PATHS
