"""Facts about the process that `fullrank serve` starts, and about a disk that is full."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.data.importing import import_dataset
from fullrank.funnel import Scorer, load_bundle, save_bundle
from fullrank.models import MODELS
from fullrank.schema import Categorical, Label, Schema

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "30000"}
COMMAND = [sys.executable, "-c", "from fullrank.cli.main import main; main()"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, rng = tmp_path_factory.mktemp("log"), np.random.default_rng(0)
    pl.DataFrame({"label": rng.integers(0, 2, 300), "C1": rng.integers(0, 9, 300)}).write_csv(place / "log.csv")
    schema = Schema(features=(Categorical(name="C1"),), labels=(Label(name="label"),))
    dataset = import_dataset("csv", place / "log.csv", place / "data", schema=schema)
    torch.manual_seed(0)
    save_bundle(Scorer(dataset.encoders, MODELS["fm"].from_config(dataset.schema)), place / "model")
    return place / "model"


@contextmanager
def served(
    bundle: Path, *options: str, cwd: Path | None = None, files: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it answers; it may open so many files."""

    def limited() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [*COMMAND, "serve", str(bundle), "--port", "0", "--json", *options]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)["url"]
    finally:
        process.kill()
        process.communicate()


def score(url: str, rows: int) -> int:
    """Status of one request."""
    body = json.dumps({"rows": [{"C1": row % 9} for row in range(rows)]}).encode()
    request = urllib.request.Request(f"{url}/v1/score", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert len(json.load(answer)["items"]) == rows
        return int(answer.status)


def test_it_says_where_it_answers_and_ends_in_peace(bundle: Path) -> None:
    with served(bundle) as (process, url):
        with urllib.request.urlopen(f"{url}/readyz", timeout=30) as answer:
            assert answer.status == 200
        assert score(url, 3) == 200
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGTERM)
        assert out == "" and "Traceback" not in error


def test_requests_that_were_accepted_are_answered_after_a_signal_to_stop(bundle: Path) -> None:
    answers: list[object] = []

    def ask(url: str) -> None:
        try:
            for _ in range(200):
                answers.append(score(url, 2000))
        except urllib.error.URLError as error:  # nobody listens any more
            assert isinstance(error.reason, ConnectionRefusedError), error

    with served(bundle) as (process, url):
        threads = [threading.Thread(target=ask, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(answers) < 8:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        for thread in threads:
            thread.join(60)
        assert set(answers) == {200}


def test_a_ranker_of_ones_own_is_served_after_its_module_was_imported(tmp_path: Path) -> None:
    (tmp_path / "rankers_of_mine.py").write_text(
        "from fullrank.models import register\n"
        "from fullrank.models.fm import FM\n"
        "@register\n"
        "class Mine(FM):\n"
        "    name = 'mine'\n"
    )
    save = """
from pathlib import Path
from fullrank.data.importing import import_dataset
from fullrank.funnel import Scorer, load_bundle, save_bundle
from fullrank.schema import Categorical, Label, Schema
from rankers_of_mine import Mine

Path("log.csv").write_text("label,C1\\n" + "1,a\\n0,b\\n" * 100)
schema = Schema(features=(Categorical(name="C1"),), labels=(Label(name="label"),))
dataset = import_dataset("csv", Path("log.csv"), Path("data"), schema=schema)
save_bundle(Scorer(dataset.encoders, Mine.from_config(dataset.schema)), Path("model"))
"""
    subprocess.run([sys.executable, "-c", save], env=ENVIRONMENT, cwd=tmp_path, check=True, timeout=120)
    command = [*COMMAND, "serve", "model", "--port", "0"]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=120)
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1 and "rankers_of_mine" in ran.stderr
    # The installed command does not have the current directory in its path; `python -c` has.
    program = "import sys; sys.path.remove(''); from fullrank.cli.main import main; main()"
    command = [sys.executable, "-c", program, "models", "mine", "--import", "rankers_of_mine", "--json"]
    listed = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, check=True, timeout=120)
    assert json.loads(listed.stdout)["name"] == "mine"
    with served(tmp_path / "model", "--import", "rankers_of_mine", cwd=tmp_path) as (_, url):
        assert score(url, 3) == 200


