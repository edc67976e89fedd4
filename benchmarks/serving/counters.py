"""What counters that go on with events cost: for a request, for an event, and to bring all items up to date.

    python -m benchmarks.serving.counters

A log of 1,000,000 rows, 100,000 users and 100,000 or 1,000,000 items, with none, one or three counters: the rows of the
user, the user's and the item's click rate. A request is encoded for a known user who says nothing, and for one with 20
events in the store, while others' events go on moving the mean that rates are drawn towards. Processor time of one
thread, the least of five times.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from benchmarks.machine import table, write
from fullrank.data.dataset import Dataset
from fullrank.funnel.catalogue import Catalogue, all_rows, last_time, usual_context
from fullrank.funnel.counters import Counters, at_end
from fullrank.funnel.recent_events import Event
from fullrank.funnel.requests import Request, RequestEncoder
from fullrank.funnel.totals import CounterState
from fullrank.schema import Schema

ROWS, USERS, END, ASKED, ADDED = 1_000_000, 100_000, 100_000, 500, 20_000
COUNTERS = [
    {"kind": "numeric", "name": "rows", "of": ["user"], "statistic": "count"},
    {"kind": "numeric", "name": "liking", "of": ["user"], "statistic": "rate", "label": "click"},
    {"kind": "numeric", "name": "liked", "of": ["item"], "statistic": "rate", "label": "click"},
]
LEARNT: dict[str, Any] = {
    "labels": [{"name": "click"}],
    "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
}


def log(items: int) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "user": rng.integers(0, USERS, ROWS),
            "item": rng.permutation(np.arange(ROWS) % items),
            "time": np.sort(rng.integers(0, END + 1, ROWS)),
            "click": rng.integers(0, 2, ROWS),
        }
    )


def least(work: Callable[[], Any], times: int = 5) -> float:
    """Seconds of processor time."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def measured(items: int, count: int) -> dict[str, Any]:
    ids = [{"kind": "categorical", "name": name, "role": name} for name in ("user", "item")]
    history = {"kind": "sequence", "name": "clicks", "of": ["item"], "where": "click", "length": 20, "age": True}
    schema = Schema.model_validate({"features": [*ids, history, *COUNTERS[:count]], **LEARNT})
    dataset = Dataset.from_frame(log(items), schema, split="none")
    until, state = last_time(dataset), None
    assert until is not None
    if dataset.tallies is not None:
        state = CounterState.read(dataset.tallies, dataset.schema, until)
    sides: tuple[Literal["user", "item"], ...] = ("user", "item")
    frames = {role: all_rows(dataset, role) for role in sides}
    if state is not None:
        frames = {role: at_end(frame, role, state, dataset.encoders) for role, frame in frames.items()}
    users, catalogue = (Catalogue.of(frames[role], dataset.schema) for role in sides)
    counters = None if state is None else Counters(dataset.encoders, state, users, catalogue)
    encode = RequestEncoder(dataset.encoders, users, usual_context(dataset), catalogue, until, counters)
    rng, clock = np.random.default_rng(1), itertools.count(until + 1)
    found: dict[str, Any] = {"items": items, "counters": count}
    if counters is not None:
        counters.totals.advance(until + 1)
        some = [
            (str(user), Event(str(item), until + 1 + place, {"click": 1.0}))
            for place, (user, item) in enumerate(rng.integers(0, (USERS, items), (ADDED, 2)).tolist())
        ]
        began = time.process_time()
        for user, event in some:
            counters.add(user, event)
            counters.totals.advance(event.time)
        found["event_us"] = 1e6 * (time.process_time() - began) / ADDED
        counters.refresh()
        found["items_s"] = least(counters.refresh)
        clock = itertools.count(until + ADDED + 10)
    asked = [str(user) for user in rng.integers(0, USERS, ASKED)]
    known = [Event(str(item), until + 1 + item, {"click": 1.0}, {}, 1) for item in range(20)]

    def ask(events: list[Event]) -> None:
        for user in asked:
            now = next(clock)
            if counters is not None:
                # What others do moves the mean.
                counters.totals.add(0, 0, now - 1, 1.0)
                counters.totals.advance(now)
                counters.totals.number = 1
            encode([Request(user, events=events, time=now if events else None)])

    def others() -> None:
        for _ in asked:
            now = next(clock)
            if counters is not None:
                counters.totals.add(0, 0, now - 1, 1.0)
                counters.totals.advance(now)

    between = least(others)
    found["silent_us"] = 1e6 * (least(lambda: ask([])) - between) / ASKED
    found["active_us"] = 1e6 * (least(lambda: ask(known)) - between) / ASKED
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rows = [measured(items, count) for items, count in ((100_000, 0), (100_000, 1), (100_000, 3), (1_000_000, 3))]
    table(rows, ["items", "counters", "silent_us", "active_us", "event_us", "items_s"])
    write("serving_counters", {"rows": ROWS, "users": USERS, "seed": 0, "results": rows})


if __name__ == "__main__":
    main()
