"""What a server makes of events is what an import makes of the longer log, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset
from fullrank.data.loader import batch_from_frame
from fullrank.data.splits import SplitSpec
from fullrank.funnel import Funnel, FunnelConfig, load_bundle, save_bundle, train_funnel
from fullrank.funnel.recent_events import Event
from fullrank.funnel.requests import Request
from fullrank.funnel.training import EarlyConfig, FinalConfig
from fullrank.retrieval import TwoTower
from fullrank.schema import Schema
from fullrank.serving.store import Feedback
from fullrank.serving.stores import opened_events
from fullrank.training import TrainerConfig

TRAINING = TrainerConfig(batch_size=64, epochs=1)
CONFIG = FunnelConfig(
    retrieval=TwoTower.Config(batch_size=64, epochs=1),
    early=EarlyConfig(training=TRAINING),
    final=FinalConfig(model={"name": "din", "hidden": [8], "embedding_dim": 4}, training=TRAINING),
)
# Clicks that become known after 40 s, and rows of any outcome, with the user's and the context's part in them.
SCHEMA = Schema.model_validate(
    {
        "features": [
            {"kind": "categorical", "name": "user", "role": "user"},
            {"kind": "categorical", "name": "country", "role": "user"},
            {"kind": "categorical", "name": "item", "role": "item"},
            {"kind": "categorical", "name": "brand", "role": "item"},
            {"kind": "categorical", "name": "device", "role": "context"},
            {
                "kind": "sequence",
                "name": "clicks",
                "of": ["item", "brand", "country"],
                "where": "click",
                "length": 3,
                "age": True,
            },
            {"kind": "sequence", "name": "shown", "of": ["brand", "device"], "length": 5, "age": True},
        ],
        "labels": [{"name": "click", "delay_seconds": 40}],
        "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
    }
)
END = 1000


def log() -> pl.DataFrame:
    """Users u10 and u11, and items 20 to 22, come after the training log's end."""
    rng, rows = np.random.default_rng(1), 900
    time = np.sort(rng.integers(0, 3 * END // 2, rows))
    user = np.where(time <= END, rng.integers(0, 10, rows), rng.integers(0, 12, rows))
    item = np.where(time <= END, rng.integers(0, 20, rows), rng.integers(0, 23, rows))
    return pl.DataFrame(
        {
            "user": [f"u{number}" for number in user],
            "country": user % 3,
            "item": item,
            "brand": item % 4,
            "device": rng.integers(0, 3, rows),
            "time": time,
            "click": rng.integers(0, 2, rows),
        }
    )


@pytest.fixture(scope="module")
def funnel(tmp_path_factory: pytest.TempPathFactory) -> Funnel:
    place = tmp_path_factory.mktemp("events") / "bundle"
    save_bundle(train_funnel(Dataset.from_frame(log().filter(pl.col("time") <= END), SCHEMA), CONFIG)[0], place)
    loaded = load_bundle(place)
    assert isinstance(loaded, Funnel)
    return loaded


@pytest.mark.parametrize("kept", ["in memory", "sqlite", "redis"])
def test_a_request_has_the_history_that_the_trainer_would_compute(
    funnel: Funnel, tmp_path: Path, kept: str, request: pytest.FixtureRequest
) -> None:
    frame = log()
    save_bundle(funnel, tmp_path / "bundle")
    whole = Dataset.from_frame(frame, like=tmp_path / "bundle", split=SplitSpec(kind="none"), path=tmp_path / "whole")
    encoded = whole.scan("train").collect()
    seen: dict[str, list[Event]] = {}
    for row in frame.filter(pl.col("time") > END).iter_rows(named=True):
        event = Event(row["item"], row["time"], {"click": row["click"]}, {key: row[key] for key in ("device", "brand")})
        seen.setdefault(row["user"], []).append(event)
    if kept != "in memory":
        store = opened_events(tmp_path if kept == "sqlite" else request.getfixturevalue("redis_url"))
        for user, events in seen.items():
            store.append([Feedback(user, event) for event in events]).result()
        seen = {user: store.recent(user) for user in seen}
        store.close()
    later = [place for place, time in enumerate(frame["time"]) if time > END]
    assert len(later) > 200
    compared = 0
    for place in later[::3]:
        row = frame.row(place, named=True)
        # What happens at the same time or later is known to the server too, and no business of this request.
        features: dict[str, Any] = {"country": row["country"], "device": row["device"]}
        served = funnel.encode([Request(row["user"], features, seen[row["user"]], row["time"])])
        trained = batch_from_frame(encoded[place], funnel.schema)
        for key in funnel.schema.jagged_keys:
            assert torch.equal(served.jagged(key)[0], trained.jagged(key)[0]), (key, row)
            compared += served.jagged(key)[0].numel()
        for key in funnel.schema.event_number_keys:
            assert torch.equal(served.events(key)[0], trained.events(key)[0]), (key, row)
    assert compared > 500


def test_what_a_request_gives_of_a_history_goes_before_what_is_known(funnel: Funnel) -> None:
    given = {"shown.brand": [1], "shown.device": [2], "shown.age": [5.0]}
    batch = funnel.encode([Request("u3", given, [Event(4, END + 5, {"click": 1})], END + 100)])
    assert batch.jagged("shown.brand")[0].numel() == 1
    assert batch.jagged("clicks.item")[0][-1] == funnel.encoders.vocabularies["item"].id_of("4")


def test_without_a_time_the_request_comes_just_after_the_last_event(funnel: Funnel) -> None:
    events = [Event(4, END + 5, {"click": 1}), Event(5, END + 90, {"click": 0})]
    assert torch.equal(
        funnel.encode([Request("u3", events=events)]).jagged_values,
        funnel.encode([Request("u3", events=events, time=END + 91)]).jagged_values,
    )


def test_a_history_of_the_log_takes_what_its_users_last_row_does_not_know(tmp_path: Path) -> None:
    """Which is what that row itself came to, and what is later; the log's last row is of somebody else."""
    history = {"kind": "sequence", "name": "past", "fields": [{"kind": "event_id", "name": "item", "table": "item"}]}
    schema = Schema.model_validate(
        {
            "features": [*(f.model_dump() for f in SCHEMA.categorical if f.name in ("user", "item")), history],
            "labels": [{"name": "click"}],
            "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
        }
    )
    frame = log().filter(pl.col("time") <= END)
    past: dict[str, list[int]] = {}
    column = []
    for user, item, click in frame.select("user", "item", "click").iter_rows():
        column.append(list(past.setdefault(user, [])))
        past[user] += [item] * click
    frame = frame.with_columns(pl.Series("past.item", column))
    save_bundle(train_funnel(Dataset.from_frame(frame, schema), CONFIG)[0], tmp_path / "bundle")
    funnel = load_bundle(tmp_path / "bundle")
    assert isinstance(funnel, Funnel)
    ids = funnel.encoders.vocabularies["item"].ids(pl.Series([str(item) for item in range(20)]))
    for user in ("u3", "u4"):
        rows = frame.filter((pl.col("user") == user) & (pl.col("click") == 1))
        assert frame.filter(pl.col("user") == user)["time"][-1] < END
        events = [Event(item, time, {"click": 1}) for item, time in rows.select("item", "time").iter_rows()]
        for more in ([], [Event(7, END + 5, {"click": 1})]):
            expected = ids[[*past[user], *(event.item_id for event in more)]][-50:].tolist()  # type: ignore[list-item]
            for time in (END + 60, None):
                batch = funnel.encode([Request(user, events=[*events, *more], time=time)])
                assert batch.jagged("past.item")[0].tolist() == expected, (user, more, time)
