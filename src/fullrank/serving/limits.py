"""Outermost layer of the application: request size, request metrics, and no traceback to a client."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fullrank.serving.instruments import Instruments

log = logging.getLogger(__name__)


class Limits:
    """Reads a request's body up to `max_body` bytes, then calls the application; counts and times every request.

    The body is read before the application sees the request, so that one that is too large is refused whatever its
    headers claim.
    """

    def __init__(self, app: ASGIApp, *, max_body: int, instruments: Instruments, routes: frozenset[str]) -> None:
        self.app = app
        self.max_body = max_body
        self.instruments = instruments
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Unknown paths share one label: a scanner must not fill the metrics.
        route = scope["path"] if scope["path"] in self.routes else "other"
        began = time.perf_counter()
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.instruments.in_flight.inc()
        try:
            body = await self._read(scope, receive)
            if body is None:
                await _answer(watched, 413, f"the request body is larger than {self.max_body:,} bytes")
                return
            messages: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

            async def replay() -> Message:
                return messages.pop() if messages else await receive()

            await self.app(scope, replay, watched)
        except Exception:
            log.exception("request to %s failed", route)
            if status == 500:
                await _answer(watched, 500, "internal error; the server's log has the details")
        finally:
            self.instruments.in_flight.dec()
            self.instruments.requests.labels(route, str(status)).inc()
            self.instruments.seconds.labels(route).observe(time.perf_counter() - began)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self.max_body:
                return None
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.max_body:
                return None
            if not message.get("more_body", False):
                break
        return b"".join(pieces)


async def _answer(send: Send, status: int, detail: str) -> None:
    content = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
