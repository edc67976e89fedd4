"""What a server showed becomes a log: it keeps its lists, joins feedback to them, and the log says what was earned."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import polars as pl
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from fullrank.cli.main import app
from fullrank.data.dataset import Dataset
from fullrank.data.forgotten import digest, forgotten_users
from fullrank.funnel import Funnel, Request, load_bundle, save_bundle
from fullrank.funnel.off_policy import evaluate_off_policy
from fullrank.funnel.recent_events import Event
from fullrank.funnel.slate import PolicySpec
from fullrank.serving import create_app
from fullrank.serving.impressions import AnsweredList, ImpressionLog
from fullrank.serving.instruments import Instruments
from fullrank.serving.log_export import export_log
from fullrank.serving.store import EventStore, Feedback, Impression, ShownItem
from fullrank.training.stream import stream

NOW = 1_700_000_000
Listening = Callable[[FastAPI], AbstractContextManager[str]]
KEPT = ["propensity", "slate", "slot"]


class Served(NamedTuple):
    """What a server did: its bundle, its store, and the answers to requests for lists."""

    bundle: Path
    store: Path
    answers: list[dict[str, Any]]


@pytest.fixture(scope="module")
def exploring(funnel: Funnel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = PolicySpec.of({"name": "epsilon", "epsilon": 0.3})
    place = tmp_path_factory.mktemp("bundle") / "bundle"
    save_bundle(funnel.with_slate(funnel.slate.model_copy(update={"policy": policy})), place)
    return place


@pytest.fixture(scope="module")
def served(exploring: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A server with 150 requests, of known users, strangers and nobody; every third list has a click."""
    store, chance, answers = tmp_path_factory.mktemp("store"), random.Random(0), []
    with TestClient(create_app(exploring, store=store, log_impressions=True)) as client:
        for number in range(150):
            user = [number % 60, f"stranger {number % 7}", None][number % 3]
            body = {"user_id": user, "k": 4, "context": {"device": number % 5}}  # the log has no device 4
            answers.append(client.post("/v1/recommend", json=body).json())
            if number % 3 < 2 and number % 2:
                item = chance.choice(answers[-1]["items"])["item_id"]
                click = {"user_id": user, "item_id": item, "labels": {"click": 1}}
                sent = {"events": [{**click, "impression_id": answers[-1]["request_id"]}]}
                assert client.post("/v1/feedback", json=sent).status_code == 201
        for odd in ({"explain": True}, {"experiment": "unheard of"}):
            client.post("/v1/recommend", json={"user_id": 1, "k": 4, **odd})
        assert client.get("/", params={"user": "1", "k": "4"}).status_code == 200
    return Served(exploring, store, answers)


def test_every_list_is_kept_once_as_it_was_answered(served: Served, tmp_path: Path) -> None:
    found = export_log(served.store, served.bundle, tmp_path / "log.parquet", wait=0, now=int(time.time()) + 1000)
    log = pl.read_parquet(tmp_path / "log.parquet")
    assert found.lists == 150 and found.rows == log.height == 600 and found.waiting == found.feedback == 0
    shown = {
        answer["request_id"]: [(str(item["item_id"]), item["propensity"]) for item in answer["items"]]
        for answer in served.answers
    }
    by_list = log.sort("slot").group_by("impression_id").agg(pl.struct("item_id", "propensity"))
    kept = {name: [(row["item_id"], row["propensity"]) for row in rows] for name, rows in by_list.iter_rows()}
    assert kept == shown
    devices = {answer["request_id"]: str(number % 5) for number, answer in enumerate(served.answers)}
    assert dict(log.select("impression_id", "device").unique().iter_rows()) == devices
    assert log["click"].sum() == found.labels["click"] == 50
    assert log["event_id"].n_unique() == 600 and log["slate"].n_unique() == 150
    assert set(log["model_version"]) == {served.answers[0]["model_version"]}


def test_the_logging_policy_earned_what_was_earned(served: Served, tmp_path: Path) -> None:
    """The funnel judges the imported lists by the features that it judged by, so that each weight is 1."""
    export_log(served.store, served.bundle, tmp_path / "log.parquet", wait=0, now=int(time.time()) + 1000)
    log, funnel = pl.read_parquet(tmp_path / "log.parquet"), load_bundle(served.bundle)
    dataset = Dataset.from_frame(log, like=served.bundle, split="none", keep=KEPT)
    same = evaluate_off_policy(funnel, dataset, "train", reward="click")
    mean = log["click"].sum() / 150
    assert same["logged"]["value"] == pytest.approx(mean)
    assert same["ips"]["value"] == pytest.approx(mean, rel=1e-5)
    assert same["largest_weight"] == pytest.approx(1, rel=1e-5) and same["slates"] == 150
    greedy = evaluate_off_policy(funnel, dataset, "train", reward="click", policy=PolicySpec.of("greedy"))
    assert greedy["ips"]["value"] >= 0 and greedy["largest_weight"] > 1


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    store = EventStore(tmp_path / "store")
    yield store
    store.close()


