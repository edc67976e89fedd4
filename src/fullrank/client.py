"""A client of `fullrank serve`, of the standard library alone.

with Client("http://localhost:8000") as client:
    found = client.recommend(user_id=17, k=5)
    client.feedback([Event(17, found.items[0].item_id, {"click": 1}, impression_id=found.request_id)])
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

Id = int | str
Result = TypeVar("Result")

# What the server takes in one request.
EVENTS_AT_ONCE = ITEMS_AT_ONCE = 1000
# Seconds before the first repeat where the server does not say; twice as long before each further one.
FIRST_PAUSE = 0.1
# Too much work is waiting, or the server is starting or stopping.
_LATER = (429, 503)


class RequestFailed(Exception):
    """A request that was refused, or not answered.

    Attributes:
        status: of the answer; None if there was none.
        detail: one line.
        request_id: as in the server's log.
        retry_after: seconds after which the server asks to try again.
    """

    def __init__(
        self, status: int | None, detail: str, request_id: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(detail if status is None else f"{status}: {detail}")
        self.status, self.detail, self.request_id, self.retry_after = status, detail, request_id, retry_after


@dataclass(frozen=True)
class Item:
    """An item, or a row, with its value and the prediction of each task; None where there is no number.

    Attributes:
        propensity: probability that it was drawn with; None for what was scored, not recommended.
        payment: in an auction.
    """

    item_id: Id | None
    value: float | None
    predictions: dict[str, float | None]
    propensity: float | None = None
    payment: float | None = None


@dataclass(frozen=True)
class Explained:
    """A candidate on its way: values, ranks and predictions by stage, and why which stage dropped it."""

    item_id: Id
    values: dict[str, float | None]
    ranks: dict[str, int]
    predictions: dict[str, dict[str, float | None]]
    fell_out: str | None
    reason: str | None


@dataclass(frozen=True)
class Recommended:
    """A ranked list, best first.

    Attributes:
        candidates: how many each stage was handed.
        degraded: stages that were late or failed; `store` if what the user did could not be read.
        request_id: what feedback on the list names as `impression_id`.
        timings: milliseconds of each stage.
        explained: where it was asked for.
    """

    items: list[Item]
    candidates: dict[str, int]
    degraded: list[str]
    request_id: str
    model_version: str
    index_version: int
    timings: dict[str, float]
    explained: list[Explained] | None = None


@dataclass(frozen=True)
class Event:
    """Something that happened between a user and an item; no label at all is an impression.

    Attributes:
        timestamp: seconds since 1970; default when the server gets it.
        event_id: one that is sent again is counted once; default a name that no other event has.
    """

    user_id: Id
    item_id: Id
    labels: Mapping[str, float] = field(default_factory=dict)
    timestamp: int | None = None
    event_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    impression_id: str | None = None
    features: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """What became of an event or an item: 201 new, 200 known already, 422 refused, with the reason."""

    status: int
    detail: str | None = None
    item_id: Id | None = None

    @property
    def ok(self) -> bool:
        return self.status < 300


class Client:
    """Asks a server. Threads may share it: each has a connection of its own, which is kept open.

    Every call may be repeated without harm, since events have names and the rest reads or replaces. So 429 and 503 are
    tried again after the time that the server names, and a broken connection soon. A timeout is not: it is the
    caller's patience that is over.

    Args:
        url: of the server, such as `http://localhost:8000`.
        token: sent as `Authorization: Bearer`.
        timeout: seconds to wait for a connection, and for each piece of an answer.
        retries: how often a call is tried again.
        longest_wait: seconds; a server that asks for more is not waited for.

    Raises:
        ValueError: if the URL is none.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout: float = 10.0,
        *,
        retries: int = 3,
        longest_wait: float = 30.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a server, expected http://HOST:PORT")
        self.url = url
        self.timeout, self.retries, self.longest_wait = timeout, retries, longest_wait
        self._host, self._port, self._secure = parts.hostname, parts.port, parts.scheme == "https"
        self._prefix = parts.path.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._own = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this thread's connection; the next call opens another one."""
        connection = self._own.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def recommend(self, user_id: Id | None = None, k: int = 10, **fields: Any) -> Recommended:
        """The best k items.

        Args:
            fields: others of the body: `features`, `context`, `session`, `exclude_ids`, `exclude_seen`, `filter`,
                `shown`, `deadline_ms`, `explain`.

        Raises:
            RequestFailed: if there is no list.
        """
        said = self._call("POST", "/v1/recommend", {"user_id": user_id, "k": k, **fields})
        explained = said.get("explained")
        return _made(
            Recommended,
            {
                **said,
                "items": [_made(Item, item) for item in said["items"]],
                "explained": None if explained is None else [_made(Explained, item) for item in explained],
            },
        )

    def score(self, user_id: Id | None = None, item_ids: Sequence[Id] = (), **fields: Any) -> list[Item]:
        """Predictions for named items, in their order.

        Args:
            fields: others of the body: `features`, `context`.

        Raises:
            RequestFailed: if there are none.
        """
        said = self._call("POST", "/v1/score", {"user_id": user_id, "item_ids": list(item_ids), **fields})
        return [_made(Item, item) for item in said["items"]]

    def score_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[Item]:
        """Predictions for whole rows, in their order.

        Raises:
            RequestFailed: if there are none.
        """
        said = self._call("POST", "/v1/score", {"rows": [dict(row) for row in rows]})
        return [_made(Item, item) for item in said["items"]]

    def feedback(self, events: Iterable[Event]) -> list[Status]:
        """Send what happened, in batches; a status for each event. What was sent before an error is kept, and the same
        events may be sent again.

        Raises:
            RequestFailed: if a batch was not taken.
        """
        return self._batches("/v1/feedback", "events", [asdict(event) for event in events], EVENTS_AT_ONCE)

    def forget(self, user_id: Id) -> dict[str, Any]:
        """Delete what the server has of a user; says what it deleted and what is left to be done.

        Raises:
            RequestFailed: if it could not.
        """
        return self._call("DELETE", f"/v1/users/{_segment(user_id)}")

    def put_items(self, items: Iterable[Mapping[str, Any]]) -> list[Status]:
        """Add items, or replace them, in batches; a status for each. Each is an `item_id`, its `features`, and `bid`,
        `hidden` and `expires_at` where they are wanted.

        Raises:
            RequestFailed: if a batch was not taken.
        """
        return self._batches("/v1/items", "items", [dict(item) for item in items], ITEMS_AT_ONCE)

    def change_item(self, item_id: Id, **fields: Any) -> Status:
        """Change some of what is known of an item.

        Raises:
            RequestFailed: if it could not, such as for an item that is not there.
        """
        return _made(Status, self._call("PATCH", f"/v1/items/{_segment(item_id)}", fields))

    def remove_item(self, item_id: Id) -> Status:
        """Take an item out of what may be recommended.

        Raises:
            RequestFailed: if it could not, such as for an item that is not there.
        """
        return _made(Status, self._call("DELETE", f"/v1/items/{_segment(item_id)}"))

    def ready(self) -> bool:
        """Whether the server answers requests now."""
        try:
            return self._once("GET", "/readyz", None)[0] == 200
        except (OSError, http.client.HTTPException):
            self.close()
            return False

    def _batches(self, path: str, name: str, things: list[dict[str, Any]], at_once: int) -> list[Status]:
        return [
            _made(Status, status)
            for begin in range(0, len(things), at_once)
            for status in self._call("POST", path, {name: things[begin : begin + at_once]})[name]
        ]

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request, tried again where that may help.

        Raises:
            RequestFailed: if it was refused, or there is no answer.
        """
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
        pause = FIRST_PAUSE
        for left in range(self.retries, -1, -1):
            try:
                status, headers, said = self._once(method, path, content)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if not left or isinstance(error, TimeoutError | ssl.SSLCertVerificationError | socket.gaierror):
                    raise RequestFailed(None, f"{self.url}: {_reason(error)}") from None
                wait = pause
            else:
                if status < 300:
                    return _object(said, status, self.url)
                problem = _problem(status, headers, said)
                wait = pause if problem.retry_after is None else problem.retry_after
                if status not in _LATER or not left or wait > self.longest_wait:
                    raise problem
            time.sleep(wait)
            pause *= 2
        raise AssertionError("the last try returns or raises")

    def _once(self, method: str, path: str, content: bytes | None) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            connection = self._own.connection = kind(self._host, self._port, timeout=self.timeout)
        headers = {**self._headers, "Accept": "application/json"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, self._prefix + path, content, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def _segment(name: Id) -> str:
    """An id as a part of a path."""
    return quote(str(name), safe="")


def _made(kind: type[Result], values: Mapping[str, Any]) -> Result:
    """A result; what a later server says beside is left out."""
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in names})


def _object(said: bytes, status: int, url: str) -> dict[str, Any]:
    try:
        found = json.loads(said)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestFailed(status, f"{url}: the answer is no JSON object: is this a fullrank server?")
    return found


def _problem(status: int, headers: http.client.HTTPMessage, said: bytes) -> RequestFailed:
    try:
        found = json.loads(said)
        detail = str(found["detail"])
    except (ValueError, KeyError, TypeError):
        detail = http.client.responses.get(status, "refused")
    after = headers.get("Retry-After") or ""
    return RequestFailed(status, detail, headers.get("X-Request-Id"), float(after) if after.isdecimal() else None)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
