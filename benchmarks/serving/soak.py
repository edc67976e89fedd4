"""A long day of `fullrank serve` in minutes: requests, feedback, items that come and go, new bundles, killed processes.

    python -m benchmarks.serving.soak [--minutes 30]

Two bundles, trained with different seeds on the same log, take turns under the path that is served. All the while

* four connections ask for lists, which have to be, value by value, what the bundle that they name answers without a
  server: of items that were not added since, in their order;
* an item with a bid above all others is added, has to lead a list a second after its 201 at the latest, is removed, and
  may be in no list that is asked for a second after that;
* feedback is sent with ids, and again with the same id where a connection broke; what was acknowledged has to be in the
  store once, at the end;
* a process that answers is killed (`kill -9`) every so often, and a new bundle takes over.

A request is `interrupted` if its connection broke: those that a killed process had in hand. Memory is the sum of PSS.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import sys
import threading
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from benchmarks.process_tree import descendants, proportional_mib
from benchmarks.serving.load import FULLRANK, free_port, running

K, OF_ORACLE = 10, 100
NEW_ITEM = 10_000_000


class Tally:
    """What happened, told by several threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.found: list[float] = []
        self.wrong: list[str] = []
        self.memory: list[tuple[float, float]] = []
        self.acknowledged: set[str] = set()

    def count(self, name: str, number: int = 1) -> None:
        with self.lock:
            self.counts[name] += number

    def mistake(self, text: str) -> None:
        with self.lock:
            self.wrong.append(text)
            print(f"wrong: {text}", file=sys.stderr, flush=True)


