"""Outermost layer of the application: what a request may cost before it is understood, and what is noted of it."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fullrank.serving.bodies import problem_answer
from fullrank.serving.instruments import Instruments

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
# Status of metrics and log for a request whose client left: nobody is answered.
CLIENT_LEFT = 499
_WELL_FORMED = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Limits:
    """Reads a request's body, then calls the application and stops it if the client leaves.

    The body is read before the application sees the request, so that one that is too large or too slow is refused
    whatever its headers claim. Every request has an id, the client's own if that is well formed, which is in the
    answer's headers, in errors and in the log; is counted and timed; and shows no traceback.

    Args:
        max_body: bytes of a body.
        body_seconds: in which it has to be there.
        routes: paths that metrics tell apart.
        note: told what the access log says of a request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body: int,
        body_seconds: float,
        instruments: Instruments,
        routes: frozenset[str],
        note: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.app = app
        self.max_body = max_body
        self.body_seconds = body_seconds
        self.instruments = instruments
        self.routes = routes
        self.note = note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Unknown paths share one label: a scanner must not fill the metrics.
        route = scope["path"] if scope["path"] in self.routes else "other"
        began = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (REQUEST_ID.encode(), request_id.encode())]
            await send(message)

        async def refuse(code: int, detail: str) -> None:
            response = problem_answer(request_id, code, detail)
            # What is left of the body is not waited for.
            response.headers["Connection"] = "close"
            await response(scope, receive, watched)

        self.instruments.in_flight.inc()
        try:
            try:
                async with asyncio.timeout(self.body_seconds):
                    body = await self._read(scope, receive)
            except TimeoutError:
                await refuse(408, f"the request body was not there within {self.body_seconds:g} s")
                return
            if body is None:
                await refuse(413, f"the request body is larger than {self.max_body:,} bytes")
                return
            await self._serve(scope, body, receive, watched)
        except ConnectionAbortedError:
            status = status or CLIENT_LEFT
        except asyncio.CancelledError:
            if not status:
                await refuse(503, "the server is stopping; try again")
        except Exception:
            log.exception("request %s to %s failed", request_id, route)
            if not status:
                await refuse(500, "internal error; the server's log has the details")
        finally:
            seconds = time.perf_counter() - began
            self.instruments.in_flight.dec()
            self.instruments.requests.labels(route, str(status)).inc()
            self.instruments.seconds.labels(route).observe(seconds)
            if self.note is not None:
                client = scope.get("client")
                self.note(
                    {
                        "request_id": request_id,
                        "client": None if client is None else client[0],
                        "method": scope["method"],
                        "route": route,
                        "status": status,
                        "seconds": round(seconds, 6),
                        **scope["state"].get("said", {}),
                    }
                )

    async def _serve(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Call the application; stop it when the client leaves.

        Raises:
            ConnectionAbortedError: if the client left.
        """
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        # The application runs in this task: a task of its own for it would cost as much as all other layers together.
        own, left = asyncio.current_task(), False
        assert own is not None

        async def watch() -> None:
            nonlocal left
            await _disconnected(receive)
            left = True
            own.cancel()

        leaving = asyncio.ensure_future(watch())
        try:
            # Who sent a request and left at once is noticed before the body is parsed.
            await asyncio.sleep(0)
            await self.app(scope, replay, send)
        except asyncio.CancelledError:
            if left and not own.uncancel():
                raise ConnectionAbortedError from None
            raise
        finally:
            leaving.cancel()

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if it is too large.

        Raises:
            ConnectionAbortedError: if the client left before it was whole.
        """
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self.max_body:
                return None
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionAbortedError
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.max_body:
                return None
            if not message.get("more_body", False):
                return b"".join(pieces)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == REQUEST_ID.encode() and _WELL_FORMED.fullmatch(value):
            return str(value.decode())
    return secrets.token_hex(8)
