"""What the log's rules are for: a student that was trained and tested on a leak, and what it is worth once served."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_leak_shines_offline_and_fails_when_it_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's own demonstration, on a third of its rows."""
    monkeypatch.syspath_prepend(str(ROOT))
    leak = importlib.import_module("benchmarks.transfer.leak")
    found = leak.demonstrate(tmp_path, seed=0, rows=12_000, users=130)
    offline, served, honest = (found[name] for name in ("leaky, offline", "leaky, served", "point-in-time, offline"))
    assert offline["auc"] > served["auc"] + 0.15 and offline["auc"] > honest["auc"] + 0.1
    assert served["ne"] > honest["ne"] and served["ne"] > 1
