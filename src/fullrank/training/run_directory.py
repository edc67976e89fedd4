"""The directory of a run: what a run may write there, and how an earlier one gives way."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fullrank.data import atomic
from fullrank.training import checkpoint
from fullrank.training.lock import locked

# The checkpoints of a funnel's rankers: a directory for each stage.
STAGES = "stages"
# What a run writes; the recipe comes first and says that the rest is a run's.
RECIPE, PAGE = "recipe.json", "report.html"
OWN = ("model", "bundle", "checkpoints", STAGES, "tensorboard", "metrics.json", PAGE, RECIPE)
# Where a run that is to replace another one works until it is complete.
NEXT = ".next"


@dataclass(frozen=True)
class RunDirectory:
    """Where a run works, and what it was told.

    Attributes:
        path: the directory of the run.
        work: where it writes: `path`, or a directory inside it until an earlier run may give way.
        resume: whether there is something to continue.
    """

    path: Path
    work: Path
    resume: bool

    def publish(self) -> None:
        """Let the earlier run give way to the complete one, part by part: each is the old or the new one throughout."""
        if self.work == self.path:
            return
        for name in OWN:
            new, old = self.work / name, self.path / name
            if new.exists():
                atomic.replace_entry(new, old)
            elif old.exists():
                _remove(old)
        shutil.rmtree(self.work)


@contextlib.contextmanager
def run_directory(path: Path, *, resume: bool, overwrite: bool) -> Iterator[RunDirectory]:
    """Lock a run's directory, made if needed, and say where the run is to work.

    Nothing that was there is touched before `publish`, and nothing ever that no run made.

    Raises:
        ValueError: if another process is at a run there, it holds an earlier run and neither flag is set, something
            there has the name of a run's part but no run made it, or there is nothing to resume.
    """
    fresh = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with locked(path, "a run"):
            yield _prepared(path, resume=resume, overwrite=overwrite, fresh=fresh)
    finally:
        if fresh:
            with contextlib.suppress(OSError):  # it stays if anything was written
                path.rmdir()


def _prepared(path: Path, *, resume: bool, overwrite: bool, fresh: bool) -> RunDirectory:
    present = [name for name in OWN if (path / name).exists()]
    if present and RECIPE not in present:
        raise ValueError(f"{path / present[0]} was not made by a run: choose another --out")
    following = path / NEXT
    if resume:
        work = following if following.exists() else path
        if _has_checkpoints(work):
            return RunDirectory(path, work, resume=True)
        if not fresh:
            raise ValueError(f"{path} has no checkpoint to resume from: start anew with --overwrite")
        return RunDirectory(path, path, resume=False)
    if following.exists():
        shutil.rmtree(following)
    if present in ([], [RECIPE]):
        return RunDirectory(path, path, resume=False)
    if not overwrite:
        cure = "pass --resume to continue it, --overwrite, or another --out"
        raise ValueError(f"{path} holds an earlier run: {cure}")
    following.mkdir()
    return RunDirectory(path, following, resume=False)


def _has_checkpoints(work: Path) -> bool:
    places = [work / "checkpoints", *sorted(work.glob(f"{STAGES}/*/checkpoints"))]
    return any(checkpoint.list_steps(place) for place in places)


def _remove(path: Path) -> None:
    if path.is_dir() and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        path.unlink()
