"""Facts about lists that are made together."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx import Response
from pytest import approx

from fullrank.funnel import Funnel, Request
from fullrank.serving import ServingConfig, create_app

EDGE = 'fullrank_lists_together_bucket{le="1.0"}'


class Held:
    """`Funnel.recommend` that waits to be let go the first time, and keeps who was asked about together."""

    def __init__(self, funnel: Funnel) -> None:
        self.recommend, self.begun, self.release = funnel.recommend, threading.Event(), threading.Event()
        self.passes: list[list[Any]] = []

    def __call__(self, requests: Sequence[Request], *arguments: Any, **options: Any) -> Any:
        self.passes.append([request.user_id for request in requests])
        if not self.begun.is_set():
            self.begun.set()
            assert self.release.wait(30)
        return self.recommend(requests, *arguments, **options)


def asked(
    funnel: Funnel, monkeypatch: pytest.MonkeyPatch, bodies: Sequence[dict[str, Any]], pause: float = 0.0
) -> tuple[list[Response], list[list[Any]]]:
    """Answers to requests that came while the only worker was busy, and who was asked about together after that."""
    with TestClient(create_app(funnel, ServingConfig(workers=1))) as client, ThreadPoolExecutor(16) as threads:
        held = Held(funnel)
        monkeypatch.setattr(funnel, "recommend", held)

        def post(body: dict[str, Any]) -> Response:
            return client.post("/v1/recommend", json=body)

        first = threads.submit(post, {"user_id": -1})
        assert held.begun.wait(30)
        others: list[Future[Response]] = []
        for place, body in enumerate(bodies):
            others.append(threads.submit(post, body))
            for _ in range(3000):  # until it waits, so that they wait in this order
                if f"fullrank_rows_admitted {20.0 * (place + 2)}" in client.get("/metrics").text:
                    break
                time.sleep(0.01)
        time.sleep(pause)
        held.release.set()
        assert first.result(30).status_code == 200
        answers = [other.result(30) for other in others]
        assert f"{EDGE} {sum(len(each) == 1 for each in held.passes):.1f}" in client.get("/metrics").text or any(
            answer.status_code != 200 for answer in answers
        )
    return answers, held.passes[1:]


def test_what_waits_is_answered_in_one_pass_and_as_if_alone(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    users = [3, 1, 4, 1, 5]
    alone = {user: funnel.recommend([Request(user)], 10)[0].items for user in users}
    answers, passes = asked(funnel, monkeypatch, [{"user_id": user} for user in users])
    assert passes == [users]
    for user, found in zip(users, answers, strict=True):
        items = found.json()["items"]
        assert [item["item_id"] for item in items] == [item.item_id for item in alone[user]]
        assert [item["value"] for item in items] == [approx(item.value, rel=1e-5) for item in alone[user]]
    assert len({found.json()["request_id"] for found in answers}) == 5


def test_other_lengths_and_filters_are_answered_apart(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    filtered = {"user_id": 3, "filter": {"range": {"price": [None, None]}}}
    bodies: list[dict[str, Any]] = [{"user_id": 1}, {"user_id": 2, "k": 4}, filtered, {"user_id": 4}]
    answers, passes = asked(funnel, monkeypatch, bodies)
    assert [len(found.json()["items"]) for found in answers] == [10, 4, 10, 10]
    assert sorted(passes) == [[1, 4], [2], [3]]


def test_who_is_to_blame_alone_gets_the_error(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[dict[str, Any]] = [{"user_id": user} for user in range(6)]
    bodies[2]["context"] = {"devise": 1}
    answers, passes = asked(funnel, monkeypatch, bodies)
    assert [found.status_code for found in answers] == [200, 200, 422, 200, 200, 200]
    assert 'unknown feature "devise"' in answers[2].json()["detail"]
    assert [3, 4, 5] in passes  # the others are still answered together


def test_nobody_loses_more_than_half_of_the_time(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [20_000.0, 30_000.0, 50_000.0, None, 1.0]
    bodies = [{"user_id": user, "deadline_ms": time} for user, time in enumerate(times)]
    answers, passes = asked(funnel, monkeypatch, bodies, pause=0.05)
    assert sorted(passes) == [[0, 1], [2], [3], [4]]
    assert [bool(found.json()["degraded"]) for found in answers] == [False] * 4 + [True]
