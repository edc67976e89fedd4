"""What is served now, and how it changes while requests are answered."""

from __future__ import annotations

import heapq
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple

from fullrank.funnel.funnel import Funnel
from fullrank.funnel.item_changes import ChangedItems, ItemEncoder, ItemState
from fullrank.funnel.scorer import Scorer
from fullrank.serving.following import Following
from fullrank.serving.stores import ItemStates, UserEvents
from fullrank.training.deltas import Position
from fullrank.training.memory import return_freed_memory

log = logging.getLogger(__name__)

# Seconds between two looks at what other processes wrote, and at most between two changes of the catalogue.
LOOK, PAUSE = 0.2, 0.1


class Served(NamedTuple):
    """What one request is answered from.

    Attributes:
        content: the funnel or ranker.
        version: of the bundle.
        changes: states of items that were applied since it was opened.
    """

    content: Funnel | Scorer
    version: str
    changes: int


class Gate:
    """Readers at the same time, or one writer alone, for whom new readers wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers, self._writing = 0, False

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)
            self._writing = True
            self._changed.wait_for(lambda: not self._readers)
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


class Live:
    """A bundle, the changes of its items and what users do, which a thread of its own applies.

    Changes that come together are applied together. They make a new funnel beside the one that is served; then requests
    begin to see it. Only where a retriever changes in place do requests wait for it.

    Args:
        content: a bundle.
        version: of it.
        store: of the states of items.
        clock: seconds since 1970.
        told: of the number of the last state that requests see, whenever it changes.
        check: raises a ValueError for what cannot be served here; then what is served stays.
        events: of users, which counters go on with; None leaves them as they are.
    """

    def __init__(
        self,
        content: Funnel | Scorer,
        version: str,
        store: ItemStates,
        clock: Callable[[], float] = time.time,
        told: Callable[[int], None] | None = None,
        check: Callable[[Funnel | Scorer], None] = lambda _: None,
        events: UserEvents | None = None,
    ) -> None:
        self.store, self._told, self._check = store, told, check
        self._follow = None if events is None else Following(events)
        self._clock = clock
        self._gate = Gate()
        self._wake = threading.Condition()
        self._stopped = False
        self._waiting: list[tuple[int, Future[None]]] = []
        # One thread changes what is served at a time.
        self._changing = threading.Lock()
        self._served: Served
        self._serve(content, version)
        self._thread = threading.Thread(target=self._run, name="items", daemon=True)
        self._thread.start()

    @property
    def served(self) -> Served:
        """What is served now, to look at; requests take it by `reading`."""
        return self._served

    @property
    def encoder(self) -> ItemEncoder | None:
        """Of raw items; None of a single ranker."""
        return None if self._changed is None else self._changed.encoder

    @contextmanager
    def reading(self) -> Iterator[Served]:
        """What a request is answered from; it stays as it is until the end."""
        with self._gate.reading():
            yield self._served

    def applied(self, number: int) -> Future[None]:
        """Done once requests see the states up to a number."""
        future: Future[None] = Future()
        with self._wake:
            if self._stopped or number <= self._number:
                future.set_result(None)
            else:
                self._waiting.append((number, future))
                self._wake.notify_all()
        return future

    def replace(self, content: Funnel | Scorer, version: str) -> None:
        """Serve another bundle, with all changes of items applied, from the next request on."""
        self._serve(content, version)

    def update(
        self, newer: Callable[[Funnel | Scorer], tuple[Funnel | Scorer, Position]], version: str
    ) -> tuple[Funnel | Scorer, Position]:
        """Serve what `newer` makes of what is served, from the next request on; what it raises changes nothing.

        It may have other models, not another catalogue: changes of items wait until it is there.
        """
        with self._changing:
            content, position = newer(self._served.content)
            self._check(content)
            if self._changed is not None and isinstance(content, Funnel):
                self._changed.funnel = content
            self._served = Served(content, version, self._served.changes)
        return content, position

    def stop(self) -> None:
        """Apply nothing more."""
        with self._wake:
            self._stopped = True
            for _, future in self._waiting:
                future.set_result(None)
            self._wake.notify_all()
        self._thread.join()

    def _serve(self, content: Funnel | Scorer, version: str) -> None:
        self._check(content)
        with self._changing:
            changed = ChangedItems(content) if isinstance(content, Funnel) else None
            number, states = self.store.since(0)
            served = Served(content, version, 0)
            if changed is not None and states:
                change = changed.prepare(_encodable(changed, states), self._clock())
                changed.funnel = change.apply()
                served = Served(changed.funnel, version, len(states))
            if self._follow is not None:
                self._follow(served.content, self._clock())
            expiring: list[tuple[float, str]] = []
            _add_expiring(expiring, states, self._clock())
            self._changed, self._served = changed, served
            self._number, self._expiring = number, expiring
            if self._told is not None:
                self._told(number)

    def _run(self) -> None:
        while True:
            with self._wake:
                expires = self._expiring[0][0] - self._clock() if self._expiring else math.inf
                if not self._waiting and not self._stopped:
                    self._wake.wait(max(0.0, min(LOOK, expires)))
                if self._stopped:
                    return
            begin = time.monotonic()
            try:
                applied = self._apply()
                self._count()
            except OSError:
                # The store has failed, and said so.
                with self._wake:
                    self._wake.wait_for(lambda: self._stopped, LOOK)
                continue
            if applied:
                with self._wake:
                    # In a large catalogue a change takes a while; then others get the processor as long.
                    self._wake.wait_for(lambda: self._stopped, min(PAUSE, time.monotonic() - begin))

    def _count(self) -> None:
        """Let the counters go on with what users did."""
        if self._follow is None:
            return
        try:
            with self._changing:
                self._follow(self._served.content, self._clock())
        except OSError:
            raise
        except Exception:
            log.exception("counters could not be brought up to date")

    def _apply(self) -> bool:
        """Apply what came and what expired; whether there was something."""
        with self._changing:
            number, states = self.store.since(self._number)
            now = self._clock()
            _add_expiring(self._expiring, states, now)
            due: set[str] = set()
            while self._expiring and self._expiring[0][0] <= now:
                due.add(heapq.heappop(self._expiring)[1])
            if due:
                states = {**self.store.of(due), **states}
            fault: Exception | None = None
            try:
                if self._changed is not None and states:
                    self._apply_states(self._changed, states, now)
            except Exception as error:
                log.exception("changes of items could not be applied")
                fault = error
            if self._told is not None and number != self._number:
                self._told(number)
            with self._wake:
                self._number = number
                done = [future for wanted, future in self._waiting if wanted <= number]
                self._waiting = [(wanted, future) for wanted, future in self._waiting if wanted > number]
            for future in done:
                if fault is None:
                    future.set_result(None)
                else:
                    future.set_exception(fault)
        return bool(states)

    def _apply_states(self, changed: ChangedItems, states: dict[str, ItemState], now: float) -> None:
        change = changed.prepare(_encodable(changed, states), now)
        version, changes = self._served.version, self._served.changes + len(states)
        if change.in_place:
            with self._gate.writing():
                changed.funnel = change.apply()
                self._served = Served(changed.funnel, version, changes)
        else:
            changed.funnel = change.apply()
            self._served = Served(changed.funnel, version, changes)
        return_freed_memory()


def _add_expiring(expiring: list[tuple[float, str]], states: dict[str, ItemState], now: float) -> None:
    for name, state in states.items():
        if state.expires_at is not None and state.expires_at > now and not state.removed:
            heapq.heappush(expiring, (state.expires_at, name))


def _encodable(changed: ChangedItems, states: dict[str, ItemState]) -> dict[str, ItemState]:
    """Without those that this bundle cannot have, as after a change of its schema."""
    faults = changed.encoder.faults(states)
    for name, fault in faults.items():
        log.warning("item %s is left as the bundle has it: %s", name, fault)
    return {name: state for name, state in states.items() if name not in faults}