class Client:
    """A connection that is opened again where it broke."""

    def __init__(self, port: int, tally: Tally) -> None:
        self.port, self.tally = port, tally
        self.connection = HTTPConnection("127.0.0.1", port, timeout=30)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer, 0 where the connection broke."""
        headers = {"content-type": "application/json", "authorization": "Bearer soak"}
        try:
            self.connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = self.connection.getresponse()
            answer = json.loads(response.read() or b"null")
        except (OSError, HTTPException, ValueError):
            self.connection.close()
            self.tally.count("interrupted")
            return 0, None
        self.tally.count(f"status {response.status}")
        return response.status, answer


def prepare(work: Path, impressions: int) -> list[Path]:
    from fullrank.data.simulate import simulate_dataset
    from fullrank.funnel import FunnelConfig, save_bundle, train_funnel

    dataset = simulate_dataset(work / "data", impressions, 0, overwrite=True)
    bundles = []
    for seed in (0, 1):
        funnel, _ = train_funnel(dataset, FunnelConfig(seed=seed, sizes={"retrieve": 500, "keep": 100}))
        save_bundle(funnel, work / f"bundle-{seed}", overwrite=True)
        bundles.append(work / f"bundle-{seed}")
    return bundles


def oracle(bundles: list[Path]) -> tuple[list[Any], dict[str, dict[Any, list[tuple[Any, float]]]]]:
    """Users, and each bundle's list for each of them: users whose list does not hang on the last of the candidates, in
    whose place a new item may stand."""
    from fullrank.funnel import StageSizes, load_bundle
    from fullrank.funnel.requests import Request
    from fullrank.serving.versions import target_of

    lists: dict[str, dict[Any, list[tuple[Any, float]]]] = {}
    users: list[Any] = []
    for bundle in bundles:
        funnel = load_bundle(bundle)
        fewer = funnel.with_parts(sizes=StageSizes(retrieve=490, keep=90))
        own: dict[Any, list[tuple[Any, float]]] = {}
        for name in (funnel.users.ids if funnel.users is not None else [])[:2000]:
            found, less = (f.recommend([Request(user_id=name)], K)[0].items for f in (funnel, fewer))
            if found == less:
                own[name] = [(item.item_id, item.value) for item in found if item.value is not None]
        lists[target_of(bundle).version] = own
        users = [name for name in own if not users or name in users]
    return users[:OF_ORACLE], lists


def recommending(port: int, tally: Tally, users: list[Any], lists: Any, seed: int, until: float) -> None:
    client, draw = Client(port, tally), random.Random(seed)
    while time.monotonic() < until:
        user = draw.choice(users)
        status, answer = client.ask("POST", "/v1/recommend", {"user_id": user, "k": K})
        if status == 200:
            expected = lists.get(answer["model_version"])
            shown = [(item["item_id"], item["value"]) for item in answer["items"] if int(item["item_id"]) < NEW_ITEM]
            if expected is None:
                tally.mistake(f"version {answer['model_version']}")
            elif any(
                str(a) != str(b) or abs(v - w) > 1e-4 * abs(w)
                for (a, v), (b, w) in zip(shown, expected[user], strict=False)
            ):
                tally.mistake(f"list of user {user} by {answer['model_version']}: {shown} for {expected[user]}")
            elif answer["degraded"]:
                tally.count("degraded")
        elif status not in (0, 429):
            tally.mistake(f"recommend: {status} {answer}")
        time.sleep(0.01)


def churning(port: int, tally: Tally, users: list[Any], until: float) -> None:
    draw = random.Random(7)
    client = Client(port, tally)

    def leads(item: int) -> bool | None:
        client.connection.close()  # the next one may go to another process
        status, answer = client.ask("POST", "/v1/recommend", {"user_id": draw.choice(users), "k": K})
        return None if status != 200 else any(int(each["item_id"]) == item for each in answer["items"])

    for number in itertools.count(NEW_ITEM):
        if time.monotonic() > until:
            return
        body = {"items": [{"item_id": number, "features": {"category": "3", "price": 9.5}, "bid": 1000.0}]}
        if client.ask("POST", "/v1/items", body)[0] not in (200, 201):
            continue
        began = time.monotonic()
        while not leads(number):
            if time.monotonic() > began + 10:
                tally.mistake(f"item {number} was not found in 10 s")
                break
            time.sleep(0.02)
        tally.found.append(time.monotonic() - began)
        while client.ask("DELETE", f"/v1/items/{number}")[0] not in (200, 404):
            time.sleep(0.1)
        time.sleep(1.0)
        for _ in range(8):
            if leads(number):
                tally.mistake(f"item {number} was in a list a second after it was removed")
        tally.count("items that came and went")


def telling(port: int, tally: Tally, until: float) -> None:
    client = Client(port, tally)
    for number in itertools.count():
        if time.monotonic() > until:
            return
        name = f"event-{number}"
        event = {"user_id": f"soak-{number % 50}", "item_id": number % 500, "labels": {"click": 1}, "event_id": name}
        while time.monotonic() < until:
            status, answer = client.ask("POST", "/v1/feedback", {"events": [event]})
            if status in (200, 201):
                tally.acknowledged.add(name)
                break
            if status not in (0, 429):
                tally.mistake(f"feedback: {status} {answer}")
                break
        time.sleep(0.02)


def memory_mib(server: int) -> float:
    return sum(proportional_mib(pid) for pid in (server, *(each.pid for each in descendants(server))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kill-every", type=float, default=60.0)
    parser.add_argument("--swap-every", type=float, default=40.0)
    parser.add_argument("--impressions", type=int, default=100_000)
    parser.add_argument("--work", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args()

    from benchmarks.machine import write

    work: Path = arguments.work
    bundles = prepare(work, arguments.impressions)
    users, lists = oracle(bundles)
    print(f"{len(users)} users, versions {list(lists)}", file=sys.stderr)
    served, store, tally, port = work / "served", work / "store", Tally(), free_port()
    shutil.rmtree(served, ignore_errors=True)
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(bundles[0], served)
    command = [*FULLRANK, "serve", str(served), "--port", str(port), "--store", str(store), "--token", "soak"]
    command += ["--processes", str(arguments.processes)] if arguments.processes > 1 else []
    with running(command, port) as server:
        began = time.monotonic()
        until = began + 60 * arguments.minutes
        work_on = [
            *((recommending, (port, tally, users, lists, seed, until)) for seed in range(4)),
            (churning, (port, tally, users, until)),
            (telling, (port, tally, until)),
        ]
        threads = [threading.Thread(target=target, args=values) for target, values in work_on]
        for thread in threads:
            thread.start()
        admin, turn, next_kill = Client(port, tally), 0, began + arguments.kill_every
        next_swap = began + arguments.swap_every
        while (now := time.monotonic()) < until:
            tally.memory.append((now - began, memory_mib(server.pid)))
            if now > next_swap:
                turn, next_swap = 1 - turn, now + arguments.swap_every
                fresh = work / "fresh"
                shutil.rmtree(fresh, ignore_errors=True)
                shutil.copytree(bundles[turn], fresh)
                shutil.rmtree(work / "old", ignore_errors=True)
                served.rename(work / "old")
                fresh.rename(served)
                admin.connection.close()
                status, answer = admin.ask("POST", "/v1/admin/reload")
                tally.count(f"swap {answer['outcome']}" if status == 200 else f"swap {status}")
            if now > next_kill and arguments.processes > 1:
                next_kill = now + arguments.kill_every
                victims = [each.pid for each in descendants(server.pid) if each.parent == server.pid]
                if victims:
                    os.kill(random.Random(int(now)).choice(victims), signal.SIGKILL)
                    tally.count("killed")
            time.sleep(2)
        for thread in threads:
            thread.join()
    with contextlib.closing(sqlite3.connect(store / "events.sqlite")) as connection:
        kept = collections.Counter(name for (name,) in connection.execute("SELECT event_id FROM events"))
    level = [mib for when, mib in tally.memory if when > 60 * arguments.minutes * 0.2]
    half = len(level) // 2
    found = sorted(tally.found)
    result = {
        "minutes": arguments.minutes,
        "processes": arguments.processes,
        "counts": dict(sorted(tally.counts.items())),
        "wrong answers": len(tally.wrong),
        "feedback": {
            "acknowledged": len(tally.acknowledged),
            "lost": len(tally.acknowledged - kept.keys()),
            "twice": sum(number > 1 for number in kept.values()),
        },
        "item found, seconds": {
            "p50": statistics.median(found),
            "p99": found[int(0.99 * (len(found) - 1))],
            "most": found[-1],
        },
        "memory, MiB": {
            "first half": statistics.median(level[:half]),
            "second half": statistics.median(level[half:]),
            "most": max(level),
        },
    }
    print(json.dumps(result, indent=1))
    write("serving_soak", result)


if __name__ == "__main__":
    main()
