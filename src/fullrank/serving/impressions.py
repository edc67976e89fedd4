"""What the server showed, into the store: off the answering path, and never more than there is room for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from queue import Empty, Full, Queue
from typing import Any, NamedTuple

from fullrank.data.encoders import Encoders
from fullrank.funnel.decoded import Decoder
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.requests import Request
from fullrank.serving.instruments import Instruments
from fullrank.serving.store import Impression, ShownItem
from fullrank.serving.stores import UserEvents

log = logging.getLogger(__name__)

# Lists that may wait for the disk, and those that are written at once.
ROOM, TOGETHER = 4096, 256
# Seconds for which lists are gathered: many at once take far less of the processor than one after another.
GATHERING = 0.25
# Bundles that are served at the same time, as arms of an experiment are.
BUNDLES = 4


class AnsweredList(NamedTuple):
    """A list that was answered.

    Attributes:
        funnel: that made it.
        time: of the request, in seconds since 1970.
        items: ids with their propensities, from above.
    """

    funnel: Funnel
    version: str
    request: Request
    request_id: str
    time: int
    items: Sequence[tuple[int | str, float]]


class ImpressionLog:
    """Keeps lists in a store, with the features that the funnel judged by. An answer does not wait for it: where lists
    come faster than they can be written, those that find no room are dropped, and counted.

    Args:
        room: lists that may wait.
    """

    def __init__(self, store: UserEvents, instruments: Instruments, room: int = ROOM) -> None:
        self._store, self._instruments = store, instruments
        self._waiting: Queue[AnsweredList | None] = Queue(room)
        self._decoders = lru_cache(BUNDLES)(_decoders)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._thread.start()

    def add(self, answered: AnsweredList) -> None:
        """Keep a list soon, if there is room."""
        try:
            self._waiting.put_nowait(answered)
        except Full:
            self._instruments.impressions_dropped.inc()

    def close(self) -> None:
        """Write what was given."""
        self._closing.set()
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            taken = [self._waiting.get()]
            if taken[-1] is not None and self._waiting.qsize() < TOGETHER:
                self._closing.wait(GATHERING)
            while len(taken) < TOGETHER and taken[-1] is not None:
                try:
                    taken.append(self._waiting.get_nowait())
                except Empty:
                    break
            self._keep([answered for answered in taken if answered is not None])
            if taken[-1] is None:
                return

    def _keep(self, lists: Sequence[AnsweredList]) -> None:
        try:
            by_funnel: dict[int, list[AnsweredList]] = {}
            for answered in lists:
                by_funnel.setdefault(id(answered.funnel), []).append(answered)
            rows = [row for group in by_funnel.values() for row in self._rows(group)]
            new = self._store.append(rows).result() if rows else []
            self._instruments.impressions.inc(sum(new))
        except Exception as error:
            # A store that fails is no fault of ours, and may fail for long.
            log.error("%d lists could not be kept: %s", len(lists), error, exc_info=not isinstance(error, OSError))
            self._instruments.impressions_dropped.inc(len(lists))

    def _rows(self, lists: Sequence[AnsweredList]) -> list[Impression]:
        """Lists of one funnel, with raw features."""
        funnel = lists[0].funnel
        of_askers, of_items = self._decoders(funnel.encoders)
        askers = of_askers(funnel.encode([answered.request for answered in lists]))
        places = funnel.items.find([item for answered in lists for item, _ in answered.items])
        items = of_items(funnel.items.rows.take(places))
        if funnel.items.bid_I is not None:
            name = str(funnel.schema.keys.bid)
            items = [{**item, name: bid} for item, bid in zip(items, funnel.items.bid_I[places].tolist(), strict=True)]
        features = iter(items)
        return [
            Impression(
                answered.request_id,
                answered.request.user_id,
                answered.time,
                answered.version,
                _with_given(asker, answered.request.features),
                [ShownItem(item, propensity, next(features)) for item, propensity in answered.items],
            )
            for answered, asker in zip(lists, askers, strict=True)
        ]


def _decoders(encoders: Encoders) -> tuple[Decoder, Decoder]:
    """Of users and contexts, and of items."""
    return Decoder(encoders, {"user", "context"}), Decoder(encoders, {"item"})


def _with_given(decoded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was decoded, and what the request said in place of what the encoders do not have."""

    def is_lost(value: Any) -> bool:
        return value is None or (isinstance(value, list) and None in value)

    return {name: given[name] if is_lost(value) and name in given else value for name, value in decoded.items()}
