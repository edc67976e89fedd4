"""Age of the served model while 1,000 events a second arrive and are learnt.

    python -m benchmarks.serving.freshness

Events happen now: those of two seconds are a Parquet file, `fullrank stream --follow` learns them in windows of 60 s
and publishes a delta for every 10 s, and `fullrank serve` follows its pointer. Meanwhile a client asks `/v1/score`,
one request after another, and `/metrics` is read five times a second: how old is the last second that the served
model has learnt, and how long after each second began is a model served that has learnt all its events. The stream
and the server are processes of their own on one machine, each with one thread for its numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks import machine
from benchmarks.serving.load import FULLRANK

USERS, ITEMS, CATEGORIES = 100_000, 20_000, 50
WINDOW, DELTA, LATENESS, FILE = 60, 10, 1, 2
# What is promised.
PROMISED_SECONDS = 60
SCHEMA = {
    "features": [
        {"kind": "categorical", "name": "user", "role": "user", "encoding": "identity", "num_embeddings": USERS},
        {"kind": "categorical", "name": "item", "role": "item", "encoding": "identity", "num_embeddings": ITEMS},
        {
            "kind": "categorical",
            "name": "category",
            "role": "item",
            "encoding": "identity",
            "num_embeddings": CATEGORIES,
        },
        {"kind": "numeric", "name": "price", "role": "item"},
    ],
    "labels": [{"name": "click"}],
    "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
}


def recipe(work: Path) -> dict[str, Any]:
    source = {"format": "parquet", "path": str(work / "log"), "schema_file": str(work / "schema.json")}
    return {
        "data": {"dataset": str(work / "unused"), "source": source},
        "model": {"name": "deepfm", "embedding_dim": 16, "hidden": [64, 32]},
        "training": {"batch_size": 512, "learning_rate": 1e-3},
        "embedding": {"kind": "row_wise_adagrad", "learning_rate": 0.02},
        "stream": {"arrivals": True, "window": WINDOW, "delta": DELTA, "lateness": LATENESS, "extend": False},
        "threads": 1,
    }


class World:
    """Users who like some categories more than others, and items that wear off."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.taste = self.rng.normal(0, 1, (USERS // 100, CATEGORIES))
        self.category, self.price = self.rng.integers(0, CATEGORIES, ITEMS), self.rng.gamma(2.0, 2.0, ITEMS)

    def events(self, begin: int, seconds: int, rate: int) -> pl.DataFrame:
        count, rng = seconds * rate, self.rng
        user = rng.integers(0, USERS, count)
        item = np.minimum(rng.zipf(1.3, count) - 1, ITEMS - 1)
        logit = self.taste[user % len(self.taste), self.category[item]] - 2 - 0.1 * self.price[item]
        return pl.DataFrame(
            {
                "user": user,
                "item": item,
                "category": self.category[item],
                "price": self.price[item],
                "time": np.sort(begin + rng.integers(0, seconds, count)),
                "click": (rng.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int64),
            }
        )


def write_log(place: Path, rate: int, seed: int, stop: threading.Event, late: list[float]) -> None:
    """Files of what happened in the last seconds, whole once they are there."""
    world, at = World(seed), int(time.time())
    while not stop.is_set():
        frame = world.events(at, FILE, rate)
        at += FILE
        if stop.wait(max(0.0, at - time.time())):
            return
        hidden = place / f".{at}.parquet"
        frame.write_parquet(hidden)
        hidden.rename(place / f"{at}.parquet")
        late.append(time.time() - at)


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command of ours in a process of its own, ended as by Ctrl-C."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*FULLRANK, *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(url: str, stop: threading.Event, answers: Counter[str], seconds: list[float], versions: set[str]) -> None:
    """Ask for scores, one request after another, twenty a second at most."""
    rng = np.random.default_rng(7)
    while not stop.wait(0.05):
        rows = [
            {"user": int(rng.integers(USERS)), "item": int(item), "category": 3, "price": 1.0}
            for item in rng.integers(0, ITEMS, 20)
        ]
        request = urllib.request.Request(
            f"{url}/v1/score", json.dumps({"rows": rows}).encode(), {"content-type": "application/json"}
        )
        begin = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                said = json.load(answer)
            assert len(said["items"]) == len(rows)
            versions.add(said["model_version"])
            answers["200"] += 1
        except urllib.error.HTTPError as error:
            answers[str(error.code)] += 1
        except (OSError, AssertionError, ValueError) as error:
            answers[type(error).__name__] += 1
        seconds.append(time.perf_counter() - begin)


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def quantile(values: list[float], share: float) -> float:
    return float(np.quantile(values, share))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=240, help="that are measured")
    parser.add_argument("--rate", type=int, default=1000, help="events a second")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder), options.seconds, options.rate, options.seed)
    machine.table([result["table"]], list(result["table"]))
    print(f"answers {result['answers']}, swaps {result['swaps']}, versions answered by {result['versions']}")
    machine.write("freshness", result)