def shown(name: str, then: int, *items: int, user: int | None = 1) -> Impression:
    return Impression(name, user, then, "v", {"device": 2}, [ShownItem(item, 0.5, {"bid": 2.0}) for item in items])


def click(then: int, item: int, impression: str | None, name: str | None = None, user: int = 1) -> Feedback:
    return Feedback(user, Event(item, then, {"click": 1.0}, {"device": 1}), name, impression)


def exported(store: EventStore, like: Path, name: str, **how: Any) -> tuple[Any, list[tuple[Any, ...]]]:
    out = store.path.parent.parent / name
    found = export_log(store.path.parent, like, out, **how)
    rows = pl.read_parquet(out).select("event_id", "item_id", "click", "propensity", "timestamp")
    return found, rows.rows()


def test_labels_come_from_feedback_on_the_list_within_the_window(store: EventStore, exploring: Path) -> None:
    store.append([shown("a", NOW, 1, 2), shown("a", NOW + 5, 3)]).result()
    store.append([shown("b", NOW + 10, 1)]).result()
    late, in_time, twice = click(NOW + 101, 1, "a"), click(NOW + 100, 2, "a"), click(NOW + 50, 2, "a")
    store.append(
        [late, in_time, twice, click(NOW, 9, None, "own"), click(NOW + 1, 8, "b"), click(NOW, 7, "?")]
    ).result()
    found, rows = exported(store, exploring, "log.parquet", window=100, now=NOW + 500)
    assert sorted(rows, key=str) == [
        ("a/0", "1", 0.0, 0.5, NOW),
        ("a/1", "2", 1.0, 0.5, NOW),
        ("b/0", "1", 0.0, 0.5, NOW + 10),
        ("event/5", "8", 1.0, None, NOW + 1),  # the list has no such item
        ("event/6", "7", 1.0, None, NOW),
        ("own", "9", 1.0, None, NOW),
    ]
    assert [row[-1] for row in rows] == sorted(row[-1] for row in rows)
    assert (found.lists, found.feedback, found.outside, found.labels["click"]) == (2, 3, 1, 4)
    found, rows = exported(store, exploring, "only.parquet", window=100, now=NOW + 500, impressions_only=True)
    assert found.rows == len(rows) == 3 and found.feedback == 0


def test_exports_one_after_another_neither_repeat_nor_lose_rows(store: EventStore, exploring: Path) -> None:
    chance, before, rows = random.Random(1), None, []
    for step in range(8):
        now = NOW + 100 * step
        # Clocks of two processes, of which one is ahead, and feedback that comes late.
        lists = [shown(f"{step}-{k}", now + chance.randint(-30, 30), k, k + 50) for k in range(20)]
        events = [click(now - chance.randint(0, 200), 5, None, f"e{step}-{k}") for k in range(10)]
        events += [click(now + 40, k, f"{step - 1}-{k}") for k in range(0, 20, 2) if step]
        store.append(lists).result()
        store.append(events).result()
        _, new = exported(store, exploring, f"{step}.parquet", after=before, window=150, wait=150, now=now)
        before = store.path.parent.parent / f"{step}.parquet"
        rows += new
    found, new = exported(store, exploring, "last.parquet", after=before, window=150, now=NOW + 10_000)
    rows += new
    _, whole = exported(store, exploring, "whole.parquet", window=150, now=NOW + 10_000)
    assert found.waiting == 0 and len(rows) == len(whole) == 8 * (2 * 20 + 10)
    assert sorted(rows, key=str) == sorted(whole, key=str)


def test_the_command_exports_what_imports(store: EventStore, exploring: Path, tmp_path: Path) -> None:
    store.append([shown(f"{k}", NOW + k, 1, 2) for k in range(20)]).result()
    store.append([click(NOW + 9, 2, "3"), click(NOW, 1, None)]).result()
    log, data, like = str(tmp_path / "log.parquet"), str(tmp_path / "data"), ["--like", str(exploring)]
    words = ["data", "export", str(tmp_path / "store"), *like, "--out", log, "--impressions-only", "--json"]
    said = json.loads(CliRunner().invoke(app, [*words, "--since", str(NOW + 1), "--until", "2100-01-01"]).stdout)
    assert said["rows"] == 38 and said["labels"]["click"] == 1
    keep = [word for name in KEPT for word in ("--keep", name)]
    answer = CliRunner().invoke(app, ["data", "import", "parquet", log, data, *like, "--split", "none", *keep])
    assert answer.exit_code == 0, answer.output
    assert Dataset.open(Path(data)).scan("train").select("propensity").collect()["propensity"].to_list() == [0.5] * 38
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, ValueError) and "exists already" in str(again.exception)


