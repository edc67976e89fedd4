"""`/`, which asks on behalf of a person as a client would, `/live` and `/docs`."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import fastapi
from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ValidationError

from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import Scorer
from fullrank.serving.bodies import RecommendRequest, ScoreRequest
from fullrank.serving.description import description_page
from fullrank.serving.instruments import Instruments
from fullrank.serving.live import Live, Served
from fullrank.serving.page import DESCRIBED, MOST_ITEMS, SECURITY_POLICY, page, refused
from fullrank.serving.page_answer import recommended, scored
from fullrank.serving.page_card import live_numbers, model_card

Body = TypeVar("Body", bound=BaseModel)

_INTEGER = re.compile(r"-?\d{1,15}")


def add_page(
    app: FastAPI,
    live: Live,
    about: Callable[[], Mapping[str, Any]],
    instruments: Instruments,
    recommend: Callable[[RecommendRequest, fastapi.Request], Awaitable[Response]],
    score: Callable[[ScoreRequest, fastapi.Request], Awaitable[Response]],
) -> None:
    """Pages for people.

    Args:
        about: what the bundle that is served says of itself.
        recommend, score: what answers `/v1/recommend` and `/v1/score`: what a person asks is admitted, limited and
            answered as all else is.
    """
    cards: dict[str, str] = {}

    def card(served: Served) -> str:
        """That of one version at a time."""
        if served.version not in cards:
            cards.clear()
            cards[served.version] = model_card(served.content, served.version, about())
        return cards[served.version]

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def root(asked: fastapi.Request) -> HTMLResponse:
        given, served = dict(asked.query_params), live.served
        content = served.content
        status, headers, said = 200, {"Content-Security-Policy": SECURITY_POLICY}, ""
        if given.keys() & {"user", "k", "rows", *DESCRIBED}:
            answered = await _answered(app, asked, content, given, recommend, score)
            status, body = answered.status_code, json.loads(bytes(answered.body))
            if status != 200:
                wait = answered.headers.get("retry-after")
                headers |= {} if wait is None else {"Retry-After": wait}
                said = refused(status, body["detail"], wait)
            elif isinstance(content, Funnel):
                user = given.get("user", "").strip() or None
                known = content.users is not None and user is not None and content.users.row(user) is not None
                said = recommended(body, user, known=known)
            else:
                said = scored(body["items"])
        text = page(content, given, said, card(served), live_numbers(instruments))
        return HTMLResponse(text, status_code=status, headers=headers)

    @app.get("/live", response_class=HTMLResponse, include_in_schema=False)
    async def numbers() -> HTMLResponse:
        return HTMLResponse(live_numbers(instruments), headers={"Cache-Control": "no-store"})

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(description_page(app.openapi()))


async def _answered(
    app: FastAPI,
    asked: fastapi.Request,
    content: Funnel | Scorer,
    given: Mapping[str, str],
    recommend: Callable[[RecommendRequest, fastapi.Request], Awaitable[Response]],
    score: Callable[[ScoreRequest, fastapi.Request], Awaitable[Response]],
) -> Response:
    """The answer of the route that the form is for; a refusal as that route would answer it.

    Raises:
        Exception: a fault of ours.
    """
    try:
        if isinstance(content, Funnel):
            return await recommend(_body(RecommendRequest, _recommend_body(given)), asked)
        rows = _parsed("rows", given.get("rows", ""))
        return await score(_body(ScoreRequest, {"rows": rows if isinstance(rows, list) else [rows]}), asked)
    except Exception as error:
        handler = next(
            (app.exception_handlers[kind] for kind in type(error).__mro__ if kind in app.exception_handlers), None
        )
        if handler is None:
            raise
        answer: Response = await handler(asked, error)  # type: ignore[misc]
        return answer


def _recommend_body(given: Mapping[str, str]) -> dict[str, Any]:
    """The body of `/v1/recommend` that the fields of the form stand for.

    Raises:
        ValueError: if one is not what it should be.
    """
    user, k = given.get("user", "").strip(), given.get("k", "").strip() or "10"
    if not _INTEGER.fullmatch(k) or int(k) > MOST_ITEMS:
        raise ValueError(f"items is {k[:40]!r}, expected a number of at most {MOST_ITEMS}")
    body: dict[str, Any] = {"k": int(k), "explain": True}
    if user:
        body["user_id"] = int(user) if _INTEGER.fullmatch(user) else user
    return body | {name: _parsed(name, given[name]) for name in DESCRIBED if given.get(name, "").strip()}


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{name}: is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name}: is not JSON: {error}") from None


def _body(kind: type[Body], values: dict[str, Any]) -> Body:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
