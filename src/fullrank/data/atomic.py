"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Of Linux's renameat2.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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
    """A temporary sibling of `path` to be filled; it takes the name `path` when the block ends without an exception.

    Whenever the process is killed, the old or the new directory is whole under its name, or, where the system cannot
    exchange two directories in one step and the kill fell between two steps, it is put back under it by the next call.
    Siblings left by a process that was killed while it built the same `path` are removed. A sibling of a process that
    still runs is left alone.

    Args:
        path: the final name.
        overwrite: replace an existing directory, which stays in place until the new one is complete.

    Raises:
        ValueError: if `path` exists and `overwrite` is not set, or is a file or a symbolic link.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link: name the directory itself, or choose another name")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, and a directory is to be made: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already: choose another name or pass --overwrite")
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
        replace_entry(partial, path)
        _sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_entry(new: Path, path: Path) -> None:
    """Let `new`, a whole file or directory, take the name `path`; what has it is removed.

    Where the system can exchange two names in one step, `path` is the old or the new one at every instant.
    """
    if not path.exists():
        os.rename(new, path)
    elif _exchange(new, path):
        shutil.rmtree(new, ignore_errors=True) if new.is_dir() else new.unlink()
    elif new.is_dir():
        _replace_in_two_steps(new, path)
    else:
        os.replace(new, path)


def _clear_leftovers(path: Path) -> None:
    """Put back a directory that was moved aside for one that never came, and remove what else killed processes left."""
    for leftover in sorted(path.parent.glob(f".{glob.escape(path.name)}.partial-*")):
        if _is_running(leftover.name.rpartition("-")[2]):
            continue
        if leftover.name.startswith(f".{path.name}.partial-old-") and not path.exists():
            os.rename(leftover, path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two directories in one step; False where the system or its file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def _replace_in_two_steps(partial: Path, path: Path) -> None:
    aside = path.with_name(f".{path.name}.partial-old-{os.getpid()}")
    os.rename(path, aside)
    try:
        os.rename(partial, path)
    except BaseException:
        if not path.exists():
            os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


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
