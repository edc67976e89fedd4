"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

# Of Linux's renameat2.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What a name is built under, beside it: the name, whether it is the old one moved aside, the process.
_PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-(?P<old>old-)?(?P<process>\d+)")

# How polars and safetensors report a full disk, or a full quota: as errors of their own.
_FULL = re.compile(rf"\(os error ({errno.ENOSPC}|{errno.EDQUOT})\)")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an error that says that there is no room and not where: as its file name, or else as its note."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(path)
        elif _FULL.search(str(error)) and not hasattr(error, "__notes__"):
            error.add_note(str(path))
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` under `path` so that a reader, or a crash, sees the old file or the new one, never a part.

    What a process that was killed while it wrote the same file left beside it is removed.

    Raises:
        OSError: if the directory does not exist or cannot be written.
    """
    clear_leftovers(path.parent, glob.escape(path.name))
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with naming(path), partial.open("wb") as file:
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
    still runs, in another container too, is left alone.

    Args:
        path: the final name.
        overwrite: replace an existing directory, which stays in place until the new one is complete.

    Raises:
        ValueError: if `path` exists and `overwrite` is not set, or is a file or a symbolic link, or another process
            with the same number, in another container, is building it.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link: name the directory itself, or choose another name")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, and a directory is to be made: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent, glob.escape(path.name))
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already: choose another name or pass --overwrite")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
    except FileExistsError:
        raise ValueError(f"{path} is being made by another process") from None
    lock = _lock(partial)
    try:
        with naming(path):
            yield partial
        for parent, _, names in os.walk(partial):
            for name in names:
                with open(os.path.join(parent, name), "rb") as file:
                    os.fsync(file.fileno())
            _sync_directory(Path(parent))
        replace_entry(partial, path)
        _sync_directory(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and isinstance(error.filename, str):
            error.filename = error.filename.replace(str(partial), str(path))  # the name that the caller knows
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def replace_entry(new: Path, path: Path) -> None:
    """Let `new`, a whole file or directory, take the name `path`; what has it is removed.

    Where the system can exchange two names in one step, `path` is the old or the new one at every instant.
    """
    if not path.exists():
        os.rename(new, path)
    elif _exchange(new, path):
        _delete(new)
    elif new.is_dir():
        _replace_in_two_steps(new, path)
    else:
        os.replace(new, path)


def remove(path: Path) -> None:
    """Remove a file or a directory so that a kill leaves it whole, or nothing, under its name."""
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    _delete(aside)
    os.rename(path, aside)
    _delete(aside)


def clear_leftovers(directory: Path, names: str, *, alone: bool = False) -> None:
    """Remove what killed processes left of their work on files and directories here, and put back what was moved aside.

    Args:
        names: a glob pattern of the final names.
        alone: nobody else can be at work here: what bears the number of a running process is removed too, because the
            number was given again.
    """
    for leftover in sorted(directory.glob(f".{names}.partial-*")):
        found = _PARTIAL.fullmatch(leftover.name)
        if found is None:
            continue
        process = int(found["process"])
        if (process != os.getpid() and not alone and is_running(process)) or _is_locked(leftover):
            continue
        if found["old"] and not (directory / found["name"]).exists():
            os.rename(leftover, directory / found["name"])
        else:
            _delete(leftover)


def _lock(directory: Path) -> int:
    """Lock a directory until the descriptor is closed, or the process ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    with contextlib.suppress(OSError):  # over NFS: the number of the process has to do
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _is_locked(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


def is_running(process: int, started: int | None = None) -> bool:
    """Whether a process of this host runs: one that was killed and that nobody waited for does not.

    Args:
        started: what `start_of` said of it; another process that was given the number later is not meant.
    """
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    state, now = _state_and_start(process)
    return state not in ("Z", "X") and (started is None or now is None or started == now)


def start_of(process: int) -> int | None:
    """When a process of this host started, in ticks since the host did; None where the system does not say."""
    return _state_and_start(process)[1]


def _state_and_start(process: int) -> tuple[str, int | None]:
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", None


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
