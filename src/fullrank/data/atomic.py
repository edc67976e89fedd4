"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` under `path` so that a reader, or a crash, sees the old file or the new one, never a part.

    Raises:
        OSError: if the directory does not exist or cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def replace(partial: Path, path: Path) -> None:
    """Move a finished file to its final name once its bytes are on disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, content.encode("utf-8"))


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `path` to be filled; it is renamed to `path` when the block ends without an exception.

    Siblings left by a process that was killed while it built the same `path` are removed first. A sibling of a
    process that still runs is left alone.

    Args:
        path: the final name.
        overwrite: replace an existing directory, which stays in place until the new one is complete.

    Raises:
        ValueError: if `path` exists and `overwrite` is not set.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already: choose another name or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.partial-*"):
        if not _is_running(leftover.name.rpartition("-")[2]):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for parent, _, names in os.walk(partial):
            for name in names:
                with open(os.path.join(parent, name), "rb") as file:
                    os.fsync(file.fileno())
            _sync_directory(Path(parent))
        if path.exists():
            # A directory cannot be replaced in one step; the old one is moved aside first, so that a crash in
            # between leaves it recoverable under the hidden name rather than half deleted.
            aside = path.with_name(f".{path.name}.partial-old-{os.getpid()}")
            os.rename(path, aside)
            os.rename(partial, path)
            shutil.rmtree(aside)
        else:
            os.rename(partial, path)
        _sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _is_running(process: str) -> bool:
    if not process.isdigit() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
