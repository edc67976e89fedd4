"""The paths of the application."""

from __future__ import annotations

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import ScoredItem, Scorer
from fullrank.serving.bodies import (
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
    Status,
    answer,
    encoded,
    item_json,
    recommended_json,
)
from fullrank.serving.errors import NoCatalogue
from fullrank.serving.instruments import Instruments
from fullrank.serving.page import page
from fullrank.serving.pool import Pool

# Those that metrics tell apart; the last two are FastAPI's.
PATHS = frozenset(["/v1/recommend", "/v1/score", "/healthz", "/readyz", "/metrics", "/", "/docs", "/openapi.json"])


def add_routes(app: FastAPI, content: Funnel | Scorer, pool: Pool, instruments: Instruments) -> None:
    """Answer from a funnel, or from a single ranker, which has no items to recommend."""
    funnel, scorer = (content, content.scorer) if isinstance(content, Funnel) else (None, content)

    @app.post("/v1/recommend", response_model=RecommendResponse, tags=["ranking"])
    async def recommend(body: RecommendRequest) -> Response:
        """The best items for a user, best first; all there are if `k` is larger than the catalogue."""
        if funnel is None:
            raise NoCatalogue
        request = body.request()

        def work() -> bytes:
            found = funnel.recommend([request], body.k, instruments.observe_stage)[0]
            return encoded({"items": [recommended_json(item) for item in found.items], "candidates": found.candidates})

        return answer(await pool.run(work))

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

        return answer(await pool.run(lambda: encoded({"items": [item_json(item) for item in score()]})))

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> Status:
        """The process is alive."""
        return Status(status="ok")

    @app.get("/readyz", response_model=Status, tags=["operation"])
    async def readyz() -> Response:
        """The bundle is loaded and warm; 503 before and while shutting down."""
        return answer(encoded({"status": "ready" if pool.ready else "starting"}), 200 if pool.ready else 503)

    @app.get("/metrics", response_class=Response, tags=["operation"])
    async def metrics() -> Response:
        """Prometheus metrics: requests, latency of each stage, requests in flight."""
        return Response(generate_latest(instruments.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def root() -> HTMLResponse:
        return HTMLResponse(page(content))
