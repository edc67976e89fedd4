"""Files and directories appear whole or not at all."""

from __future__ import annotations

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
