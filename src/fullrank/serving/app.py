"""The HTTP application: a bundle behind `/v1/recommend` and `/v1/score`."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

import fullrank
from fullrank.funnel import requests as funnel_requests
from fullrank.funnel.bundle import load_bundle
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import ScoredItem, Scorer
from fullrank.serving.instruments import Instruments
from fullrank.serving.limits import Limits
from fullrank.serving.page import page

Result = TypeVar("Result")
# Characters of an error; a request may quote a number of thousands of digits.
LONGEST_DETAIL = 1000
Id = int | str
Number = Annotated[float, Field(allow_inf_nan=False)]
Scalar = int | Number | str | None


class Strict(BaseModel):
    """Base of request and response bodies: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Asker(Strict):
    """Who asks, and where.

    Attributes:
        user_id: as in the log. Unknown users are served.
        features: raw values of user features that are newer than what the bundle knows, by column name; events of a
            sequence are lists named `<sequence>.<field>`, oldest first.
        context: raw values of context features.
    """

    user_id: Id | None = None
    features: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict, max_length=1000)
    context: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict, max_length=1000)

    def request(self) -> funnel_requests.Request:
        return funnel_requests.Request(self.user_id, {**self.features, **self.context})


class RecommendRequest(Asker):
    """Ask for the best `k` items."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"user_id": 7, "k": 5}, {"k": 5}]}
    )

    k: int = Field(default=10, ge=1, le=2**31 - 1)


class ScoreRequest(Asker):
    """Ask for predictions: of named items for someone who asks, or of whole rows.

    Attributes:
        item_ids: items of the catalogue, or new ones.
        rows: instead of all else: raw values of user, item and context features by column name, as in the log. What
            is left out is missing.
    """

    item_ids: list[Id] | None = Field(default=None, min_length=1, max_length=10_000)
    rows: list[dict[str, Scalar | list[Scalar]]] | None = Field(default=None, min_length=1, max_length=10_000)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.item_ids is None) == (self.rows is None):
            raise ValueError(f"expected either item_ids or rows, got {'neither' if self.rows is None else 'both'}")
        beside = {"user_id", "features", "context"} & self.model_fields_set
        if self.rows is not None and beside:
            raise ValueError(f"rows hold all features of each row; {min(beside)} belongs to item_ids")
        return self


class Item(Strict):
    """An item, or a row, with its value and the prediction of each task."""

    item_id: Id | None
    value: float | None
    predictions: dict[str, float | None]


class RecommendResponse(Strict):
    """A ranked list, and the number of candidates that each stage scored."""

    items: list[Item]
    candidates: dict[str, int]


class ScoreResponse(Strict):
    """Items, or rows, in the order of the request."""

    items: list[Item]


class Status(Strict):
    """State of the server."""

    status: str


class ServingConfig(BaseModel):
    """How a server runs.

    Attributes:
        workers: requests scored at the same time.
        waiting: requests that may wait for a worker; more are answered with 503 at once, because an answer that comes
            too late costs as much as one in time.
        torch_threads: threads of one request's matrix products; 1 gives the best latency for a few hundred candidates
            and leaves the other cores to other requests.
        max_body: bytes of a request's body.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(default=2, ge=1)
    waiting: int = Field(default=256, ge=0)
    torch_threads: int = Field(default=1, ge=1)
    max_body: int = Field(default=1_000_000, ge=1)


class Overloaded(Exception):
    """Too many requests wait."""


class NoCatalogue(Exception):
    """The bundle is a single ranker."""


