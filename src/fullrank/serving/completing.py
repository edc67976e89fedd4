"""What a request says, with what the server knows of its user."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fullrank.funnel.recent_events import Event
from fullrank.funnel.requests import Request, Shown
from fullrank.retrieval.filters import ItemFilter
from fullrank.serving.bodies import RecommendRequest, Seen
from fullrank.serving.stores import UserEvents

# What `exclude_seen` calls an event of any label.
IMPRESSION = "impression"
# What `degraded` calls the store.
STORE = "store"


class Completed(NamedTuple):
    """Attributes:
    request: as the funnel takes it.
    degraded: `[STORE]` if the store could not be asked; the bundle and the session are what is known then.
    """

    request: Request
    degraded: list[str]


def with_events(request: Request, store: UserEvents | None, session: Sequence[Event] = ()) -> Completed:
    """The request with what its user did since the bundle was made.

    In a log, a row knows what happened before its own second. A request comes in the second after the last event at the
    earliest, so that an event that was acknowledged counts in the next answer.
    """
    known, degraded = list[Event](), list[str]()
    if store is not None and request.user_id is not None:
        try:
            known = store.recent(request.user_id)
        except OSError:
            degraded = [STORE]
    events = [*known, *session]
    if not events:
        return Completed(request, degraded)
    last = max(event.time for event in events)
    return Completed(replace(request, events=events, time=max(int(time.time()), last + 1)), degraded)


def completed(body: RecommendRequest, store: UserEvents | None) -> Completed:
    """A request for a list, with what is known of who asks.

    Raises:
        ValueError: if the filter is none.
    """
    now = int(time.time())
    session = [Event(event.item_id, now - event.seconds_ago, event.labels) for event in body.session]
    request, degraded = with_events(body.request(), store, session)
    exclude: list[int | str] = list(body.exclude_ids)
    if body.exclude_seen is not None:
        exclude += _seen(request.events, body.exclude_seen, now)
    impressions = [event for event in request.events if not any(event.labels.values())]
    request = replace(
        request,
        shown=[
            *(Shown(item.item_id, item.seconds_ago) for item in body.shown),
            *(Shown(event.item_id, now - event.time) for event in impressions),
        ],
        exclude=exclude,
        filter=None if body.filter is None else ItemFilter.of(body.filter.model_dump()),
    )
    return Completed(request, degraded)


def _seen(events: Sequence[Event], seen: Seen, now: int) -> list[int | str]:
    items: dict[int | str, None] = {}
    for event in reversed(events):
        if seen.seconds is not None and event.time < now - seen.seconds:
            continue
        labels = {name for name, value in event.labels.items() if value == 1} | {IMPRESSION}
        if seen.types is None or labels & set(seen.types):
            items[event.item_id] = None
        if len(items) == seen.max:
            break
    return list(items)
