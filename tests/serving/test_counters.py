"""Counters and histories of what is served are those of an import of the longer log, whoever wrote the events."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fullrank.data.dataset import Dataset
from fullrank.data.splits import SplitSpec
from fullrank.funnel import Funnel, FunnelConfig, load_bundle, save_bundle, train_funnel
from fullrank.funnel.recent_events import Event
from fullrank.funnel.requests import Request
from fullrank.funnel.training import FinalConfig
from fullrank.retrieval import TwoTower
from fullrank.schema import Schema
from fullrank.serving import create_app
from fullrank.serving.completing import with_events
from fullrank.serving.item_store import ItemStore
from fullrank.serving.live import Live
from fullrank.serving.log_export import export_log
from fullrank.serving.store import Feedback
from fullrank.serving.stores import UserEvents, opened_events
from fullrank.training import TrainerConfig

CONFIG = FunnelConfig(
    retrieval=TwoTower.Config(batch_size=64, epochs=1),
    early=(),
    final=FinalConfig(
        model={"name": "din", "hidden": [8], "embedding_dim": 4}, training=TrainerConfig(batch_size=64, epochs=1)
    ),
)
SCHEMA = Schema.model_validate(
    {
        "features": [
            {"kind": "categorical", "name": "user", "role": "user"},
            {"kind": "categorical", "name": "item", "role": "item"},
            {"kind": "sequence", "name": "clicks", "of": ["item"], "where": "click", "length": 9, "age": True},
            {"kind": "numeric", "name": "rows", "of": ["user"], "statistic": "count", "encoding": "scalar"},
            {"kind": "numeric", "name": "liking", "of": ["user"], "statistic": "rate", "label": "click"},
            {"kind": "numeric", "name": "liked", "of": ["item"], "statistic": "rate", "label": "click"},
        ],
        "labels": [{"name": "click", "delay_seconds": 2}],
        "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
    }
)
END = int(time.time()) - 1000
Place = Callable[[], Path | str]


def log() -> pl.DataFrame:
    rng, rows = np.random.default_rng(0), 500
    return pl.DataFrame(
        {
            "user": [f"u{number}" for number in rng.integers(0, 12, rows)],
            "item": rng.integers(0, 20, rows),
            "time": np.sort(rng.integers(END - 5000, END + 1, rows)),
            "click": rng.integers(0, 2, rows),
        }
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served") / "bundle"
    save_bundle(train_funnel(Dataset.from_frame(log(), SCHEMA), CONFIG)[0], place)
    return place


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    found: Path | str = tmp_path / "store" if request.param == "sqlite" else request.getfixturevalue("redis_url")
    return found


def served(app: FastAPI) -> Funnel:
    funnel = app.state.arms["control"].served.content
    assert isinstance(funnel, Funnel)
    return funnel


def number(funnel: Funnel, name: str, store: UserEvents, user: str) -> float:
    """Of a user who asks."""
    batch = funnel.encode([with_events(Request(user), store).request])
    return float(batch.numeric_BN[0, funnel.schema.numeric_columns.index(name)])


def liked(funnel: Funnel, item: int) -> float:
    row = funnel.items.row(item)
    return float(funnel.items.rows.batch.numeric_BN[row, funnel.schema.numeric_columns.index("liked")])


def imported(frame: pl.DataFrame, like: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """A row at the end of a log, as an import has it."""
    whole = pl.concat([frame, pl.DataFrame([asked]).select(frame.columns)], how="vertical_relaxed")
    dataset = Dataset.from_frame(whole, like=like, split=SplitSpec(kind="none"))
    return dataset.scan("train").collect().tail(1).to_dicts()[0]


def until(is_so: Callable[[], bool], seconds: float = 2.0) -> bool:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.02)
    return is_so()


def test_counters_follow_what_all_processes_write(bundle: Path, place: Path | str) -> None:
    now = int(time.time())
    come = [("u3", 4, now - 200 + each % 7, each % 3 == 0) for each in range(40)] + [("new", 5, now - 90, 1)]
    rows = [{"user": user, "item": item, "time": at, "click": int(click)} for user, item, at, click in come]
    longer = pl.concat([log(), pl.DataFrame(rows)], how="vertical_relaxed")
    store = opened_events(place)
    with TestClient(create_app(bundle, store=place)) as one, TestClient(create_app(bundle, store=place)) as other:
        apps: list[Any] = [one.app, other.app]
        before = liked(served(apps[1]), 4)
        for client, part in ((one, rows[::2]), (other, rows[1::2])):
            events = [
                {
                    "user_id": row["user"],
                    "item_id": row["item"],
                    "labels": {"click": row["click"]},
                    "timestamp": row["time"],
                }
                for row in part
            ]
            assert client.post("/v1/feedback", json={"events": events}).status_code == 201
        for user in ("u3", "new"):
            trained = imported(longer, bundle, {"user": user, "item": 0, "time": now, "click": 0})
            for app in apps:
                assert number(served(app), "rows", store, user) == trained["rows"]
        for app in apps:
            for item in (4, 5, 6):
                trained = imported(longer, bundle, {"user": "u0", "item": item, "time": now, "click": 0})
                assert until(lambda app=app, item=item, trained=trained: liked(served(app), item) == trained["liked"])
            # Everybody's mean has come by now, and those who did nothing are drawn towards it.
            for user in ("u3", "new", "nobody"):
                trained = imported(longer, bundle, {"user": user, "item": 0, "time": now, "click": 0})
                assert number(served(app), "liking", store, user) == trained["liking"]
        assert liked(served(apps[1]), 4) != before
        assert one.post("/v1/recommend", json={"user_id": "u3", "k": 3}).status_code == 200

        # A deletion takes from the counters what the events had given.
        assert one.delete("/v1/users/u3").status_code == 200
        left = longer.filter((pl.col("user") != "u3") | (pl.col("time") <= END))
        trained = imported(left, bundle, {"user": "u3", "item": 4, "time": now, "click": 0})
        for app in apps:
            assert until(lambda app=app, trained=trained: liked(served(app), 4) == trained["liked"])
            assert number(served(app), "rows", store, "u3") == trained["rows"]
    store.close()


def test_more_events_of_a_user_than_a_request_looks_at_are_counted(bundle: Path, place: Path | str) -> None:
    store, now = opened_events(place), int(time.time())
    store.append([Feedback("u5", Event(4, now - 500, {"click": 0}))] * 1500).result()
    expected = log().filter(pl.col("user") == "u5").height + 1501
    with TestClient(create_app(bundle, store=place)) as client:
        client.post("/v1/feedback", json={"events": [{"user_id": "u5", "item_id": 1, "labels": {"click": 1}}]})
        app: Any = client.app
        assert number(served(app), "rows", store, "u5") == np.float32(np.log1p(expected))
    store.close()


def test_another_bundle_knows_all_events_from_its_first_request_on(bundle: Path, tmp_path: Path) -> None:
    store, now = opened_events(tmp_path / "store"), int(time.time())
    store.append([Feedback("u5", Event(4, now - 100, {"click": 1}))] * 30).result()
    one, other = load_bundle(bundle), load_bundle(bundle)
    assert isinstance(one, Funnel) and isinstance(other, Funnel)
    before = liked(one, 4)
    live = Live(one, "1", ItemStore(), events=store)
    assert liked(one, 4) != before == liked(other, 4)
    live.replace(other, "2")
    assert liked(other, 4) == liked(one, 4)
    live.stop()
    assert other.counters is not None and other.counters.totals.number == 30
    store.close()


def test_a_log_that_is_read_by_number_may_have_lost_its_beginning(redis_url: str) -> None:
    from redis import Redis

    store = opened_events(redis_url)
    store.append([Feedback("u", Event(1, at, {})) for at in range(5)]).result()
    found = store.after(0, 2)
    assert found is not None
    assert (found[0], sorted(event.time for _, event in found[1])) == (5, [3, 4])
    store.append([Feedback("v", Event(1, 9, {"click": 1}, {"device": 2}))]).result()
    found = store.after(5, 2)
    assert found is not None
    ((user, event),) = found[1]
    assert (found[0], user, event, event.number) == (6, "v", Event("1", 9, {"click": 1}, {"device": 2}), 6)
    Redis.from_url(redis_url).xtrim("fullrank:event_log", maxlen=1, approximate=False)
    assert store.after(3, 0) is None
    assert store.after(5, 0) is not None
    store.close()


def test_what_is_in_the_log_is_not_put_into_histories_and_counters_again(
    bundle: Path, place: Path | str, tmp_path: Path
) -> None:
    store, now = opened_events(place), int(time.time())
    events = [Event(item, now - 100 + item, {"click": item % 2}) for item in range(8)]
    store.append([Feedback("u3", event) for event in events]).result()
    export_log(store=place, like=bundle, out=tmp_path / "new.parquet", wait=0)
    new = pl.read_parquet(tmp_path / "new.parquet").select(
        pl.col("user"), pl.col("item", "time", "click").cast(pl.Int64)
    )
    assert new.height == len(events)
    dataset = Dataset.from_frame(pl.concat([log(), new], how="vertical_relaxed"), SCHEMA)
    save_bundle(train_funnel(dataset, CONFIG)[0], tmp_path / "next")
    funnel = load_bundle(tmp_path / "next")
    assert isinstance(funnel, Funnel)
    assert funnel.until == now - 93
    known = store.recent("u3")
    assert len(known) == len(events)
    ids = funnel.encoders.vocabularies["item"].ids(pl.Series([str(item) for item in range(10)])).tolist()
    alone, served = (funnel.encode([Request("u3", events=each, time=now)]) for each in ((), known))
    assert alone.jagged_values[-4:].tolist() == ids[1:8:2]
    for name in ("numeric_BN", "jagged_values", "event_values"):
        assert getattr(alone, name).tolist() == getattr(served, name).tolist()
    # The click on 7 is in the log, and known from its third second on.
    soon = funnel.encode([Request("u3", events=known, time=now - 91)])
    assert soon.jagged_values[-3:].tolist() == ids[1:7:2]
    later = funnel.encode([Request("u3", events=[*known, Event(9, now - 92, {"click": 1})], time=now)])
    assert later.jagged_values[-5:].tolist() == [*ids[1:8:2], ids[9]]
    old = funnel.with_parts(until=None, counters=None).encode([Request("u3", events=known, time=now)])
    assert old.jagged_values[-8:].tolist() == [*ids[1:8:2], *ids[1:8:2]]
    store.close()
