"""The paths of the application."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import fastapi
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from fullrank.funnel.explaining import explain
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import ScoredItem
from fullrank.serving.batching import Batcher
from fullrank.serving.bodies import (
    RecommendRequest,
    RecommendResponse,
    ScoreRequest,
    ScoreResponse,
    Status,
    answer,
    encoded,
    explained_json,
    item_json,
    recommended_json,
)
from fullrank.serving.completing import Completed, completed, with_events
from fullrank.serving.errors import NoCatalogue, refusals
from fullrank.serving.experiment import OPT_OUT, Experiment
from fullrank.serving.impressions import AnsweredList, ImpressionLog
from fullrank.serving.instruments import Instruments
from fullrank.serving.live import Live
from fullrank.serving.page_routes import add_page
from fullrank.serving.pool import Pool
from fullrank.serving.stores import UserEvents
from fullrank.serving.student_histories import StudentHistories

# Those that metrics tell apart.
PATHS = frozenset(
    [
        *("/v1/recommend", "/v1/score", "/v1/feedback", "/v1/items", "/healthz", "/readyz", "/metrics"),
        *("/", "/live", "/docs", "/openapi.json"),
    ]
)

# Seconds that an answer may take after its deadline, when no more work is begun.
SLACK = 0.5

# Rows of a request that are scored in one go; then it is the turn of others.
ROWS_AT_ONCE = 1024


class _Asked(NamedTuple):
    """A request for a list.

    Attributes:
        source: what answers it, of an experiment that of its arm.
        counts: whether its answer counts in the experiment.
        ends: when it has to be there, as `time.perf_counter` reads then.
    """

    body: RecommendRequest
    source: Live
    arm: str | None
    counts: bool
    ends: float
    request_id: str


class _Made(NamedTuple):
    """An answer, and what is to be kept of it."""

    content: bytes
    shown: AnsweredList | None


def add_routes(
    app: FastAPI,
    live: Live,
    pool: Pool,
    instruments: Instruments,
    store: UserEvents | None = None,
    experiment: Experiment | None = None,
    about: Callable[[], Mapping[str, Any]] = dict,
    impressions: ImpressionLog | None = None,
    histories: StudentHistories | None = None,
) -> None:
    """Answer from a funnel, or from a single ranker, which has no items to recommend.

    Args:
        store: of what users did since the bundle was made.
        experiment: whose arms answer; rows, and who has no id, are scored by `live`.
        about: what the bundle says of itself, for the page.
        impressions: keeps the lists that are answered, but for those that are explained.
        histories: of embeddings, for students among the rankers.
    """
    histories = histories or StudentHistories(None)
    ranking = refusals(400, 408, 413, 415, 422, 429, 500, 503)

    def lists(asked: Sequence[_Asked]) -> list[_Made]:
        """The answers to requests of one source and one `k`, made in one pass."""
        seconds: dict[str, float] = {}

        def observe(stage: str, spent: float) -> None:
            seconds[stage] = seconds.get(stage, 0.0) + spent
            instruments.observe_stage(stage, spent)

        k, ends = asked[0].body.k, min(each.ends for each in asked)
        left = None if math.isinf(ends) else max(0.0, 1000 * (ends - time.perf_counter()))
        requests, began = [completed(each.body, store) for each in asked], time.perf_counter()
        with asked[0].source.reading() as (funnel, version, changes):
            assert isinstance(funnel, Funnel)
            full, unread = histories.known(funnel, [each.request for each in requests])
            lists = funnel.recommend(full, k, observe, deadline_ms=left)
            # What is to be explained comes alone.
            explained = explain(funnel, full[0], k) if asked[0].body.explain else None
        spent = time.perf_counter() - began
        answers = []
        for each, request, found in zip(asked, requests, lists, strict=True):
            degraded = [*request.degraded, *unread, *found.degraded]
            for stage in degraded:
                instruments.degraded.labels(stage).inc()
            if experiment is not None and each.arm is not None:
                instruments.observe_arm(each.arm, spent, degraded=bool(degraded))
            said = {
                "items": [recommended_json(item) for item in found.items],
                "candidates": found.candidates,
                "degraded": degraded,
                "request_id": each.request_id,
                "model_version": version,
                "index_version": changes,
                "arm": None if each.body.experiment == OPT_OUT else each.arm,
                "timings": {stage: round(1000 * taken, 3) for stage, taken in seconds.items()},
            }
            if explained is not None:
                said["explained"] = [explained_json(item) for item in explained]
            shown = None
            if impressions is not None and explained is None:
                items = [(item.item_id, item.propensity) for item in found.items if item.item_id is not None]
                then = int(time.time()) if request.request.time is None else request.request.time
                shown = AnsweredList(funnel, version, request.request, each.request_id, then, items)
            answers.append(_Made(encoded(said), shown))
        if experiment is not None:
            counted = [(each.arm, each.body.user_id, each.request_id) for each in asked if each.arm and each.counts]
            experiment.answered(counted)
        instruments.together.observe(len(asked))
        return answers

    batcher = Batcher(pool, lists)

    def answering(user: int | str | None, request_id: str, wish: str | None) -> tuple[str | None, bool, Live]:
        """The arm that answers, if there are any, whether that counts, and what is served there."""
        if experiment is not None:
            arm, counts = experiment.chosen(user, request_id, wish)
            return arm, counts, experiment.arms[arm]
        if wish not in (None, OPT_OUT):
            raise ValueError("experiment: this server has none; start it with --arm NAME=BUNDLE:SHARE")
        return None, False, live

    @app.post(
        "/v1/recommend", response_model=RecommendResponse, tags=["ranking"], responses={**ranking, **refusals(404)}
    )
    async def recommend(body: RecommendRequest, asked: fastapi.Request) -> Response:
        """The best items for a user, best first; all there are if `k` is larger than the catalogue."""
        arm, counts, source = answering(body.user_id, asked.state.request_id, body.experiment)
        known = source.served.content
        if not isinstance(known, Funnel):
            raise NoCatalogue
        rows = min(len(known.items), max(body.k, known.sizes.finalists(len(known.early))))
        if body.explain:
            rows += (len(known.early) + 1) * known.sizes.retrieve
        asked.state.said = {"rows": rows} if arm is None else {"rows": rows, "arm": arm}
        seconds, ends = None, math.inf
        if body.deadline_ms is not None:
            seconds, ends = body.deadline_ms / 1000 + SLACK, time.perf_counter() + body.deadline_ms / 1000
        one = _Asked(body, source, arm, counts, ends, asked.state.request_id)
        async with pool.admitted(rows, _client(asked), seconds) as admitted:
            if body.explain or body.filter is not None:
                made = await admitted.piece(lambda: lists([one])[0], rows)
            else:
                kind = (id(source), body.k)
                made = await batcher(one, rows, kind=kind, dropped=admitted.deadline, ends=ends)
        # Whoever left before is not shown it: then this is not reached.
        if impressions is not None and made.shown is not None:
            impressions.add(made.shown)
        return answer(made.content)

    @app.post("/v1/score", response_model=ScoreResponse, tags=["ranking"], responses=ranking)
    async def score(body: ScoreRequest, asked: fastapi.Request) -> Response:
        """Predictions of the final stage for named items, unknown ones scored as new, or for whole rows."""
        item_ids, rows = body.item_ids, body.rows
        total = len(rows or item_ids or ())
        split = body.experiment or (OPT_OUT if body.user_id is None else None)
        arm, _, source = answering(body.user_id, asked.state.request_id, split)
        asked.state.said = {"rows": total} if arm is None else {"rows": total, "arm": arm}
        # The same for all pieces.
        content, version, _ = source.served
        funnel, scorer = (content, content.scorer) if isinstance(content, Funnel) else (None, content)
        known: Completed | None = None
        degraded: list[str] = []

        def some(begin: int) -> Callable[[], bytes]:
            end = begin + ROWS_AT_ONCE

            def work() -> bytes:
                nonlocal known, degraded
                scored: list[ScoredItem]
                if rows is not None:
                    extra, degraded = histories.of_rows(scorer, rows[begin:end], begin + 1)
                    scored = scorer.score(rows[begin:end], instruments.observe_stage, first=begin + 1, extra=extra)
                elif funnel is None:
                    raise ValueError("item_ids: this bundle has no catalogue of items; give rows")
                else:
                    assert item_ids is not None
                    if known is None:
                        known = with_events(body.request(), store)
                        full, unread = histories.known(funnel, [known.request])
                        known, degraded = Completed(full[0], known.degraded), [*known.degraded, *unread]
                    scored = funnel.score(known.request, item_ids[begin:end])
                return encoded([item_json(item) for item in scored])[1:-1]

            return work

        async with pool.admitted(total, _client(asked)) as admitted:
            parts = [
                await admitted.piece(some(begin), min(ROWS_AT_ONCE, total - begin))
                for begin in range(0, total, ROWS_AT_ONCE)
            ]
        for stage in degraded:
            instruments.degraded.labels(stage).inc()
        said = {"degraded": degraded, "model_version": version, "arm": None if body.experiment == OPT_OUT else arm}
        return answer(b'{"items":[' + b",".join(parts) + b"]," + encoded(said)[1:])

    @app.get("/healthz", tags=["operation"], responses=refusals(500))
    async def healthz() -> Status:
        """The process is alive."""
        return Status(status="ok")

    @app.get(
        "/readyz",
        response_model=Status,
        tags=["operation"],
        responses={503: {"model": Status, "description": "Not yet, or not any more."}, **refusals(500)},
    )
    async def readyz() -> Response:
        """The bundle is loaded and warm; 503 before and while shutting down."""
        return answer(encoded({"status": "ready" if pool.ready else "starting"}), 200 if pool.ready else 503)

    @app.get(
        "/metrics",
        response_class=Response,
        tags=["operation"],
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals(500)},
    )
    async def metrics() -> Response:
        """Prometheus metrics: requests, latency of each stage, requests in flight."""
        return Response(generate_latest(instruments), media_type=CONTENT_TYPE_LATEST)

    add_page(app, live, about, instruments, recommend, score)


def _client(request: fastapi.Request) -> str:
    return request.client.host if request.client is not None else ""
