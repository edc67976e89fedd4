"""Facts about servers of several hosts that share a Redis: what is lost when it is killed, slow or gone."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient

from fullrank.data.forgotten import digest, forgotten_users
from fullrank.funnel import Funnel, save_bundle
from fullrank.funnel.item_changes import ItemState
from fullrank.funnel.recent_events import Event
from fullrank.serving import create_app
from fullrank.serving.log_export import export_log
from fullrank.serving.store import Feedback, Impression, ShownItem
from fullrank.serving.stores import opened_events

pytest.importorskip("redis")

from fullrank.serving.redis_item_store import RedisItemStore
from fullrank.serving.redis_server import READ_SECONDS, WRITE_SECONDS
from fullrank.serving.redis_store import RedisStore


def test_what_was_acknowledged_survives_a_kill_of_redis(start_redis: Callable[[], Any]) -> None:
    redis = start_redis()
    store = RedisStore(redis.url)
    for number in range(50):
        store.append([Feedback("u", Event(number, number, {}), str(number))]).result()
    redis.kill()
    with pytest.raises(OSError, match="failed"):
        store.append([Feedback("u", Event(50, 50, {}), "50")]).result()
    redis.start()
    time.sleep(1.1)
    assert [event.time for event in store.recent("u")] == [*range(50)]
    assert store.append([Feedback("u", Event(9, 9, {}), "9"), Feedback("u", Event(50, 50, {}), "50")]).result() == [
        False,
        True,
    ]


def test_nothing_is_lost_between_processes_that_write_at_once(redis_url: str) -> None:
    program = """
import sys
from fullrank.funnel.recent_events import Event
from fullrank.serving.redis_store import RedisStore
from fullrank.serving.log_export import export_log
from fullrank.serving.store import Feedback, Impression, ShownItem
from fullrank.serving.stores import opened_events

def written(store, own):
    # Half of the events have names that the other process has too.
    events = [Feedback(n % 7, Event(f"{own}{n}", n, {}), f"{own if n % 2 else ''}{n}") for n in range(400)]
    return sum(future.result()[0] for future in [store.append([event]) for event in events])

