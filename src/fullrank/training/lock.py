"""One process at a time in a directory, also where several hosts share it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The owner touches its lock so often; on another host, one that was not touched for so long is left over.
TOUCH_EVERY, LEFT_OVER_AFTER = 10.0, 60.0


@contextlib.contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Hold the lock `.lock` of an existing directory until the block ends.

    The lock of a process that is gone is taken over: on this host one whose process does not run, on another host one
    that was not touched for a minute.

    Args:
        what: what would use the directory, for the message: "a run".

    Raises:
        ValueError: if another process holds it; says which.
    """
    path = directory / ".lock"
    mine = {"host": socket.gethostname(), "process": os.getpid(), "began": time.time(), "token": os.urandom(8).hex()}
    while not _take(path, mine):
        owner = _owner(path)
        if owner is None:
            continue
        if not _is_left_over(path, owner):
            since = time.strftime("%H:%M:%S", time.localtime(owner.get("began", 0)))
            place = f"process {owner.get('process')} on {owner.get('host')}"
            raise ValueError(f"{directory} is in use: another process is at {what} there ({place}, since {since})")
        _take_away(path, owner)
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(TOUCH_EVERY):
            with contextlib.suppress(OSError):
                os.utime(path)

    toucher = threading.Thread(target=touch, name="lock", daemon=True)
    toucher.start()
    try:
        yield
    finally:
        stop.set()
        owner = _owner(path)
        if owner is not None and owner.get("token") == mine["token"]:
            path.unlink(missing_ok=True)


def _take(path: Path, mine: dict[str, Any]) -> bool:
    """Make the lock if there is none. A link to a whole file appears in one step, over network file systems too."""
    whole = path.with_name(f".lock-{mine['token']}")
    whole.write_text(json.dumps(mine), encoding="utf-8")
    try:
        os.link(whole, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(mine, file)
        except FileExistsError:
            return False
    finally:
        whole.unlink(missing_ok=True)
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
            return False
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False
    try:
        return time.time() - path.stat().st_mtime > LEFT_OVER_AFTER
    except FileNotFoundError:
        return True
