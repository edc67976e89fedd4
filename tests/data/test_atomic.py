"""Files and directories appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from fullrank.data import atomic


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic.write_text(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_appears_when_its_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "data"
    with atomic.new_directory(final) as partial:
        (partial / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [final]


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic.new_directory(tmp_path / "data") as partial:
        (partial / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_overwriting_keeps_the_old_directory_until_the_new_one_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "data"
    final.mkdir()
    (final / "old").write_text("1")
    with pytest.raises(ValueError, match="exists already"), atomic.new_directory(final):
        pass
    with pytest.raises(RuntimeError), atomic.new_directory(final, overwrite=True):
        raise RuntimeError
    assert (final / "old").exists()
    with atomic.new_directory(final, overwrite=True) as partial:
        (partial / "new").write_text("2")
        assert (final / "old").exists()
    assert [path.name for path in final.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [final]


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path: Path) -> None:
    dead, living = tmp_path / ".data.partial-999999999", tmp_path / f".data.partial-{os.getppid()}"
    dead.mkdir()
    living.mkdir()
    with atomic.new_directory(tmp_path / "data"):
        pass
    assert not dead.exists()
    assert living.exists()


def test_what_a_process_of_another_container_is_building_is_left_alone(tmp_path: Path) -> None:
    """There numbers of processes mean nothing: it may be any number that is free here, or this process's own."""
    with atomic.new_directory(tmp_path / "data") as mine:
        (mine / "rows").write_text("1")
        foreign = mine.rename(tmp_path / ".data.partial-999999999")
        atomic.clear_leftovers(tmp_path, "data")
        assert (foreign / "rows").exists()
        foreign.rename(mine)
        with pytest.raises(ValueError, match="is being made by another"), atomic.new_directory(tmp_path / "data"):
            pytest.fail("nothing should be built")
    assert (tmp_path / "data" / "rows").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


def test_a_file_that_a_killed_process_was_writing_is_removed_and_a_strangers_is_not(tmp_path: Path) -> None:
    path, dead = tmp_path / "file", tmp_path / ".file.partial-999999999"
    strangers = {tmp_path / ".file.partial-notes", tmp_path / ".other.partial-999999999"}
    for each in (dead, *strangers):
        each.write_text("half")
    atomic.write_text(path, "new")
    assert set(tmp_path.iterdir()) == {path, *strangers}


@pytest.mark.parametrize("exchange", [True, False])
def test_wherever_an_overwrite_is_killed_a_whole_directory_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)

    class Killed(BaseException):
        pass

    for killed_at in range(6):
        final = tmp_path / f"home{killed_at}" / "data"
        with atomic.new_directory(final) as partial:
            (partial / "which").write_text("old")
        left = [killed_at]

        def dying(call: object, left: list[int] = left) -> object:
            def called(*arguments: object, **more: object) -> object:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return call(*arguments, **more)  # type: ignore[operator]

            return called

        with monkeypatch.context() as patch:
            # The dead do nothing more: from the fatal call on, no name is changed and nothing removed.
            for module, name in ((os, "rename"), (atomic, "_exchange"), (atomic.shutil, "rmtree")):
                patch.setattr(module, name, dying(getattr(module, name)))
            with contextlib.suppress(Killed), atomic.new_directory(final, overwrite=True) as partial:
                (partial / "which").write_text("new")
        for leftover in final.parent.glob(".data.partial*"):
            leftover.rename(leftover.with_name(leftover.name.replace(str(os.getpid()), "999999999")))
        with contextlib.suppress(RuntimeError), atomic.new_directory(final, overwrite=True):
            raise RuntimeError("the next command fails")
        assert (final / "which").read_text() in ("old", "new")
        assert list(final.parent.iterdir()) == [final]


def test_a_file_or_a_link_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("notes")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    for name, what in (("file", "is a file"), ("link", "is a symbolic link"), ("dangling", "is a symbolic link")):
        with pytest.raises(ValueError, match=what), atomic.new_directory(tmp_path / name, overwrite=True):
            pytest.fail("nothing should be built")
    assert sorted(tmp_path.iterdir()) == before


def test_an_error_that_says_there_is_no_room_says_where(tmp_path: Path) -> None:
    class Theirs(Exception):
        pass

    def said(error: Exception, name: str) -> str:
        with (
            pytest.raises(type(error)) as raised,
            atomic.new_directory(tmp_path / name),
            atomic.naming(tmp_path / "own"),
        ):
            raise error
        told = [getattr(raised.value, "filename", None), *getattr(raised.value, "__notes__", [])]
        return "".join(Path(place).name for place in told if place is not None)

    assert said(OSError(errno.ENOSPC, "Error writing bytes"), "data") == "own"
    assert said(Theirs("No space left on device (os error 28)"), "data") == "own"
    assert said(OSError(errno.ENOSPC, "No space left on device", "named"), "data") == "named"
    assert said(OSError(errno.EIO, "Error reading bytes"), "data") == ""
    with pytest.raises(OSError) as raised, atomic.new_directory(tmp_path / "data") as partial:
        (partial / "none" / "file").write_text("1")
    assert raised.value.filename == str(tmp_path / "data" / "none" / "file")
