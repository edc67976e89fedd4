"""Facts about `fullrank demo`, `evaluate` and `serve`, run as a user would."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "30000"}
COMMAND = [sys.executable, "-c", "from fullrank.cli.main import main; main()"]


def fullrank(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    ran = fullrank("demo", "--impressions", "6000", "--seed", "5", "--out", str(out), "--json")
    assert ran.returncode == 0, ran.stderr
    return out, json.loads(ran.stdout)


def test_it_prints_one_object_with_the_promised_keys(demo: tuple[Path, dict[str, Any]]) -> None:
    out, summary = demo
    assert summary.keys() == {"seconds", "final", "retrieval", "bundle"}
    assert summary["final"].keys() == {"ne", "oracle_ne", "auc"}
    assert summary["retrieval"].keys() == {"recall_at_100"}
    assert summary["bundle"] == str(out / "bundle")
    assert summary["final"]["oracle_ne"] < summary["final"]["ne"] < 1
    assert 0.5 < summary["final"]["auc"] < 1


def test_it_leaves_a_report_that_needs_no_network(demo: tuple[Path, dict[str, Any]]) -> None:
    out, summary = demo
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{summary['final']['ne']:.4f}" in page
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)


def test_the_same_seed_gives_the_same_numbers(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    again = fullrank("demo", "--impressions", "6000", "--seed", "5", "--out", str(tmp_path / "again"), "--json")
    summary = json.loads(again.stdout)
    assert summary["final"] == demo[1]["final"] and summary["retrieval"] == demo[1]["retrieval"]


def untimed(report: dict[str, Any]) -> dict[str, Any]:
    for part in (*report["cascade"]["stages"].values(), report["cascade"]["total"]):
        assert part.pop("milliseconds")["p50"] > 0
    return report


def test_evaluate_repeats_what_the_demo_said(demo: tuple[Path, dict[str, Any]]) -> None:
    out, summary = demo
    ran = fullrank("evaluate", str(out / "bundle"), str(out / "data"), "--seed", "5", "--json")
    report = json.loads(ran.stdout)
    assert report["stages"]["final"]["click"]["ne"] == summary["final"]["ne"]
    assert report["recall"]["retrieval_at_100"] == summary["retrieval"]["recall_at_100"]
    assert untimed(report) == untimed(json.loads((out / "metrics.json").read_text()))
    table = fullrank("evaluate", str(out / "bundle"), str(out / "data"))
    assert table.returncode == 0
    assert f"{summary['final']['ne']:.4f}" in table.stdout


def test_a_demo_replaces_an_earlier_one_and_nothing_else(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = demo
    (tmp_path / "thesis.tex").write_text("x")
    refused = fullrank("demo", "--impressions", "6000", "--out", str(tmp_path))
    assert refused.returncode == 2
    assert "is not the directory of an earlier demo" in refused.stderr
    assert (tmp_path / "thesis.tex").read_text() == "x"
    assert fullrank("demo", "--impressions", "2000", "--out", str(out.parent / "second")).returncode == 0
    assert fullrank("demo", "--impressions", "2000", "--out", str(out.parent / "second")).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{out}/data", "{out}/data"], "is not a bundle"),
        (["evaluate", "{out}", "{out}/data"], "did you mean {out}/bundle?"),
        (["evaluate", "{out}/bundle", "{out}"], "is not a dataset"),
        (["evaluate", "{out}/bundle", "{out}/data", "--split", "tset"], 'no split "tset"'),
        (["serve", "{out}/nothing"], "is not a bundle"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    demo: tuple[Path, dict[str, Any]], arguments: list[str], message: str
) -> None:
    out = str(demo[0])
    ran = fullrank(*(argument.replace("{out}", out) for argument in arguments))
    assert ran.returncode == 2
    assert message.replace("{out}", out) in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_the_bundle_of_the_demo_is_served(demo: tuple[Path, dict[str, Any]]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*COMMAND, "serve", str(demo[0] / "bundle"), "--port", str(port)]
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        place = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{place}/readyz", timeout=5) as answer:
                    assert answer.status == 200
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        request = urllib.request.Request(
            f"{place}/v1/recommend", b'{"user_id": 1, "k": 3}', {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            items = json.load(answer)["items"]
        assert len(items) == 3
        values = [item["value"] for item in items]
        assert values == sorted(values, reverse=True)
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(20) in (0, 130, -signal.SIGINT)
