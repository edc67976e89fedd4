"""What is refused, each as a status and one line that says why."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from fullrank.serving.bodies import Problem, problem_answer
from fullrank.serving.pool import Overloaded, Stopping, TooLate

log = logging.getLogger(__name__)

# Characters of an error; a request may quote a number of thousands of digits.
LONGEST_DETAIL = 1000


_REFUSALS = {
    400: "The body is not JSON that can be parsed.",
    404: "There is no catalogue of items, store of events, such item, other bundle or experiment.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not `application/json`.",
    422: "A field is wrong; `detail` names it.",
    429: "Too much work is waiting; `Retry-After` says for how many seconds.",
    500: "A fault of the server.",
    503: "The server is starting or stopping, the store failed, or the deadline passed.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What `responses` says of these statuses."""
    described: dict[int | str, dict[str, Any]] = {s: {"model": Problem, "description": _REFUSALS[s]} for s in statuses}
    for status in {429, 503} & described.keys():
        header = {"description": "Seconds to wait.", "schema": {"type": "integer"}, "required": True}
        described[status]["headers"] = {"Retry-After": header}
    return described


class NoStore(Exception):
    """The server was started without a store of events."""


class NoCatalogue(Exception):
    """The bundle is a single ranker."""


class NoVersion(Exception):
    """There is no other bundle, or no such arm."""


class NoExperiment(Exception):
    """The server has one arm."""


class NoItem(Exception):
    """There is no item of this id."""


# What is refused for one reason only.
_PLAIN: dict[type[Exception], tuple[int, str]] = {
    NoCatalogue: (404, "this bundle has no catalogue of items to recommend; POST /v1/score scores rows"),
    NoVersion: (404, "there is no such arm, or no other bundle has been served by it"),
    NoExperiment: (404, "this server has no experiment: start it with --arm NAME=BUNDLE:SHARE"),
    NoItem: (404, "there is no item of this id"),
    NoStore: (404, "this server keeps no events: start it with --store DIR"),
    TooLate: (503, "the deadline passed before the answer was ready; try again"),
    Stopping: (503, "the server is starting or stopping; try again"),
}


def problem(request: Request, status: int, detail: str) -> Response:
    """The answer to what cannot be served."""
    return problem_answer(request.state.request_id, status, detail)


def add_handlers(app: FastAPI) -> None:
    """Turn what is raised on the way of a request into its answer."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "")
        if request.method in ("POST", "PATCH") and not kind.partition(";")[0].strip().lower().endswith("json"):
            # What `curl -d` sends unless told otherwise; the body was not even parsed.
            return problem(request, 415, f"the content type is {kind[:80] or 'not given'}, expected application/json")
        return problem(request, 422, _first(error))

    @app.exception_handler(UnicodeEncodeError)
    async def unwritable(request: Request, error: UnicodeEncodeError) -> Response:
        return problem(request, 422, "a text holds half of a surrogate pair, expected valid Unicode")

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> Response:
        line = (str(error).splitlines() or ["wrong value"])[0]
        return problem(request, 422, line if len(line) <= LONGEST_DETAIL else f"{line[:LONGEST_DETAIL]}...")

    @app.exception_handler(HTTPException)
    async def unparsed(request: Request, error: HTTPException) -> Response:
        # FastAPI's answer to JSON that its parser gives up on.
        vague = error.status_code == 400 and error.detail == "There was an error parsing the body"
        detail = "the body is not JSON, is nested too deeply, or has too long a number" if vague else str(error.detail)
        response = problem(request, error.status_code, detail)
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            # FastAPI names the methods of one route only; a path may have several.
            allowed: set[str] = set()
            for route in app.routes:
                if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
                    allowed |= route.methods or set()
            response.headers["Allow"] = ", ".join(sorted(allowed))
        return response

    for kind, said in _PLAIN.items():

        async def plain(request: Request, error: Exception, said: tuple[int, str] = said) -> Response:
            return problem(request, *said)

        app.add_exception_handler(kind, plain)

    @app.exception_handler(OSError)
    async def full(request: Request, error: OSError) -> Response:
        log.error("request %s: %s", request.state.request_id, error)
        return problem(request, 503, "the store cannot be read or written; try again")

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        response = problem(request, 429, f"too much work is waiting; try again in {error.retry_after} s")
        response.headers["Retry-After"] = str(error.retry_after)
        return response


_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "none_required": "null",
    "list_type": "a list",
    "dict_type": "an object",
    "model_attributes_type": "an object",
    "missing": "a value",
}


def _first(error: RequestValidationError) -> str:
    """One line: where in the body, what was expected, what was found if that is short."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    place = _place(first)
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key"
    # Where several types would do, pydantic reports each that did not fit.
    kinds = [_EXPECTED[e["type"]] for e in errors if _place(e) == place and e["type"] in _EXPECTED]
    message = f"expected {' or '.join(dict.fromkeys(kinds))}" if kinds else first["msg"].replace("Input should", "must")
    found = first.get("input")
    short = isinstance(found, bool | int | float | str | None) and len(repr(found)) <= 40
    return f"{place or 'body'}: {message}" + (f", got {found!r}" if short and first["type"] != "missing" else "")


def _place(item: Any) -> str:
    """Path of a wrong value, without pydantic's names for the branches of a union, which come last."""
    steps = [str(step) for step in item["loc"]]
    steps = steps[1:] if steps[:1] == ["body"] else steps
    if steps and steps[-1] in {"int", "str", "float", "none", "constrained-float"}:
        steps.pop()
    return ".".join(step for step in steps if "[" not in step)