def test_a_port_in_use_is_one_line_before_the_bundle_is_read(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        # The bundle does not exist: what is refused first is the port.
        command = [*COMMAND, "serve", str(tmp_path / "none"), "--port", port]
        ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr == f"fullrank: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


def test_an_address_that_is_not_ours_is_one_line(tmp_path: Path) -> None:
    command = [*COMMAND, "serve", str(tmp_path / "none"), "--host", "no.such.host.invalid", "--port", "0"]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.startswith("fullrank: cannot listen on no.such.host.invalid port 0: ")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """A limit on the size of a file stands for the disk: the system refuses to write on in the same way."""

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "world"
    command = [*COMMAND, "data", "simulate", str(out), "--impressions", "20000"]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, preexec_fn=small_disk)
    assert ran.returncode == 2, ran.stderr
    assert len(ran.stderr.splitlines()) == 1 and "File too large" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_clients_that_never_finish_cost_a_few_seconds_and_nobody_else(bundle: Path) -> None:
    """Half a head, half a body, and an answer that nobody waits for; then a signal to stop."""
    with served(bundle) as (process, url):
        host, port = url.removeprefix("http://").split(":")

        def connected(sent: bytes) -> socket.socket:
            connection = socket.create_connection((host, int(port)), 30)
            connection.sendall(sent)
            return connection

        head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        heads, bodies = [connected(head) for _ in range(5)], [connected(head + b"99\r\n\r\n{") for _ in range(5)]
        body = json.dumps({"rows": [{}] * 10_000}).encode()
        for _ in range(40):
            connected(head + f"{len(body)}\r\n\r\n".encode() + body).close()
        assert score(url, 3) == 200
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        for connection in heads + bodies:
            with connection:
                said = connection.recv(4096)
                assert not said or said.startswith((b"HTTP/1.1 408", b"HTTP/1.1 503"))


def test_more_connections_than_files_leave_no_trace(bundle: Path) -> None:
    with served(bundle, files=80) as (process, url):
        host, port = url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port)), 30) for _ in range(150)]
        # Those for which there is no room are told so.
        assert idle[-1].recv(4096).startswith(b"HTTP/1.1 503")
        for connection in idle:
            connection.close()
        # It takes a moment until the server knows that they left.
        end, status = time.monotonic() + 60, 0
        while status != 200 and time.monotonic() < end:
            with suppress(urllib.error.HTTPError):
                status = score(url, 3)
        assert status == 200
        process.terminate()
        assert process.communicate(timeout=60) == ("", "")


def test_a_signal_has_it_look_for_another_bundle(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(bundle, place)

    def versions(url: str) -> list[str]:
        request = urllib.request.Request(f"{url}/metrics")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return [line for line in answer.read().decode().splitlines() if line.startswith("fullrank_model{")]

    with served(place) as (process, url):
        before = versions(url)
        scorer = load_bundle(place)
        save_bundle(scorer, place, about={"second": True}, overwrite=True)
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 30
        while versions(url) == before:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        assert len(versions(url)) == 1 and score(url, 3) == 200


def test_the_access_log_has_a_line_for_each_request(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    with served(bundle, "--access-log", str(log)) as (process, url):
        assert score(url, 3) == 200
        process.terminate()
        process.wait(60)
    (line,) = (json.loads(line) for line in log.read_text().splitlines())
    assert (line["route"], line["status"], line["rows"]) == ("/v1/score", 200, 3) and line["time"].endswith("+00:00")
    command = [*COMMAND, "serve", str(bundle), "--port", "0", "--access-log", str(tmp_path / "none" / "log")]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1 and "--access-log" in ran.stderr


def test_a_dry_run_says_what_would_be_served_and_takes_no_port(bundle: Path, tmp_path: Path) -> None:
    store, damaged = tmp_path / "store", tmp_path / "damaged"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        command = [*COMMAND, "serve", str(bundle), "--port", port, "--store", str(store), "--dry-run"]
        ran = subprocess.run([*command, "--json"], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["served"]["control"]["stages"] == [{"stage": "final", "kind": "fm", "candidates": None}]
    assert {"POST /v1/score", "GET /metrics"} <= set(said["routes"]) and not store.exists()
    assert said["peak_memory_bytes"] > 10**7
    command = [*COMMAND, "serve", str(bundle), "--dry-run", "--log-impressions", "--store", str(store)]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert ran.returncode == 2 and ran.stderr.startswith("fullrank: --log-impressions needs a funnel")
    shutil.copytree(bundle, damaged)
    (damaged / "schema.json").write_text("{}")
    command = [*COMMAND, "serve", str(damaged), "--dry-run"]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1 and "schema.json" in ran.stderr
