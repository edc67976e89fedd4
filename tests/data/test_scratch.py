"""Temporary directories of the killed are removed, and no others."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fullrank.data.scratch import PREFIX, Scratch

HOLD = "from fullrank.data.scratch import Scratch; s = Scratch(); print(s.path, flush=True); input()"


def test_the_next_one_removes_what_a_killed_process_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / f"{PREFIX}notes").write_text("a stranger's file")
    (tmp_path / "fullrank-other").mkdir()
    strangers = set(tmp_path.iterdir())
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    (theirs / "spool").write_text("rows")
    with Scratch() as mine:
        (mine / "more").write_text("rows")
        assert set(tmp_path.iterdir()) == {*strangers, theirs, mine} and (theirs / "spool").exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert set(tmp_path.iterdir()) == {*strangers, theirs}
    with Scratch() as mine:
        assert set(tmp_path.iterdir()) == {*strangers, mine}
    assert set(tmp_path.iterdir()) == strangers
