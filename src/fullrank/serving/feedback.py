"""What happened to what was shown: `/v1/feedback`, and people who want to be forgotten."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import fastapi
from fastapi import FastAPI, Response
from pydantic import Field

from fullrank.funnel.recent_events import Event
from fullrank.schema import Schema
from fullrank.serving.bodies import Id, Number, Scalar, Strict, answer, encoded
from fullrank.serving.errors import NoStore, refusals
from fullrank.serving.store import Feedback
from fullrank.serving.stores import UserEvents

# Seconds by which a sender's clock may be ahead.
SKEW = 300
# What a request to forget somebody leaves to be done.
PENDING = [
    "the bundle, until one that was trained without this user is served: import its log again with "
    "--forgotten STORE (data.source.forgotten in a recipe), this store, and train",
    "logs that were exported before, which imports with --forgotten STORE read without this user",
]
# What may be in a batch.
MOST_EVENTS = 1000


class FeedbackEvent(Strict):
    """Something that happened between a user and an item.

    Attributes:
        user_id: as in the log.
        item_id: as in the log.
        labels: what happened, by label of the schema: `{"click": 1}`. None at all is an impression.
        timestamp: seconds since 1970; default now.
        event_id: the sender's name for the event: one that comes again is acknowledged, and counted once.
        impression_id: the `request_id` of the answer that showed the item.
        features: raw values of context features at that time, and of the item if it is new, by column name.
    """

    user_id: Id
    item_id: Id
    labels: dict[str, Number] = Field(default_factory=dict, max_length=100)
    timestamp: int | None = Field(default=None, ge=0, le=2**40)
    event_id: str | None = Field(default=None, min_length=1, max_length=256)
    impression_id: str | None = Field(default=None, max_length=256)
    features: dict[str, Scalar] = Field(default_factory=dict, max_length=100)


class FeedbackRequest(Strict):
    """Events in any order; good ones are kept though others are wrong."""

    events: list[FeedbackEvent] = Field(min_length=1, max_length=MOST_EVENTS)


class EventStatus(Strict):
    """What became of an event: 201 kept, 200 known already, 422 refused, with the reason."""

    status: int
    detail: str | None = None


class FeedbackResponse(Strict):
    """One status for each event, in their order."""

    events: list[EventStatus]


class Forgotten(Strict):
    """What was deleted of a user, and what is left to be done.

    Attributes:
        events: that the user sent.
        impressions: lists that the user was shown.
        embeddings: of what the user did, by a foundation model.
        pending: in words.
    """

    events: int
    impressions: int
    embeddings: int
    pending: list[str]


def add_feedback(
    app: FastAPI,
    schema: Schema,
    store: UserEvents | None,
    told: Callable[[Sequence[Feedback]], None] | None = None,
    forget_embeddings: Callable[[int | str], int] = lambda _: 0,
) -> None:
    """Routes that write to the store; without one they say so.

    Args:
        told: of the events that were kept for the first time; it may wait for the disk.
        forget_embeddings: of a user who is to be forgotten; says how many there were.
    """
    labels = {label.name: label.kind == "binary" for label in schema.labels}

    def refused(event: FeedbackEvent, now: int) -> str | None:
        for name, value in event.labels.items():
            if name not in labels:
                return f'labels: there is no label "{name}"; there is {", ".join(labels)}'
            if labels[name] and not 0 <= value <= 1:
                return f"labels.{name} is {value:g}, expected 0 to 1"
        if event.timestamp is not None and event.timestamp > now + SKEW:
            return f"timestamp is {event.timestamp - now} s in the future, expected at most {SKEW}"
        for name, text in (("user_id", event.user_id), ("item_id", event.item_id), ("event_id", event.event_id)):
            if isinstance(text, str) and ("\0" in text or len(text) > 1000):
                return f"{name}: expected at most 1000 characters, none of them NUL"
        return None

    @app.post(
        "/v1/feedback",
        response_model=FeedbackResponse,
        tags=["users"],
        status_code=201,
        responses={
            207: {"model": FeedbackResponse, "description": "Some events were refused; the others are kept."},
            **refusals(400, 404, 408, 413, 415, 422, 500, 503),
        },
    )
    async def feedback(body: FeedbackRequest, asked: fastapi.Request) -> Response:
        """Keep events. Once this is answered they are on disk, and in the next answer for their user."""
        if store is None:
            raise NoStore
        now = int(time.time())
        results: list[dict[str, Any]] = []
        good: list[Feedback] = []
        for sent in body.events:
            detail = refused(sent, now)
            results.append({"status": 422, "detail": detail} if detail else {"status": 0, "detail": None})
            if detail is None:
                when = now if sent.timestamp is None else sent.timestamp
                event = Event(sent.item_id, when, sent.labels, sent.features)
                good.append(Feedback(sent.user_id, event, sent.event_id, sent.impression_id))
        asked.state.said = {"events": len(results)}
        kept: list[bool] = await asyncio.wrap_future(store.append(good)) if good else []
        if told is not None and any(kept):
            fresh = [event for event, is_new in zip(good, kept, strict=True) if is_new]
            await asyncio.get_running_loop().run_in_executor(None, told, fresh)
        new = iter(kept)
        for result in results:
            if not result["status"]:
                result["status"] = 201 if next(new) else 200
        return answer(encoded({"events": results}), 207 if len(good) < len(results) else 201)

    @app.delete(
        "/v1/users/{user_id}",
        response_model=Forgotten,
        tags=["users"],
        responses=refusals(404, 422, 500, 503),
    )
    async def forget(user_id: str) -> Response:
        """Delete what the store has of a user, for good, and leave the user out of later trainings."""
        if store is None:
            raise NoStore
        known = store

        def deleted() -> dict[str, int]:
            return {**known.forget(user_id)._asdict(), "embeddings": forget_embeddings(user_id)}

        counts = await asyncio.get_running_loop().run_in_executor(None, deleted)
        return answer(encoded({**counts, "pending": PENDING}))
