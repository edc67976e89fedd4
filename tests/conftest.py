"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run, and no deadline: a busy machine is no failure.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with samples of public logs: `FULLRANK_DATA`, else `shared/data` beside the repository."""
    place = Path(os.environ.get("FULLRANK_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not place.is_dir():
        pytest.skip(f"no public data in {place}; set FULLRANK_DATA")
    return place


class RedisProcess:
    """A Redis on a port of this machine, which keeps what it acknowledges in a directory, and may be killed."""

    def __init__(self, place: Path) -> None:
        self.place = place
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        from redis import Redis, RedisError

        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.place), "--save", ""]
        options += ["--appendonly", "yes", "--appendfsync", "always"]
        self._process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                Redis.from_url(self.url).ping()
                return
            except RedisError:
                assert self._process.poll() is None and time.monotonic() < deadline, "Redis does not start"
                time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def start_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], RedisProcess]]:
    """Starts a Redis, which ends with the session."""
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None:
        pytest.skip("Redis is not installed (Debian package redis-server)")
    started: list[RedisProcess] = []

    def start() -> RedisProcess:
        started.append(RedisProcess(tmp_path_factory.mktemp("redis")))
        return started[-1]

    yield start
    for process in started:
        process.send(signal.SIGCONT)
        process.kill()


@pytest.fixture(scope="session")
def _one_redis(start_redis: Callable[[], RedisProcess]) -> RedisProcess:
    return start_redis()


@pytest.fixture
def redis_url(_one_redis: RedisProcess) -> str:
    """An empty Redis that tests share."""
    from redis import Redis

    Redis.from_url(_one_redis.url).flushall()
    return _one_redis.url
