"""Small logs in time for the tests of streams, and a stream in a process of its own for those that kill it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from tables import SCHEMA, frame

from fullrank.data.dataset import Dataset, write_dataset
from fullrank.schema import Keys
from fullrank.training.stream import StreamReport, stream

HOUR, START = 3600, 1_700_000_000 // 3600 * 3600
TIMED = SCHEMA.model_copy(update={"keys": Keys(user_id="user_key", timestamp="time")})


def clicks_in_time(path: Path, hours: int = 5, rows: int = 120, flipped: int | None = None) -> Dataset:
    """Hours of clicks; in one of them, labels may be the wrong way round. Hour 3 is empty."""
    log = frame(hours * rows, 1).with_columns(
        pl.Series(
            "__timestamp",
            START + np.arange(hours * rows) * HOUR // rows + HOUR * (np.arange(hours * rows) // rows >= 3),
        )
    )
    if flipped is not None:
        mine = (pl.col("__timestamp") - START) // HOUR == flipped
        log = log.with_columns(
            pl.when(mine).then(1 - pl.col("click")).otherwise(pl.col("click")).cast(pl.Float32).alias("click")
        )
    return write_dataset(path, TIMED, {"train": [log]}, encoded=True)


def recipe(data: Path, embedding: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {
        "data": {"dataset": str(data)},
        "model": {"name": "dcn_v2", "hidden": [8], "embedding_dim": 4, "embedding_init": 0.1, "batch_norm": True},
        "training": {"batch_size": 32, "learning_rate": 0.02, "seed": 3},
        "embedding": embedding or {"kind": "adam"},
        "stream": {"rollback": None, **settings},
    }


def weights(bundle: Path) -> bytes:
    return (bundle / "weights.safetensors").read_bytes()


def files(directory: Path) -> dict[str, bytes]:
    """All that a stream has written, but its lock."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "lock" not in path.name
    }


def run(data: Path, out: Path, settings: dict[str, Any]) -> StreamReport:
    torch.set_num_threads(1)
    return stream(recipe(data, **settings), out, source="recipe")


class Killed(BaseException):
    """What stands for a kill: no handler of errors stops it."""


class KillAt:
    """Ends the process's work at the n-th call that changes the file system."""

    CALLS = ("rename", "replace", "fsync", "unlink", "rmdir", "link")

    def __init__(self, monkeypatch: Any, at: int) -> None:
        self.count, self.at = 0, at
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                raise Killed
            return call(*arguments, **named)

        return counted