if __name__ == "__main__":
    store = RedisStore(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    print(written(store, "a"))
"""
    own: dict[str, Any] = {"__name__": "here"}
    exec(program, own)
    pipe = subprocess.PIPE
    other = subprocess.Popen([sys.executable, "-c", program, redis_url], stdin=pipe, stdout=pipe, text=True)
    store = RedisStore(redis_url)
    assert other.stdout is not None and other.stdout.readline() == "ready\n"
    assert other.stdin is not None and other.stdin.write("go\n") and other.stdin.flush() is None
    new = own["written"](store, "b") + int(other.communicate(timeout=60)[0])
    kept = [event.item_id for user in range(7) for event in store.recent(user)]
    assert new == len(kept) == len(set(kept)) == 600


def test_of_a_user_who_was_forgotten_redis_soon_knows_nothing(start_redis: Callable[[], Any]) -> None:
    redis, name = start_redis(), "somebody-with-a-name"
    store = RedisStore(redis.url)
    store.append([Feedback(name, Event(item, item, {}), f"{name}{item}") for item in range(200)]).result()
    store.append([Feedback("other", Event(1, 1, {}))]).result()

    def known() -> bool:
        return any(name.encode() in file.read_bytes() for file in redis.place.rglob("*") if file.is_file())

    assert known() and store.forget(name) == (200, 0) and store.recent(name) == []
    deadline = time.monotonic() + 10
    while known():
        assert time.monotonic() < deadline, "it stays in the append-only file"
        time.sleep(0.05)
    assert forgotten_users(redis.url) == {digest(name)} and store.forget(name) == (0, 0)
    assert store.append([Feedback(name, Event(1, 1, {}), f"{name}1")]).result() == [True]


def test_exports_are_those_of_a_directory(funnel: Funnel, redis_url: str, tmp_path: Path) -> None:
    save_bundle(funnel, tmp_path / "bundle")
    places: list[Path | str] = [tmp_path / "store", redis_url]
    stores = [opened_events(place) for place in places]

    def exported(name: str, **how: Any) -> list[Any]:
        found = []
        for number, place in enumerate(places):
            out = tmp_path / f"{name}{number}.parquet"
            after = None if name == "a" else tmp_path / f"a{number}.parquet"
            said = export_log(place, tmp_path / "bundle", out, after=after, window=50, **how)
            found.append((said, pl.read_parquet(out).sort("event_id").rows()))
        assert found[0] == found[1]
        return list(found[0][1])

    for begin in (1000, 2000):
        items = [ShownItem(item, 0.5, {"bid": 2.0}) for item in (3, "4")]
        users = [1, "a:b", None]
        lists = [Impression(f"{begin}{k}", users[k % 3], begin + k, "v", {"device": 2}, items) for k in range(9)]
        clicks = [Feedback(1, Event("4", begin + k, {"click": 1.0}), f"{begin + k}", f"{begin}{k}") for k in range(4)]
        clicks.append(Feedback("a:b", Event(7, begin, {"click": 1.0}, {"device": 1}), f"own {begin}"))
        news = [[store.append(lists).result(), store.append(clicks).result()] for store in stores]
        # Again: what has a name is known, a list by its request.
        again = [[store.append(lists).result(), store.append(clicks[-1:]).result()] for store in stores]
        assert news[0] == news[1] == [[True] * 9, [True] * 5] and again[0] == again[1] == [[False] * 9, [False]]
    assert len(exported("a", now=1000, wait=-100)) + len(exported("b", now=9000)) == 2 * 19
    assert {store.forget("a:b") for store in stores} == {(2, 6)}
    assert [store.append(lists[1:2]).result() for store in stores] == [[False], [False]]
    assert len(exported("c", now=9000, since=2000)) == 13


def test_without_redis_lists_go_on_and_say_so_and_feedback_waits_for_it(
    funnel: Funnel, start_redis: Callable[[], Any]
) -> None:
    redis = start_redis()
    body = {"user_id": "u", "k": 5}
    event = {"user_id": "u", "item_id": 7, "labels": {"click": 1}, "event_id": "e"}
    with TestClient(create_app(funnel, store=redis.url)) as client:
        fresh = client.post("/v1/recommend", json=body).json()
        assert client.post("/v1/feedback", json={"events": [event]}).status_code == 201
        known = client.post("/v1/recommend", json=body).json()
        values = [[item["value"] for item in said["items"]] for said in (fresh, known)]
        assert known["degraded"] == [] and values[0] != values[1]
        # It hangs, then it is gone: both cost no more than the time that is waited for it.
        for stop in (lambda: redis.send(signal.SIGSTOP), lambda: (redis.send(signal.SIGCONT), redis.kill())):
            stop()
            time.sleep(1.1)
            began = time.monotonic()
            said = client.post("/v1/recommend", json=body).json()
            assert time.monotonic() - began < READ_SECONDS + 0.5
            assert said["degraded"] == ["store"] and [item["value"] for item in said["items"]] == values[0]
            scored = client.post("/v1/score", json={"user_id": "u", "item_ids": [7]}).json()
            assert scored["degraded"] == ["store"]
            began = time.monotonic()
            refused = client.post("/v1/feedback", json={"events": [event | {"event_id": "f"}]})
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert time.monotonic() - began < WRITE_SECONDS + 0.5
        redis.start()
        time.sleep(1.1)
        assert client.post("/v1/recommend", json=body).json()["degraded"] == []
        again = client.post("/v1/feedback", json={"events": [event, event | {"event_id": "g"}]}).json()["events"]
        assert [status["status"] for status in again] == [200, 201]


def test_items_and_events_of_one_server_are_those_of_the_other(funnel: Funnel, redis_url: str) -> None:
    with TestClient(create_app(funnel, store=redis_url)) as one, TestClient(create_app(funnel, store=redis_url)) as two:
        assert one.post("/v1/items", json={"items": [{"item_id": 1000, "bid": 1e6}]}).status_code == 201
        one.post("/v1/feedback", json={"events": [{"user_id": "u", "item_id": 7, "labels": {"click": 1}}]})
        body = {"user_id": "u", "filter": {"any": {"item_id": [1000]}}}
        deadline = time.monotonic() + 5
        while not (found := two.post("/v1/recommend", json=body).json()["items"]):
            assert time.monotonic() < deadline
        # The value depends on the click.
        assert found == one.post("/v1/recommend", json=body).json()["items"]
        assert found != one.post("/v1/recommend", json={**body, "user_id": "v"}).json()["items"]
        assert two.patch("/v1/items/1000", json={"hidden": True}).status_code == 200
        assert two.delete("/v1/items/nothing").status_code == 404


def test_items_that_two_change_at_once_are_changed_one_after_the_other(redis_url: str) -> None:
    one, two = RedisItemStore(redis_url), RedisItemStore(redis_url)

    def raised(states: Any) -> dict[str, ItemState]:
        before = states["a"].bid if "a" in states else 0.0
        if before == 0.0 and not interrupted:
            interrupted.append(two.change(["a"], lambda _: {"a": ItemState(bid=5.0), "b": ItemState(bid=1.0)}))
        return {"a": ItemState(bid=before + 1)}

    interrupted: list[int] = []
    assert one.change(["a"], raised) == 3 and interrupted == [2]
    assert one.of(["a", "b", "c"]) == {"a": ItemState(bid=6.0), "b": ItemState(bid=1.0)}
    assert two.since(0) == (3, {"b": ItemState(bid=1.0), "a": ItemState(bid=6.0)})
    assert two.since(2) == (3, {"a": ItemState(bid=6.0)}) and two.since(3) == (3, {})


def test_a_redis_that_may_forget_is_warned_of(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    from redis import Redis

    with Redis.from_url(redis_url) as redis, caplog.at_level(logging.WARNING):
        opened_events(redis_url)
        assert not caplog.records
        redis.config_set("appendfsync", "everysec")
        redis.config_set("maxmemory-policy", "allkeys-lru")
        opened_events(redis_url)
        redis.config_set("appendfsync", "always")
        redis.config_set("maxmemory-policy", "noeviction")
    first, second = (record.getMessage() for record in caplog.records)
    assert "may lose what it acknowledged" in first and "drops events when it is full" in second


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://user:hidden@127.0.0.1:1/0", "redis://127.0.0.1:1/0 cannot be used as a store: "),
        ("redis://127.0.0.1:none", "redis://127.0.0.1:none cannot be used as a store: "),
        ("postgres://127.0.0.1/0", "expected a directory or redis://host:port/database"),
    ],
)
def test_what_is_no_redis_is_one_line_without_a_password(funnel: Funnel, url: str, text: str) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        create_app(funnel, store=url)
    assert text in str(caught.value) and "hidden" not in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ValueError, match=r"^--store redis:// needs redis: pip install 'fullrank\[redis\]'$"):
        RedisStore("redis://127.0.0.1:1/0")
