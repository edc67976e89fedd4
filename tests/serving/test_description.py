"""Facts about the OpenAPI document: a server on a port answers what it says, whatever it is asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fullrank.funnel import Funnel, save_bundle
from fullrank.serving import create_app

TOKEN = "secret"
# What fits a schema may still be refused, such as a label that the log does not have.
CHECKS = ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
BOUNDS = ["--max-examples", "10", "--generation-deterministic", "--phases", "examples,coverage,fuzzing"]


def test_every_endpoint_answers_as_it_is_described(
    funnel: Funnel, listening: Callable[[FastAPI], AbstractContextManager[str]], tmp_path: Path
) -> None:
    pytest.importorskip("schemathesis")
    save_bundle(funnel, tmp_path / "bundle")
    arms = {"other": (tmp_path / "bundle", 0.5)}
    app = create_app(tmp_path / "bundle", store=tmp_path / "store", token=TOKEN, arms=arms)
    with listening(app) as url:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *CHECKS, *BOUNDS]
        command += ["-H", f"Authorization: Bearer {TOKEN}", "--continue-on-failure", "--no-color"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        operations = sum(len(of_path) for of_path in app.openapi()["paths"].values())
    assert f"Tested: {operations}" in ran.stdout


def test_an_unsupported_method_is_told_all_that_are(funnel: Funnel) -> None:
    with TestClient(create_app(funnel)) as client:
        for path, allowed in {"/v1/items/3": "DELETE, PATCH", "/v1/items": "POST", "/healthz": "GET"}.items():
            answer = client.put(path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
            assert answer.json()["request_id"] == answer.headers["x-request-id"]
