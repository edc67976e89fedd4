"""Histories of embeddings of those who ask, for the students among the rankers of what is served."""

# Shapes: B rows.

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import polars as pl
from torch import Tensor

from fullrank.data.times import LATEST_TIMESTAMP, seconds_of
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.requests import Request
from fullrank.funnel.scorer import Scorer
from fullrank.schema import Schema
from fullrank.serving.embedding_store import EmbeddingStore
from fullrank.transfer.embedding_log import DAY
from fullrank.transfer.histories import HistoryConfig, history_tensors
from fullrank.transfer.keys import key_of
from fullrank.transfer.lookup import NO_EVENT, SECOND
from fullrank.transfer.student import Student

log = logging.getLogger(__name__)

# What `degraded` calls the store.
EMBEDDINGS = "embeddings"
# A time before all events, in microseconds.
NEVER = -(2**62)


class StudentHistories:
    """Looks up what a student reads of a user, as training did: before the request, of the version and as far back as
    the bundle says.

    Args:
        store: of the codes; without one a student answers as for users without history.
        clock: seconds since 1970.
    """

    def __init__(self, store: EmbeddingStore | None, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock

    def check(self, content: Funnel | Scorer) -> None:
        """Raises:
        ValueError: if the store has not what a student of the bundle reads.
        """
        config = _config(content)
        if config is None:
            return
        if self._store is None:
            log.warning("a ranker reads histories of embeddings, and there are none: start with --embeddings")
            return
        if config.served is None:
            raise ValueError(
                "the bundle's student does not say which version of embeddings it reads: export it by "
                "`fullrank transfer train`, from a recipe with embeddings.fixed"
            )
        has, reads = (self._store.dim, self._store.bits), (config.dim, config.bits)
        if has != reads:
            raise ValueError(
                f"{self._store.path} has codes of dim {has[0]} in {has[1]} bits, and the bundle's student reads "
                f"dim {reads[0]} in {reads[1]}"
            )
        if config.served.version not in self._store.versions:
            known = ", ".join(sorted(self._store.versions)) or "none"
            raise ValueError(
                f"{self._store.path} has no embeddings of version {config.served.version}, which the bundle's student "
                f"reads; it has {known}"
            )

    def known(self, content: Funnel, requests: Sequence[Request]) -> tuple[list[Request], list[str]]:
        """The requests with their users' histories, as they are now; and `[EMBEDDINGS]` if they cannot be read."""
        config = _config(content)
        if config is None or self._store is None:
            return list(requests), []
        now = int(self._clock() * SECOND)
        try:
            found = self._columns(config, [(request.user_id, now, None) for request in requests])
        except OSError:
            return list(requests), [EMBEDDINGS]
        rows = range(len(requests))
        return [
            replace(requests[row], extra={name: column[row : row + 1] for name, column in found.items()})
            for row in rows
        ], []

    def of_rows(
        self, content: Scorer, rows: Sequence[Mapping[str, Any]], first: int = 1
    ) -> tuple[dict[str, Tensor], list[str]]:
        """What `Scorer.score` takes as `extra` for rows of the log: each user's history at the row's time, now if it
        says none, without the row's own event; and `[EMBEDDINGS]` if they cannot be read.

        Args:
            first: number of the first row, in errors.

        Raises:
            ValueError: if a row's time is none.
        """
        config, keys = _config(content), content.schema.keys
        if config is None or self._store is None:
            return {}, []
        now, asked = int(self._clock() * SECOND), []
        for number, row in enumerate(rows, first):
            user, said, event = (row.get(name or "") for name in (keys.user_id, keys.timestamp, keys.request_id))
            asked.append((user, now if said is None else _microseconds(said, content.schema, number), event))
        try:
            return self._columns(config, asked), []
        except OSError:
            return {}, [EMBEDDINGS]

    def forget(self, user: int | str) -> int:
        """Delete a user's embeddings, and keep none that come later; how many there were.

        Raises:
            OSError: if the store cannot be written.
        """
        if self._store is None:
            return 0
        keys = {key_of(user, "number"), key_of(user, "text")} - {None}
        return sum(self._store.forget(key) for key in keys if key is not None)

    def _columns(
        self, config: HistoryConfig, asked: Sequence[tuple[int | str | None, int, int | str | None]]
    ) -> dict[str, Tensor]:
        """Codes and ages of users at times in microseconds, without one event each."""
        assert self._store is not None and config.served is not None
        served = config.served
        keys, times, own = [], [], []
        for user, time_us, event in asked:
            key = None if user is None else key_of(user, served.users)
            excluded = None if event is None else key_of(event, served.events)
            keys.append(0 if key is None else key)
            times.append(NEVER if key is None else time_us)
            own.append(NO_EVENT if excluded is None else excluded)
        window = None if served.days is None else served.days * DAY
        found = self._store.lookup(keys, times, config.length, window, exclude_event_ids=own, fm_version=served.version)
        return history_tensors(found, config.length)


def _config(content: Funnel | Scorer) -> HistoryConfig | None:
    """Of the history that rankers read.

    Raises:
        ValueError: if they read different ones.
    """
    students = [ranker for ranker in content.rankers.values() if isinstance(ranker, Student)]
    configs = {each.config.history for each in students} - {None}
    reads = {(each.dim, each.bits, each.length, each.served) for each in configs if each is not None}
    if len(reads) > 1:
        raise ValueError("the bundle's students read different histories of embeddings, and a request carries one")
    return next(iter(configs), None)


def _microseconds(said: Any, schema: Schema, row: int) -> int:
    name = schema.keys.timestamp
    try:
        seconds = seconds_of(pl.Series([said], strict=False), schema.time_unit, schema.time_format, schema.missing)[0]
    except (ValueError, TypeError, pl.exceptions.PolarsError):
        seconds = None
    if seconds is None or abs(seconds) > LATEST_TIMESTAMP:
        raise ValueError(f'row {row}: column "{name}" is {said!r}, expected a time as the log has it')
    return int(seconds) * SECOND
