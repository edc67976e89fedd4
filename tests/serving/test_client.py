"""Facts about the client, against a real server, and against one that behaves badly."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi import FastAPI

from fullrank.client import Client, Event, RequestFailed
from fullrank.funnel import Funnel, Request
from fullrank.serving import create_app

Listening = Callable[[FastAPI], AbstractContextManager[str]]


@pytest.fixture(scope="module")
def client(funnel: Funnel, listening: Listening, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    app = create_app(funnel, store=tmp_path_factory.mktemp("store"))
    with listening(app) as url, Client(url) as client:
        yield client


def test_it_gets_the_funnels_answers(client: Client, funnel: Funnel) -> None:
    assert client.ready()
    found = client.recommend(3, 5, context={"device": 2}, explain=True)
    expected = funnel.recommend([Request(3, {"device": 2})], 5)[0]
    assert [(item.item_id, item.value) for item in found.items] == [(i.item_id, i.value) for i in expected.items]
    assert found.items[0].propensity == 1.0 and found.candidates == expected.candidates and not found.degraded
    assert found.explained is not None and {item.fell_out for item in found.explained} == {None, "early", "final"}
    scored = client.score(3, [9, "new", 4])
    assert [item.predictions for item in scored] == [
        item.predictions for item in funnel.score(Request(3), [9, "new", 4])
    ]
    rows = [{"device": 1}, {}]
    assert [item.value for item in client.score_rows(rows)] == [item.value for item in funnel.scorer.score(rows)]


def test_feedback_goes_in_batches_and_twice_is_once(client: Client) -> None:
    events = [Event("far", item % 80, {"click": 1}, impression_id="x") for item in range(1500)]
    assert {status.status for status in client.feedback(events)} == {201}
    assert {status.status for status in client.feedback(events[:10])} == {200}
    wrong = client.feedback([Event("far", 1, {"klick": 1}), Event("far", 1)])
    assert [status.ok for status in wrong] == [False, True] and "klick" in (wrong[0].detail or "")
    assert client.forget("far")["events"] == 1501


def test_a_refusal_has_its_status_and_its_line(client: Client) -> None:
    with pytest.raises(RequestFailed, match="422: k: must be greater than or equal to 1, got 0") as caught:
        client.recommend(k=0)
    assert caught.value.status == 422 and caught.value.request_id
    with pytest.raises(ValueError):
        client.recommend(features={"age": float("nan")})


@contextmanager
def scripted(*answers: Any) -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    """A server that gives these answers in turn: status, headers and body, or None, which hangs up."""
    asked: list[tuple[str, str, Any]] = []
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            asked.append((self.command, self.path, json.loads(body) if body else None))
            found = left.pop(0)
            if found is None:
                self.close_connection = True
                return
            status, headers, said = found
            content = json.dumps(said).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


SCORED = (200, {}, {"items": [{"item_id": 1, "value": 0.5, "predictions": {}, "of a later server": 1}]})


def test_it_waits_as_long_as_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    busy, stopping = (429, {"Retry-After": "7"}, {"detail": "busy"}), (503, {}, {"detail": "stopping"})
    with scripted(busy, stopping, None, SCORED) as (url, asked), Client(url) as client:
        assert client.score(item_ids=[1])[0].value == 0.5
    assert waits[:3] == [7, 0.2, 0.4] and len(asked) == 4
    assert len({json.dumps(body) for *_, body in asked}) == 1


def test_it_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    busy = (429, {"Retry-After": "7"}, {"detail": "busy"})
    with scripted(busy, busy, busy) as (url, asked), Client(url, retries=1) as client:
        with pytest.raises(RequestFailed, match="429: busy") as caught:
            client.recommend()
        assert caught.value.retry_after == 7 and len(asked) == 2
        with Client(url, longest_wait=5) as impatient, pytest.raises(RequestFailed, match="busy"):
            impatient.recommend()
    assert len(asked) == 3


def test_no_server_and_no_fullrank_server_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with scripted((200, {}, "hello"), (404, {}, "<html>")) as (url, _), Client(url) as client:
        with pytest.raises(RequestFailed, match="is this a fullrank server"):
            client.recommend()
        with pytest.raises(RequestFailed, match="404: Not Found"):
            client.recommend()
    gone = Client(url)
    with pytest.raises(RequestFailed, match="refused") as caught:
        gone.recommend()
    assert caught.value.status is None and not gone.ready()
    for wrong in ("localhost:8000", "ftp://x", "http://"):
        with pytest.raises(ValueError, match="no address of a server"):
            Client(wrong)


def test_items_are_put_changed_and_removed_by_their_paths() -> None:
    new, changed = {"items": [{"item_id": "a/b", "status": 201}]}, {"item_id": "a/b", "status": 200}
    with (
        scripted((201, {}, new), (200, {}, changed), (200, {}, changed)) as (url, asked),
        Client(url + "/x/") as client,
    ):
        assert client.put_items([{"item_id": "a/b", "features": {"price": 2.0}, "bid": 1.5}])[0].item_id == "a/b"
        assert client.change_item("a/b", hidden=True).ok and client.remove_item("a/b").ok
    assert asked == [
        ("POST", "/x/v1/items", {"items": [{"item_id": "a/b", "features": {"price": 2.0}, "bid": 1.5}]}),
        ("PATCH", "/x/v1/items/a%2Fb", {"hidden": True}),
        ("DELETE", "/x/v1/items/a%2Fb", None),
    ]


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys, fullrank.client; print([m for m in ('torch', 'numpy', 'pydantic', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
