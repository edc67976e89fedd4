"""What only who has the token may do, and the check of it."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fullrank.serving.bodies import Problem, Strict, answer, encoded, problem_answer
from fullrank.serving.errors import NoVersion, refusals
from fullrank.serving.experiment import CONTROL
from fullrank.serving.versions import Versions


class Swapped(Strict):
    """What is served now.

    Attributes:
        arm: of the experiment, that was asked for.
        outcome: `swapped`, `rolled back`, `unchanged`, or why a new bundle was refused.
        model_version: of the bundle.
    """

    arm: str
    outcome: str
    model_version: str


class Bearer:
    """Lets requests for `/v1` pass that carry the token, and answers others with 401."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if hmac.compare_digest(sent, self._expected):
            await self.app(scope, receive, send)
            return
        detail = "expected the header Authorization: Bearer TOKEN, with the token that the server was started with"
        response = problem_answer(scope["state"]["request_id"], 401, detail)
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)


def describe_token(app: FastAPI) -> None:
    """Say in the OpenAPI document that `/v1` needs the token."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        parts = document.setdefault("components", {})
        parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        parts.setdefault("schemas", {}).setdefault("Problem", Problem.model_json_schema())
        for path, operations in document["paths"].items():
            for operation in operations.values() if path.startswith("/v1/") else ():
                operation["security"] = [{"token": []}]
                operation["responses"]["401"] = {
                    "description": "The token is missing or wrong.",
                    "headers": {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}},
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
                }
        return document

    app.openapi = described  # type: ignore[method-assign]


def add_admin(app: FastAPI, versions: Mapping[str, Versions]) -> None:
    """Routes that change what is served.

    Args:
        versions: by arm, of those that were opened from a directory.
    """

    def of(arm: str) -> Versions:
        if arm not in versions:
            raise NoVersion
        return versions[arm]

    def swapped(arm: str, outcome: str) -> Response:
        return answer(encoded({"arm": arm, "outcome": outcome, "model_version": versions[arm].now.version}))

    @app.post("/v1/admin/reload", response_model=Swapped, tags=["operation"], responses=refusals(404, 422, 500, 503))
    async def reload(arm: str = CONTROL) -> Response:
        """Look now whether an arm has another bundle; also at one that was refused or rolled back before."""
        look = partial(of(arm).look, again=True)
        return swapped(arm, await asyncio.get_running_loop().run_in_executor(None, look))

    @app.post("/v1/admin/rollback", response_model=Swapped, tags=["operation"], responses=refusals(404, 422, 500, 503))
    async def rollback(arm: str = CONTROL) -> Response:
        """Serve again what an arm served before its last swap, until there is yet another bundle."""
        if not await asyncio.get_running_loop().run_in_executor(None, of(arm).roll_back):
            raise NoVersion
        return swapped(arm, "rolled back")
