"""A run's directory after a kill at any step: each part whole at once, all of one run after the next command."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fullrank.data import atomic
from fullrank.training import lock
from fullrank.training.lock import locked
from fullrank.training.run_directory import run_directory

KILLED = 9
# The earlier run was of a funnel, the new one is of a model.
OLD = ("recipe.json", "metrics.json", "bundle/manifest.json", "bundle/weights", "stages/final/checkpoints/step-1/state")
NEW = ("recipe.json", "metrics.json", "model/manifest.json", "model/weights", "checkpoints/step-1/state")


def fill(directory: Path, names: tuple[str, ...], content: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


def contents(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def killed(at: int, work: Callable[[], None]) -> bool:
    """Do it in a process that dies before its call number `at` that changes the file system; False if it had fewer."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == KILLED
    left = at

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            if not left:
                os._exit(KILLED)
            left -= 1
            return call(*arguments, **more)

        return called

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "link"):
        setattr(os, name, dying(getattr(os, name)))
    atomic._exchange = dying(atomic._exchange)
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_anywhere_the_next_command_finds_one_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    out = tmp_path / "run"

    def overwrite() -> None:
        with run_directory(out, resume=False, overwrite=True) as place:
            fill(place.work, NEW, "new")
            place.publish()

    outcomes = set()
    for at in range(1000):
        shutil.rmtree(out, ignore_errors=True)
        fill(out, OLD if at % 2 else NEW, "old")
        (out / "notes.txt").write_text("mine")
        old = contents(out)
        died = killed(at, overwrite)
        found = contents(out)
        for name, content in found.items():
            part = name.partition("/")[0]
            if not part.startswith("."):  # each part has all of its files, of one run
                assert content in ("old", "new", "mine")
                assert {value for key, value in found.items() if key.partition("/")[0] == part} == {content}
                expected = old if content == "old" else NEW
                assert all(key in found for key in expected if key.partition("/")[0] == part)
        with pytest.raises(RuntimeError), run_directory(out, resume=False, overwrite=True):
            raise RuntimeError("the next command fails")
        assert contents(out) in (old, dict.fromkeys(NEW, "new") | {"notes.txt": "mine"})
        assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
        outcomes.add(contents(out) == old)
        if not died:
            break
    assert at > 20 and outcomes == {True, False}


def test_a_run_that_was_killed_before_its_first_checkpoint_is_resumed_from_the_beginning(tmp_path: Path) -> None:
    for name in ("nothing", "recipe", "next"):
        out = tmp_path / name
        out.mkdir()
        (out / ".lock").write_text(json.dumps({"host": socket.gethostname(), "process": 2**22 + 1}))
        if name != "nothing":
            (out / "recipe.json").write_text("{}")
        if name == "next":
            fill(out, OLD, "old")
            fill(out / ".next", ("recipe.json",), "new")
        with run_directory(out, resume=True, overwrite=False) as place:
            assert not place.resume
            assert place.work == (out / ".next" if name == "next" else out)
            assert not any(place.work.glob("recipe.json")) or name == "recipe"
            assert name != "next" or contents(out)["bundle/weights"] == "old"


def test_a_lock_is_left_over_though_a_process_has_its_number(tmp_path: Path) -> None:
    mine = {"host": socket.gethostname(), "process": os.getpid(), "token": "of the container before"}
    other = {"host": socket.gethostname(), "process": os.getppid(), "started": 1, "token": "of another"}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has waited for it
    zombie = {"host": socket.gethostname(), "process": gone.pid, "token": "of a zombie"}
    for owner in (mine, other, zombie):
        (tmp_path / ".lock").write_text(json.dumps(owner))
        (tmp_path / f".lock-{owner['token']}").write_text(json.dumps(owner))
        with locked(tmp_path, "a run"):
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    gone.wait()
    other["started"] = atomic.start_of(os.getppid())
    (tmp_path / ".lock").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="is in use"), locked(tmp_path, "a run"):
        raise AssertionError


def test_a_lock_that_found_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.os, "link", full)
    with pytest.raises(OSError, match="No space left"), locked(tmp_path, "a run"):
        raise AssertionError
    assert not list(tmp_path.iterdir())