def test_a_stream_goes_on_from_the_bundle_with_what_it_showed(
    store: EventStore, exploring: Path, tmp_path: Path
) -> None:
    log, before = tmp_path / "log", None
    log.mkdir()
    for name in "abc":
        begin = NOW + 5000 * "abc".index(name)
        lists = [shown(f"{name}{k}", begin + 50 * k, k % 9, 60 + k % 9, user=k % 4) for k in range(100)]
        clicks = [click(begin + 50 * k, k % 9, f"{name}{k}", user=k % 4) for k in range(0, 100, 3)]
        store.append(lists).result()
        store.append(clicks).result()
        export_log(store.path.parent, exploring, log / f"{name}.parquet", after=before, wait=0, now=begin + 5000)
        before = log / f"{name}.parquet"
    store.forget(3)
    training = {"batch_size": 256}
    final = {"model": {"name": "din", "hidden": [16], "embedding_dim": 8}, "training": training}
    recipe = {
        "data": {
            "dataset": str(tmp_path / "none"),
            "source": {"format": "parquet", "path": str(log), "forgotten": str(store.path.parent)},
        },
        "funnel": {"early": {"training": training}, "final": final, "sizes": {"retrieve": 50, "keep": 20}},
        "stream": {"arrivals": True, "window": 5000, "rollback": None},
    }
    report = stream(recipe, tmp_path / "out", start=exploring)
    assert [window["rows"] for window in report.windows] == [150, 150]
    assert report.counts["forgotten"] == 150 and report.counts["rows"] == 450
    assert report.pointer is not None
    fresh = load_bundle(tmp_path / "out" / report.pointer.bundle)
    assert isinstance(fresh, Funnel) and len(fresh.recommend([Request(1)], 5)[0].items) == 5


def test_times_choose_rows(store: EventStore, exploring: Path) -> None:
    store.append([shown(f"{k}", NOW + k, k) for k in range(10)]).result()
    _, rows = exported(store, exploring, "log.parquet", since=NOW + 3, until=NOW + 6, now=NOW + 10**6)
    assert [row[0] for row in rows] == ["3/0", "4/0", "5/0"]


def test_of_a_forgotten_user_nothing_is_exported_or_kept_any_more(store: EventStore, exploring: Path) -> None:
    store.append([shown("a", NOW, 1, user=1), shown("b", NOW, 1, user=2), shown("c", NOW, 1, user=None)]).result()
    store.append([click(NOW, 1, "a")]).result()
    assert store.forget(1) == (1, 1)
    # One that waited to be written, and an event of the user who came again.
    assert store.append([shown("d", NOW, 1, user=1)]).result() == [False]
    assert store.append([click(NOW, 1, None)]).result() == [True]
    found, rows = exported(store, exploring, "log.parquet", now=NOW + 10**6)
    assert [row[0] for row in rows] == ["b/0", "c/0"] and found.forgotten == 1
    assert forgotten_users(store.path.parent) == {digest(1)}


def test_what_nobody_waited_for_was_shown_to_nobody(
    exploring: Path, listening: Listening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, entered, release = Funnel.recommend, threading.Event(), threading.Event()

    def slow(self: Funnel, requests: Any, *rest: Any, **named: Any) -> Any:
        if requests[0].user_id == 7:
            entered.set()
            release.wait(20)
        return ask(self, requests, *rest, **named)

    monkeypatch.setattr(Funnel, "recommend", slow)
    app = create_app(exploring, store=tmp_path / "store", log_impressions=True)
    with listening(app) as url, httpx.Client(base_url=url) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/recommend", json={"user_id": 7}, timeout=0.5)
        assert entered.wait(10)
        deadline = time.monotonic() + 10
        while "fullrank_requests_in_flight 1.0" not in client.get("/metrics").text and time.monotonic() < deadline:
            time.sleep(0.05)  # the one that asks for it is in flight
        release.set()
        assert client.post("/v1/recommend", json={"user_id": 8}).status_code == 200
    found = export_log(tmp_path / "store", exploring, tmp_path / "log.parquet", wait=0, now=int(time.time()) + 1000)
    assert found.lists == 1 and set(pl.read_parquet(tmp_path / "log.parquet")["user_id"]) == {"8"}


def test_lists_without_room_are_dropped_and_counted(store: EventStore, funnel: Funnel) -> None:
    instruments = Instruments()
    log = ImpressionLog(store, instruments, room=1)
    answered = [AnsweredList(funnel, "v", Request(1), f"r{k}", NOW, [(1, 1.0)]) for k in range(200)]
    for each in answered:
        log.add(each)
    log.close()
    (kept,), (dropped,) = (
        instruments.totals(f"fullrank_impressions{name}_total").values() for name in ("", "_dropped")
    )
    assert kept + dropped == 200 and kept >= 1 and dropped >= 1


def test_what_cannot_be_exported_or_logged_is_one_line(funnel: Funnel, exploring: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no store of"):
        export_log(tmp_path, exploring, tmp_path / "out.parquet")
    EventStore(tmp_path / "store").close()
    with pytest.raises(ValueError, match="neither a bundle nor a dataset"):
        export_log(tmp_path / "store", tmp_path, tmp_path / "out.parquet")
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="does not say how far it goes"):
        export_log(tmp_path / "store", exploring, tmp_path / "out.parquet", after=tmp_path / "other.parquet")
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(ValueError, match="--log-impressions needs a store"):
        create_app(funnel, log_impressions=True)