def measured(work: Path, seconds: int, rate: int, seed: int) -> dict[str, Any]:
    (work / "log").mkdir()
    (work / "schema.json").write_text(json.dumps(SCHEMA))
    # JSON is YAML too.
    (work / "recipe.yaml").write_text(json.dumps(recipe(work)))
    stop, late = threading.Event(), list[float]()
    answers, took, versions = Counter[str](), list[float](), set[str]()
    threads = [threading.Thread(target=write_log, args=(work / "log", rate, seed, stop, late))]
    threads[0].start()
    try:
        with running("stream", str(work / "recipe.yaml"), "--out", str(work / "stream"), "--follow") as stream:
            deadline = time.monotonic() + 4 * WINDOW
            while not (work / "stream" / "current.json").exists():
                if stream.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the stream has published nothing")
                time.sleep(0.5)
            with running("serve", str(work / "stream"), "--port", "0", "--json") as server:
                assert server.stdout is not None
                url = json.loads(server.stdout.readline())["url"]
                # The server has begun, and follows.
                time.sleep(2 * DELTA)
                threads.append(threading.Thread(target=ask, args=(url, stop, answers, took, versions)))
                threads[1].start()
                processes = {"stream": stream, "server": server}
                cpu = {name: cpu_seconds(process) for name, process in processes.items()}
                begin = time.time()
                ages, delays = watched(url, begin, seconds)
                wall = time.time() - begin
                cpu = {name: (cpu_seconds(process) - cpu[name]) / wall for name, process in processes.items()}
                stop.set()
                threads[1].join()
                swaps = metrics(url).get('fullrank_swaps_total{outcome="swapped"}', 0)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    table = {
        "events/s": rate,
        "age p50 s": statistics.median(ages),
        "age p99 s": quantile(ages, 0.99),
        "until reflected p50 s": statistics.median(delays),
        "until reflected p99 s": quantile(delays, 0.99),
        "requests": sum(answers.values()),
        "errors": sum(answers.values()) - answers["200"],
        "request p50 ms": 1000 * statistics.median(took),
        "request p99 ms": 1000 * quantile(took, 0.99),
    }
    return {
        "table": table,
        "met": table["age p99 s"] <= PROMISED_SECONDS and table["until reflected p99 s"] <= PROMISED_SECONDS,
        "seconds": round(wall),
        "seconds_reflected": len(delays),
        "window": WINDOW,
        "delta": DELTA,
        "lateness": LATENESS,
        "file_seconds": FILE,
        "file_late_p99_s": quantile(late, 0.99),
        "answers": dict(answers),
        "swaps": int(swaps),
        "versions": len(versions),
        "cpu_seconds_per_second": {name: round(used, 3) for name, used in cpu.items()},
        "seed": seed,
    }


def watched(url: str, begin: float, seconds: int) -> tuple[list[float], list[float]]:
    """Ages of the model, five a second, and for each second since the beginning how long after it began a model was
    served that had learnt it."""
    ages, delays, next_second = list[float](), list[float](), int(begin) + 1
    while (now := time.time()) < begin + seconds:
        age = metrics(url)["fullrank_model_age_seconds"]
        ages.append(age)
        while next_second + 1 <= round(time.time() - age, 1):
            delays.append(time.time() - next_second)
            next_second += 1
        time.sleep(max(0.0, now + 0.2 - time.time()))
    return ages, delays


if __name__ == "__main__":
    main()
