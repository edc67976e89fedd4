"""Timing for the benchmarks of the randomised room: one thread, CPU seconds beside wall seconds, peers interleaved."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

from benchmarks.machine import RESULTS, machine, table, write
from benchmarks.randomized import THREADS

__all__ = ["THREADS", "Elsewhere", "interleaved", "merge", "seconds", "table"]


class Elsewhere(NamedTuple):
    """What a call that ran in another process returned and took there."""

    value: Any
    cpu_s: float
    wall_s: float


def seconds(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Value, CPU seconds and wall seconds of one call, as it says itself where it ran `Elsewhere`."""
    cpu, wall = time.process_time(), time.perf_counter()
    value = call()
    if isinstance(value, Elsewhere):
        return value
    return value, time.process_time() - cpu, time.perf_counter() - wall


def interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int, once: float = float("inf")
) -> dict[str, tuple[Any, float, float]]:
    """Last value, median CPU and median wall seconds of each call; round after round, so that all share the load. Calls
    that take more than `once` CPU seconds are made once."""
    values: dict[str, Any] = {}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if spent[name] and spent[name][0][0] > once:
                continue
            values[name], cpu, wall = seconds(call)
            spent[name].append((cpu, wall))
    return {name: (values[name], *map(statistics.median, zip(*spent[name], strict=True))) for name in calls}


def merge(
    name: str, settings: dict[str, Any], rows: list[dict[str, Any]], keys: list[str], packages: list[str]
) -> None:
    """Write rows into `results/randomized/<name>.json`; rows of earlier runs stay unless these have the same keys, and
    say so where they are of another machine."""
    path = RESULTS / "randomized" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {"results": []}
    kept, here = before["results"], machine()
    if (there := before.get("machine", here))["cpu"] != here["cpu"]:
        kept = [{"machine": f"{there['cpu']}, {there['date']}"} | row for row in kept]
    new = {tuple(row.get(key) for key in keys) for row in rows}
    kept = [row for row in kept if tuple(row.get(key) for key in keys) not in new]
    versions = {package: metadata.version(package) for package in packages}
    settings = {**settings, "threads": THREADS, "versions": versions}
    write(
        f"randomized/{name}", {"settings": settings, "command": f"benchmarks.randomized.{name}", "results": kept + rows}
    )
