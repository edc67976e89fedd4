"""What all users do, in the counters of what is served."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice

from fullrank.funnel.catalogue import Catalogue
from fullrank.funnel.counters import Counters
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.recent_events import Event
from fullrank.funnel.scorer import Scorer
from fullrank.serving.stores import UserEvents

# Events that are added while requests wait.
TOGETHER = 64
# Seconds between two times that items get their counters are at least so many times what one takes.
REST = 10


class Following:
    """Follows a store of events, for one bundle after the other.

    Each process reads all events that are later than the bundle's log once, and then what comes.
    """

    def __init__(self, store: UserEvents) -> None:
        self._store = store
        self._items: Catalogue | None = None
        # Whether the counters of items are to be written, and when they may be.
        self._has_more, self._next = False, 0.0

    def __call__(self, content: Funnel | Scorer, now: float) -> None:
        """Bring the counters of a bundle up to what is known now.

        Raises:
            OSError: if the store cannot be read.
        """
        counters = content.counters if isinstance(content, Funnel) else None
        if counters is None:
            return
        self._read(counters, int(now))
        if self._items is not counters.items:
            self._next, self._has_more = 0.0, True
        if self._has_more and time.monotonic() >= self._next:
            begin = time.monotonic()
            counters.refresh()
            self._items, self._has_more = counters.items, False
            self._next = begin + REST * (time.monotonic() - begin)

    def _read(self, counters: Counters, now: int) -> None:
        totals, end = counters.totals, counters.state.end
        deletions, found = self._store.deletions(), None
        if totals.time is not None and totals.deletions == deletions:
            found = self._store.after(totals.number, end)
        if found is None:
            # All of them, beside what requests see.
            fresh = counters.anew()
            fresh.totals.deletions = deletions
            found = self._store.after(0, end)
            assert found is not None
            _add(fresh, *found)
            fresh.totals.advance(now)
            totals.become(fresh.totals)
            self._has_more = True
            return
        self._has_more |= _add(counters, *found)
        before = totals.time
        with totals.lock:
            self._has_more |= totals.advance(now)
        # Labels of the log itself come to be known.
        self._has_more |= before is not None and before < now and before <= counters.state.last_known


def _add(counters: Counters, last: int, events: Iterable[tuple[str, Event]]) -> bool:
    """Add events up to a number; whether there was one."""
    any_new, events = False, iter(events)
    while some := list(islice(events, TOGETHER)):
        any_new = True
        with counters.totals.lock:
            for user, event in some:
                counters.add(user, event)
            counters.totals.number = some[-1][1].number or 0
    with counters.totals.lock:
        counters.totals.number = last
    return any_new
