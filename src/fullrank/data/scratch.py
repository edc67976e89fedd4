"""Temporary directories that do not outlive a killed process for long."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "fullrank-scratch-"


class Scratch:
    """A new directory in TMPDIR until `remove`; those of processes that were killed are removed first.

    Its owner holds a lock on the directory, which ends with the process, in whatever container it is. As a context
    manager it gives the path, and is removed at the end.

    Attributes:
        path: the directory.
    """

    def __init__(self) -> None:
        _clear_leftovers()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            self._descriptor = os.open(self.path, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks, where nobody is told dead
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            if self.path.is_dir():
                return
            os.close(self._descriptor)  # taken for a leftover before it was locked

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the directory and what is in it; once only."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def _clear_leftovers() -> None:
    for place in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(descriptor).st_uid == os.getuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place, ignore_errors=True)
        except OSError:  # its owner lives
            pass
        finally:
            os.close(descriptor)
