"""Facts about the processes that `fullrank serve --processes` starts."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from fullrank.data.simulate import simulate_dataset
from fullrank.funnel import FunnelConfig, StageSizes, load_bundle, save_bundle, train_funnel
from fullrank.funnel.training import EarlyConfig, FinalConfig
from fullrank.training import TrainerConfig
from fullrank.training.deltas import position_of
from fullrank.training.publishing import Pointer, write_pointer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="--processes needs Linux")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "30000"}
COMMAND = [sys.executable, "-c", "from fullrank.cli.main import main; main()"]
TOKEN = {"Authorization": "Bearer secret"}
NAMES = map("request-{}".format, itertools.count())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    dataset = simulate_dataset(place / "data", 2000, 3, items=80, users=60)
    training = TrainerConfig(batch_size=256)
    final = FinalConfig(model={"name": "din", "hidden": [16], "embedding_dim": 8}, training=training)
    config = FunnelConfig(early=EarlyConfig(training=training), final=final, sizes=StageSizes(retrieve=80, keep=80))
    funnel = train_funnel(dataset, config)[0]
    save_bundle(funnel, place / "bundle")
    for name, times in (("one", 2), ("two", 3)):
        save_bundle(funnel.with_parts(value=f"{times} * click"), place / "stream" / name)
    point(place / "stream", 1, "one")
    return place / "bundle"


def point(stream: Path, number: int, name: str) -> None:
    base = position_of(stream / name).base
    write_pointer(stream, Pointer(number=number, bundle=name, base=base, deltas=(), until=5, reason="test"))


class Server:
    """A server that was started with two processes."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log

    def workers(self) -> set[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return set(map(int, children))

    def ask(self, path: str, body: Any = None, method: str | None = None, name: str = "") -> Any:
        """The answer to a request of that name."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "x-request-id": name, **TOKEN}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            read = answer.read().decode()
            return json.loads(read) if answer.headers["content-type"].startswith("application/json") else read

    def log_lines(self) -> list[dict[str, Any]]:
        text = self.log.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def answered_by(self, request_id: str) -> int:
        """The process that answered; its line is written once the answer was sent."""
        while True:
            for line in reversed(self.log_lines()):
                if line["request_id"] == request_id:
                    return int(line["process"])
            time.sleep(0.01)

    def by_each(self, body: dict[str, Any] | None, path: str = "/v1/recommend") -> dict[int, Any]:
        """An answer of each process."""
        found: dict[int, Any] = {}
        for _ in range(200):
            name = next(NAMES)
            answer = self.ask(path, body, name=name)
            found[self.answered_by(name)] = answer
            if self.workers() <= found.keys():
                break
        return {process: found[process] for process in self.workers()}

    def served(self) -> dict[str, tuple[str, list[Any]]]:
        """The version that all processes serve in each arm, and the items that somebody is answered there."""
        found: dict[str, tuple[str, list[Any]]] = {}
        for arm in ("control", "other"):
            answers = list(self.by_each({"user_id": 3, "k": 80, "experiment": arm}).values())
            said = [(each["model_version"], [(i["item_id"], i["value"]) for i in each["items"]]) for each in answers]
            assert len(said) == 2 and said[0] == said[1]
            found[arm] = said[0]
        return found

    def results(self) -> dict[str, Counter[str]]:
        """What came of each arm, which all processes say alike."""
        one, other = self.by_each(None, "/v1/experiment").values()
        assert one == other
        return {arm["arm"]: Counter({key: arm[key] for key in ("lists", "rewarded", "users")}) for arm in one["arms"]}


@contextmanager
def served(bundle: Path, log: Path, *options: str) -> Iterator[Server]:
    command = [*COMMAND, "serve", str(bundle), "--port", "0", "--json", "--processes", "2", "--token", "secret"]
    command += ["--access-log", str(log), "--workers", "1", *options]
    with (log.parent / "stderr").open("w") as errors:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (log.parent / "stderr").read_text()
            yield Server(process, json.loads(line)["url"], log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("served")
    options = ["--store", str(place / "store"), "--arm", f"other={bundle.parent / 'stream'}:0.4"]
    with served(bundle, place / "access.jsonl", *options) as server:
        yield server
    assert server.process.returncode == 0


def mapped(process: int) -> set[Path]:
    """Arrays of bundles, arms/ARM/arrays/BUNDLE/FILE."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {Path(line.split(maxsplit=5)[5]) for line in lines if "/arrays/" in line}


def until(there: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def test_both_answer_alike_and_count_together(server: Server) -> None:
    (_, items), (_, others) = server.served().values()
    assert sorted(item for item, _ in items) == sorted(item for item, _ in others) and items != others
    one, other = (mapped(process) for process in server.workers())
    assert one == other and len({path.parts[path.parts.index("arms") + 1] for path in one}) == 2
    asked = len(server.log_lines())
    for _ in range(3):
        counted = [line for line in server.ask("/metrics").splitlines() if line.startswith("fullrank_requests_total{")]
        assert sum(float(line.split()[-1]) for line in counted) >= asked


def test_what_comes_of_the_arms_is_counted_together(server: Server) -> None:
    """Whoever answered a list, and whoever is told of a click on it."""
    before, expected = server.results(), {arm: Counter[str]() for arm in ("control", "other")}
    pairs, user = set(), 99
    # Which process takes the next connection is for the system to say: until each was told of lists of each.
    while user < 139 or (len(pairs) < 4 and user < 999):
        user += 1
        answer = server.ask("/v1/recommend", {"user_id": user, "k": 1}, name=f"list-{user}")
        expected[answer["arm"]].update(lists=1, users=1)
        if user % 2:
            click = {"user_id": user, "item_id": 5, "labels": {"click": 1}, "impression_id": f"list-{user}"}
            # Those who answer take turns: so all of them are told of lists of all.
            for again in range(1 + user % 3):
                server.ask("/v1/feedback", {"events": [click]}, name=f"click-{user}-{again}")
            expected[answer["arm"]].update(rewarded=1)
            pairs.add((server.answered_by(f"list-{user}"), server.answered_by(f"click-{user}-0")))
    assert len(pairs) == 4
    after = server.results()
    assert {arm: after[arm] - before[arm] for arm in after} == expected
    counted = [line for line in server.ask("/metrics").splitlines() if line.startswith("fullrank_arm_rewarded_total{")]
    assert sum(float(line.split()[-1]) for line in counted) == sum(each["rewarded"] for each in expected.values()) >= 20


def test_an_arm_follows_its_stream_in_both(server: Server, bundle: Path) -> None:
    before = server.served()
    point(bundle.parent / "stream", 2, "two")
    wanted = position_of(bundle.parent / "stream" / "two").base[:12]
    until(lambda: {each["model_version"] for each in server.by_each({"experiment": "other"}).values()} == {wanted})
    after = server.served()
    assert after["other"] != before["other"] and after["control"] == before["control"]


def test_items_that_one_takes_are_found_by_both(server: Server) -> None:
    server.ask("/v1/items", {"items": [{"item_id": 1000, "features": {"category": "3"}, "bid": 1e5}]})
    # Once it is answered, though nobody asked the other one yet.
    assert all(1000 in dict(items) for _, items in server.served().values())


def test_one_that_is_killed_is_replaced_and_costs_nothing_but_what_it_was_doing(server: Server) -> None:
    stop, failures, kept = threading.Event(), [], []
    arms, results = server.served(), server.results()

    def ask(place: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            name = f"{place}-{number}"
            event = {"user_id": 1, "item_id": 5, "labels": {"click": 1}, "event_id": name}
            try:
                server.ask("/v1/feedback", {"events": [event]})
                kept.append(name)
            except (urllib.error.URLError, HTTPException, ConnectionError) as error:
                failures.append(error)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    try:
        before = server.workers()
        until(lambda: len(kept) > 20)
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        until(lambda: killed not in server.workers() and len(server.workers()) == 2)
        new = (server.workers() - before).pop()
        until(lambda: new in {line["process"] for line in server.log_lines()})
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    # At most what each of the four was waiting for.
    assert len(failures) <= 4
    again = server.ask("/v1/feedback", {"events": [
        {"user_id": 1, "item_id": 5, "labels": {"click": 1}, "event_id": name} for name in kept[:1000]
    ]})  # fmt: skip
    assert {event["status"] for event in again["events"]} == {200}
    assert "fullrank_processes_replaced_total 1.0" in server.ask("/metrics")
    # The new one serves what the others do in every arm, with the changes of items, and goes on counting.
    assert server.served() == arms and server.results() == results
    server.ask("/v1/recommend", {"user_id": 200})
    assert sum(each["users"] for each in server.results().values()) == 1 + sum(
        each["users"] for each in results.values()
    )


def test_a_new_bundle_and_a_rollback_reach_both(server: Server, bundle: Path) -> None:
    def versions(arm: str = "control") -> set[str]:
        return {each["model_version"] for each in server.by_each({"experiment": arm, "k": 1}).values()}

    # Whoever is asked, also who began after the swap.
    said = server.ask("/v1/admin/rollback?arm=other", method="POST")
    assert said["model_version"] == position_of(bundle.parent / "stream" / "one").base[:12]
    until(lambda: versions("other") == {said["model_version"]})
    (first,) = versions()
    save_bundle(load_bundle(bundle), bundle, about={"second": True}, overwrite=True)
    second = server.ask("/v1/admin/reload", method="POST")
    assert second["outcome"] == "swapped" and second["model_version"] != first
    until(lambda: versions() == {second["model_version"]})
    server.ask("/v1/admin/rollback", method="POST")
    until(lambda: versions() == {first})
    # A bundle that is damaged is refused by all.
    (bundle / "schema.json").write_text("{}")
    assert "schema.json" in server.ask("/v1/admin/reload", method="POST")["outcome"]
    assert versions() == {first} and versions("other") == {said["model_version"]}


def test_a_bundle_that_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    command = [*COMMAND, "serve", str(tmp_path / "none"), "--port", "0", "--processes", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1 and "is not a bundle" in ran.stderr


def test_what_both_are_doing_is_answered_after_a_signal_to_stop(server: Server) -> None:
    """The last test of this server."""
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(len(server.ask("/v1/score", {"user_id": 3, "item_ids": list(range(8000))})["items"]))

    def in_flight() -> float:
        lines = server.ask("/metrics").splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("fullrank_requests_in_flight "))

    workers, threads = server.workers(), [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    # With the one that asks for it.
    until(lambda: in_flight() + len(statuses) == 7)
    begun = len(statuses)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(30)
    for thread in threads:
        thread.join(60)
    assert begun < 6 and statuses == [8000] * 6
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
