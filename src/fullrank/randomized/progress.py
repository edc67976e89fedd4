"""What `verbose=True` tells of a long fit, on standard error: a line for each step, and how far a slow pass has come.

A fit attaches it to its table, where passes and solvers find it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Part = TypeVar("Part")
EVERY = 1.0  # seconds without a line after which a pass tells how far it is; ten times that where lines stay


class Progress:
    """Lines that start with the name of an estimator and the seconds since its fit began.

    In a terminal a pass under way rewrites its own line; elsewhere, as in a notebook or a log, lines are few and stay.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.began = self.shown = time.perf_counter()
        self.unfinished = 0  # columns of a line that will be written over

    def line(self, text: str) -> None:
        self._write(text, "\n")

    def watched(self, parts: Iterable[Part], total: int, number: int) -> Iterator[Part]:
        """The same parts of pass `number`, of `total`; tells of them where they take long."""
        for done, part in enumerate(parts):
            passive = time.perf_counter() - self.shown
            if done and passive >= EVERY and sys.stderr.isatty():
                self._write(f"pass {number}: {done} of {total} fragments", "\r")
            elif done and passive >= 10 * EVERY:
                self.line(f"pass {number}: {done} of {total} fragments")
            yield part

    def _write(self, text: str, end: str) -> None:
        seconds = time.perf_counter() - self.began
        full = f"{self.name}, {seconds:.1f} s: {text}"
        sys.stderr.write(full.ljust(self.unfinished) + end)
        sys.stderr.flush()
        self.unfinished = len(full) if end == "\r" else 0
        self.shown = time.perf_counter()
