"""Facts about the store of events."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fullrank.data.forgotten import digest, forgotten_users
from fullrank.funnel.recent_events import Event
from fullrank.serving.store import EventStore, Feedback
from fullrank.serving.stores import UserEvents, opened_events

Open = Callable[[], UserEvents]


@pytest.fixture(params=["sqlite", "redis"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same store, again and again."""
    place = tmp_path if request.param == "sqlite" else request.getfixturevalue("redis_url")
    return lambda: opened_events(place)


def click(user: int | str, item: int | str, time: int, event_id: str | None = None) -> Feedback:
    return Feedback(user, Event(item, time, {"click": 1.0}, {"device": 2}), event_id, "i1")


def test_events_come_back_in_order_of_time_then_of_arrival(opened: Open) -> None:
    store = opened()
    assert (
        store.append([click(7, 1, 50), click(7, "b", 40), click("8", 3, 45), click("7", 4, 50)]).result() == [True] * 4
    )
    assert [(event.item_id, event.time) for event in store.recent(7)] == [("b", 40), ("1", 50), ("4", 50)]
    assert store.recent(7)[0] == Event("b", 40, {"click": 1.0}, {"device": 2})
    assert [event.item_id for event in store.recent(7, since=40)] == ["1", "4"]
    assert [event.item_id for event in store.recent("7", limit=2)] == ["1", "4"]
    assert store.recent("nobody") == []
    store.close()
    assert len(opened().recent(8)) == 1


def test_a_repeat_is_counted_once(opened: Open) -> None:
    store = opened()
    assert store.append([click(1, 1, 5, "a"), click(1, 1, 5, "a"), click(1, 1, 5)]).result() == [True, False, True]
    assert store.append([click(2, 9, 6, "a")]).result() == [False]
    assert len(store.recent(1)) == 2 and store.recent(2) == []


def test_of_a_user_who_was_forgotten_no_file_knows_anything(tmp_path: Path) -> None:
    store, name = EventStore(tmp_path), "somebody-with-a-name"
    store.append([click(name, item, item) for item in range(200)]).result()
    store.append([click("other", 1, 1)]).result()
    assert any(name.encode() in file.read_bytes() for file in tmp_path.iterdir())
    assert store.forget(name) == (200, 0) and store.recent(name) == []
    assert not any(name.encode() in file.read_bytes() for file in tmp_path.iterdir())
    assert forgotten_users(tmp_path) == {digest(name)}
    assert len(store.recent("other")) == 1
    assert store.forget(name) == (0, 0)


def test_many_threads_write_and_read_what_they_wrote(opened: Open) -> None:
    store = opened()
    wrong: list[int] = []

    def work(user: int) -> None:
        for time in range(20):
            store.append([click(user, time, time)]).result()
            if len(store.recent(user)) != time + 1:
                wrong.append(user)

    threads = [threading.Thread(target=work, args=(user,)) for user in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and [len(store.recent(user)) for user in range(8)] == [20] * 8


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from fullrank.data.forgotten import digest, forgotten_users
from fullrank.funnel.recent_events import Event
from fullrank.serving.store import EventStore, Feedback
store = EventStore(Path(sys.argv[1]))
for number in range(100_000):
    store.append([Feedback("u", Event(number, number, {}), str(number))]).result()
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 50:
        pass
    os.kill(process.pid, signal.SIGKILL)
    acknowledged = [*range(51), *map(int, process.stdout.read().split())]
    process.wait()
    kept = [event.time for event in EventStore(tmp_path).recent("u", limit=200_000)]
    assert kept[: len(acknowledged)] == acknowledged and len(kept) <= len(acknowledged) + 1


@pytest.mark.parametrize(
    "content", [b"not a database, though long enough to be one" * 40, b"SQLite format 3\0" + b"x" * 200]
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "events.sqlite").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be used as a store") as caught:
        EventStore(tmp_path)
    assert "\n" not in str(caught.value)
