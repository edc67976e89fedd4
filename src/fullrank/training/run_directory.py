"""The directory of a run: what a run may write there, and how an earlier one gives way."""

from __future__ import annotations

import contextlib
import glob
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fullrank.data import atomic
from fullrank.training import checkpoint
from fullrank.training.lock import locked

# The checkpoints of a funnel's rankers: a directory for each stage.
STAGES = "stages"
# Which ids lost their rows.
EVICTED = "evicted"
# What a run writes; the recipe comes first and says that the rest is a run's.
RECIPE, PAGE = "recipe.json", "report.html"
OWN = ("model", "bundle", "checkpoints", STAGES, EVICTED, "tensorboard", "metrics.json", PAGE, RECIPE)
# The parts that a run writes when training is over.
_RESULTS = ("model", "bundle", "metrics.json", PAGE)
# Where a run that is to replace another one works until it is complete, and where it lies while the other gives way.
NEXT, COMPLETE = ".next", ".complete"
# In the latter: the inode of each part, by which it is known wherever a kill ended the exchange.
_PARTS = "parts.json"


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
        """Let the earlier run give way to the complete one.

        Each part is the old or the new one throughout. If a kill ends this, whoever locks the directory next finishes
        it first.
        """
        if self.work == self.path:
            return
        parts = {name: (self.work / name).stat().st_ino for name in OWN if (self.work / name).exists()}
        atomic.write_text(self.work / _PARTS, json.dumps(parts) + "\n")
        self.work.rename(self.path / COMPLETE)
        _give_way(self.path)


@contextlib.contextmanager
def run_directory(path: Path, *, resume: bool, overwrite: bool) -> Iterator[RunDirectory]:
    """Lock a run's directory, made if needed, and say where the run is to work.

    Nothing that was there is touched before `publish`, and nothing ever that no run made.

    Raises:
        ValueError: if another process is at a run there, it holds an earlier run and neither flag is set, something
            there has the name of a run's part but no run made it, or there is nothing to resume.
    """
    fresh = not path.exists()
    # A lock is all that a run leaves which is killed at once.
    begun = fresh or bool(list(path.glob(".lock*")))
    path.mkdir(parents=True, exist_ok=True)
    try:
        with locked(path, "a run"):
            _clear_leftovers(path)
            place = _prepared(path, resume=resume, overwrite=overwrite, begun=begun)
            try:
                yield place
            except BaseException:
                if place.work == path / NEXT and not _has_checkpoints(place.work):
                    shutil.rmtree(place.work, ignore_errors=True)
                raise
    finally:
        if fresh:
            with contextlib.suppress(OSError):  # it stays if anything was written
                path.rmdir()


def _clear_leftovers(path: Path) -> None:
    """Finish what a killed run was publishing, and remove what it was building. The lock is ours: nobody is at it."""
    for name in (*OWN, NEXT, COMPLETE):
        atomic.clear_leftovers(path, glob.escape(name), alone=True)
    _give_way(path)
    for work in (path, path / NEXT):
        for name in OWN:
            atomic.clear_leftovers(work, glob.escape(name), alone=True)
        for place in _checkpoint_places(work):
            checkpoint.clear_leftovers(place, alone=True)


def _give_way(path: Path) -> None:
    complete = path / COMPLETE
    if not (complete / _PARTS).exists():
        return
    parts = json.loads((complete / _PARTS).read_text(encoding="utf-8"))
    for name in OWN:
        new, old = complete / name, path / name
        if name not in parts:
            if old.exists():
                atomic.remove(old)
        elif not old.exists() or old.stat().st_ino != parts[name]:
            atomic.replace_entry(new, old)
    atomic.remove(complete)


def _prepared(path: Path, *, resume: bool, overwrite: bool, begun: bool) -> RunDirectory:
    present = [name for name in OWN if (path / name).exists()]
    if present and RECIPE not in present:
        raise ValueError(f"{path / present[0]} was not made by a run: choose another --out")
    following = path / NEXT
    if resume:
        work = following if following.exists() else path
        if _has_checkpoints(work):
            return RunDirectory(path, work, resume=True)
        if work == path:
            ended = any(name in present for name in _RESULTS)
            if ended or not (RECIPE in present or (begun and all(each.name == ".lock" for each in path.iterdir()))):
                raise ValueError(f"{path} has no checkpoint to resume from: start anew with --overwrite")
            return RunDirectory(path, path, resume=False)
        overwrite = True  # which is what made it
    if following.exists():
        atomic.remove(following)
    if present in ([], [RECIPE]):
        return RunDirectory(path, path, resume=False)
    if not overwrite:
        cure = "pass --resume to continue it, --overwrite, or another --out"
        raise ValueError(f"{path} holds an earlier run: {cure}")
    following.mkdir()
    return RunDirectory(path, following, resume=False)


def _has_checkpoints(work: Path) -> bool:
    return any(checkpoint.list_steps(place) for place in _checkpoint_places(work))


def _checkpoint_places(work: Path) -> list[Path]:
    return [work / "checkpoints", *sorted(work.glob(f"{STAGES}/*/checkpoints"))]
