"""One process at a time in a directory, also where several hosts share it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fullrank.data.atomic import is_running, start_of

# The owner touches its lock so often; on another host, one that was not touched for so long is left over.
TOUCH_EVERY, LEFT_OVER_AFTER = 10.0, 60.0
# Tokens of the locks of this process. One with its number and another token is of a process before it: the first of a
# container that is started again often has the same number.
_held: set[str] = set()


@contextlib.contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Hold the lock `.lock` of an existing directory until the block ends.

    The lock of a process that is gone is taken over: on this host one whose process does not run, on another host one
    that was not touched for a minute. What a process left that was killed while it took the lock is removed.

    Args:
        what: what would use the directory, for the message: "a run".

    Raises:
        ValueError: if another process holds it; says which.
    """
    path = directory / ".lock"
    token, process = os.urandom(8).hex(), os.getpid()
    mine = {"host": socket.gethostname(), "process": process, "started": start_of(process), "token": token}
    mine["began"] = time.time()
    while not _take(path, mine):
        owner = _owner(path)
        if owner is None:
            continue
        if not _is_left_over(path, owner):
            since = time.strftime("%H:%M:%S", time.localtime(owner.get("began", 0)))
            place = f"process {owner.get('process')} on {owner.get('host')}"
            raise ValueError(f"{directory} is in use: another process is at {what} there ({place}, since {since})")
        _take_away(path, owner)
    _held.add(token)
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(TOUCH_EVERY):
            with contextlib.suppress(OSError):
                os.utime(path)

    toucher = threading.Thread(target=touch, name="lock", daemon=True)
    toucher.start()
    try:
        for other in directory.glob(".lock-*"):
            owner = _owner(other)
            if owner is not None and _is_left_over(other, owner):
                other.unlink(missing_ok=True)
        yield
    finally:
        stop.set()
        _held.discard(token)
        owner = _owner(path)
        if owner is not None and owner.get("token") == token:
            path.unlink(missing_ok=True)


def _take(path: Path, mine: dict[str, Any]) -> bool:
    """Make the lock if there is none. A link to a whole file appears in one step, over network file systems too."""
    whole = path.with_name(f".lock-{mine['token']}")
    try:
        whole.write_text(json.dumps(mine), encoding="utf-8")
        os.link(whole, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        return _take_without_links(path, mine)
    finally:
        whole.unlink(missing_ok=True)
    return True


def _take_without_links(path: Path, mine: dict[str, Any]) -> bool:
    try:
        file = open(path, "x", encoding="utf-8")  # noqa: SIM115 (what cannot be filled is removed)
    except FileExistsError:
        return False
    try:
        with file:
            json.dump(mine, file)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _take_away(path: Path, owner: dict[str, Any]) -> None:
    """Remove the left-over lock of `owner`, unless it is another's by now.

    One process at a time looks and removes. Else, of two that found the same lock left over, the second would take away
    the new lock of the first.
    """
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        # It ends with the process. Where directories cannot be locked, as over NFS, looking again has to do.
        with contextlib.suppress(OSError):
            fcntl.flock(directory, fcntl.LOCK_EX)
        if _owner(path) == owner and _is_left_over(path, owner):
            path.unlink(missing_ok=True)
    finally:
        os.close(directory)


def _owner(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; None if it is gone. One that cannot be read is somebody's whom only its age tells of."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_left_over(path: Path, owner: dict[str, Any]) -> bool:
    process = owner.get("process")
    if owner.get("host") == socket.gethostname() and isinstance(process, int):
        if process == os.getpid():
            return owner.get("token") not in _held
        return not is_running(process, owner.get("started"))
    try:
        return time.time() - path.stat().st_mtime > LEFT_OVER_AFTER
    except FileNotFoundError:
        return True
