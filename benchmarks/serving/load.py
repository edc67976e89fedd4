"""Servers as processes, and requests to them from another one."""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

FULLRANK = [sys.executable, "-c", "from fullrank.cli.main import main; main()"]


class Asker:
    """A connection that is kept, which sends a request when the answer to the last has come.

    Args:
        bento: the service's arguments are named, and it takes a batch.
    """

    def __init__(self, port: int, k: int = 10, bento: bool = False) -> None:
        self.port, self.k, self.bento = port, k, bento
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, user: int) -> int:
        """The status of the answer."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        question: dict[str, Any] = {"user_id": user, "k": self.k}
        body = json.dumps({"questions": [question]} if self.bento else question).encode()
        writer.write(
            b"POST /v1/recommend HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        if b"\r\nconnection: close" in head:
            self.close()
        return int(head[9:12])

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


async def closed(make: Callable[[], Asker], users: int, seconds: float, connections: int) -> dict[str, Any]:
    """Every connection asks again when its answer has come."""
    draw = random.Random(connections)

    async def one(until: float, latencies: list[float], failures: list[int]) -> None:
        asker = make()
        while (began := time.perf_counter()) < until:
            status = await asker.ask(draw.randrange(users))
            latencies.append(time.perf_counter() - began)
            if status != 200:
                failures.append(status)
        asker.close()

    failures: list[int] = []
    warm_until = time.perf_counter() + min(1.0, seconds)
    await asyncio.gather(*(one(warm_until, [], failures) for _ in range(connections)))
    latencies: list[float] = []
    began = time.perf_counter()
    await asyncio.gather(*(one(began + seconds, latencies, failures) for _ in range(connections)))
    rate = len(latencies) / (time.perf_counter() - began)
    return {"requests": len(latencies), "failures": len(failures), **_cuts(latencies), "per_second": rate}


async def opened(make: Callable[[], Asker], users: int, seconds: float, rate: float, most: int) -> dict[str, Any]:
    """Requests come at a rate, whatever becomes of those before, over at most so many connections."""
    draw = random.Random(0)
    free = [make() for _ in range(most)]
    statuses: collections.Counter[str] = collections.Counter()
    latencies: list[float] = []

    async def one(asker: Asker) -> None:
        began = time.perf_counter()
        try:
            status = str(await asker.ask(draw.randrange(users)))
        except (OSError, asyncio.IncompleteReadError):
            status = "no answer"
            asker.close()
        statuses[status] += 1
        if status == "200":
            latencies.append(time.perf_counter() - began)
        free.append(asker)

    began, sent = time.perf_counter(), 0
    running = set()
    while (now := time.perf_counter() - began) < seconds:
        while sent < now * rate:
            sent += 1
            if not free:
                statuses["no connection free"] += 1
                continue
            task = asyncio.create_task(one(free.pop()))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.sleep(0.001)
    await asyncio.gather(*running)
    return {"rate": rate, "sent": sent, "statuses": dict(statuses), **_cuts(latencies)}


def _cuts(latencies: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(latencies, n=1000) if len(latencies) > 1 else [float("nan")] * 999
    return {"p50_ms": 1e3 * cuts[499], "p99_ms": 1e3 * cuts[989]}


def ask(port: int, *options: str) -> dict[str, Any]:
    """Load from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serving.load", "--port", str(port), *options]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


@contextlib.contextmanager
def running(
    command: list[str], port: int, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server process, ready to answer; ended when the block ends."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{' '.join(command)} did not start") from None
                time.sleep(0.2)
        yield server
    finally:
        server.terminate()
        server.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Ask, and print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--rate", type=float, help="requests per second, whatever the answers")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--bento", action="store_true")
    arguments = parser.parse_args()

    def make() -> Asker:
        return Asker(arguments.port, arguments.k, arguments.bento)

    if arguments.rate is None:
        work = closed(make, arguments.users, arguments.seconds, arguments.connections)
    else:
        work = opened(make, arguments.users, arguments.seconds, arguments.rate, arguments.connections)
    print(json.dumps(asyncio.run(work)))


if __name__ == "__main__":
    main()