def create_app(bundle: Path | Funnel | Scorer, config: ServingConfig | None = None) -> FastAPI:
    """The application that serves a bundle. A single ranker scores rows; a funnel recommends and scores items too.

    Raises:
        ValueError: if the bundle cannot be opened; see `load_bundle`.
    """
    config = config or ServingConfig()
    torch.set_num_threads(config.torch_threads)
    content = load_bundle(bundle) if isinstance(bundle, Path) else bundle
    funnel, scorer = (content, content.scorer) if isinstance(content, Funnel) else (None, content)
    instruments = Instruments()
    pool = ThreadPoolExecutor(config.workers, thread_name_prefix="scoring")
    in_pool = 0
    ready = False

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal ready
        # The first forward pass allocates; no user should wait for it.
        for _worker in range(config.workers):
            await asyncio.get_running_loop().run_in_executor(pool, lambda: scorer.score([{}]))
            if funnel is not None:
                stranger = funnel_requests.Request()
                await asyncio.get_running_loop().run_in_executor(pool, funnel.recommend, [stranger], 1)
        ready = True
        yield
        ready = False
        pool.shutdown(wait=True)

    app = FastAPI(
        title="fullrank", version=fullrank.__version__, summary="A ranking funnel over HTTP.", lifespan=lifespan
    )

    async def scored(work: Callable[[], Result]) -> Result:
        nonlocal in_pool
        if in_pool >= config.workers + config.waiting:
            instruments.refused.inc()
            raise Overloaded
        in_pool += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        finally:
            in_pool -= 1

    # A response is written as JSON here rather than by FastAPI, which would first validate every item of it again.
    @app.post("/v1/recommend", response_model=RecommendResponse, tags=["ranking"])
    async def recommend(body: RecommendRequest) -> Response:
        """The best items for a user, best first; all there are if `k` is larger than the catalogue."""
        if funnel is None:
            raise NoCatalogue
        request = body.request()

        def work() -> bytes:
            answer = funnel.recommend([request], body.k, instruments.observe_stage)[0]
            return _json({"items": [_item(item) for item in answer.items], "candidates": answer.candidates})

        return Response(await scored(work), media_type="application/json")

    @app.post("/v1/score", response_model=ScoreResponse, tags=["ranking"])
    async def score(body: ScoreRequest) -> Response:
        """Predictions of the final stage for named items, unknown ones scored as new, or for whole rows."""
        item_ids, rows = body.item_ids, body.rows

        def score() -> list[ScoredItem]:
            if rows is not None:
                return scorer.score(rows, instruments.observe_stage)
            if funnel is None:
                raise ValueError("item_ids: this bundle has no catalogue of items; give rows")
            assert item_ids is not None
            return funnel.score(body.request(), item_ids)

        return Response(
            await scored(lambda: _json({"items": [_item(item) for item in score()]})), media_type="application/json"
        )

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> Status:
        """The process is alive."""
        return Status(status="ok")

    @app.get("/readyz", response_model=Status, tags=["operation"])
    async def readyz() -> Response:
        """The bundle is loaded and warm; 503 before and while shutting down."""
        return Response(
            _json({"status": "ready" if ready else "starting"}),
            status_code=200 if ready else 503,
            media_type="application/json",
        )

    @app.get("/metrics", response_class=Response, tags=["operation"])
    async def metrics() -> Response:
        """Prometheus metrics: requests, latency of each stage, requests in flight."""
        return Response(generate_latest(instruments.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def root() -> HTMLResponse:
        return HTMLResponse(page(content))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "")
        if request.method == "POST" and not kind.partition(";")[0].strip().lower().endswith("json"):
            # What `curl -d` sends unless told otherwise; the body was not even parsed.
            return _problem(415, f"the content type is {kind[:80] or 'not given'}, expected application/json")
        return _problem(422, _first(error))

    @app.exception_handler(UnicodeEncodeError)
    async def unwritable(_: Request, error: UnicodeEncodeError) -> Response:
        return _problem(422, "a text holds half of a surrogate pair, expected valid Unicode")

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> Response:
        line = (str(error).splitlines() or ["wrong value"])[0]
        return _problem(422, line if len(line) <= LONGEST_DETAIL else f"{line[:LONGEST_DETAIL]}...")

    @app.exception_handler(HTTPException)
    async def unparsed(_: Request, error: HTTPException) -> Response:
        # FastAPI's answer to JSON that its parser gives up on.
        vague = error.status_code == 400 and error.detail == "There was an error parsing the body"
        detail = "the body is not JSON, is nested too deeply, or has too long a number" if vague else str(error.detail)
        response = _problem(error.status_code, detail)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(NoCatalogue)
    async def no_catalogue(_: Request, error: NoCatalogue) -> Response:
        return _problem(404, "this bundle has no catalogue of items to recommend; POST /v1/score scores rows")

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Overloaded) -> Response:
        response = _problem(503, "too many requests are waiting; try again")
        response.headers["Retry-After"] = "1"
        return response

    routes = frozenset(["/v1/recommend", "/v1/score", "/healthz", "/readyz", "/metrics", "/", "/docs", "/openapi.json"])
    app.add_middleware(Limits, max_body=config.max_body, instruments=instruments, routes=routes)
    return app


def _item(item: ScoredItem) -> dict[str, Any]:
    # JSON has no infinite numbers; a regression may overflow to one.
    predictions = {task: number if math.isfinite(number) else None for task, number in item.predictions.items()}
    return {"item_id": item.item_id, "value": item.value, "predictions": predictions}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _problem(status: int, detail: str) -> Response:
    return Response(_json({"detail": detail}), status_code=status, media_type="application/json")


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
