"""Fixtures that several rooms share."""

from __future__ import annotations

import os
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
