"""What the processes of one server have in common: files that they map, their numbers, and what all of them serve."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead
from pydantic import BaseModel, ConfigDict

from fullrank.data import atomic
from fullrank.serving.versions import Target

_ARMS, _ARRAYS, _AGREED, _APPLIED = "arms", "arrays", "agreed.json", "applied"


class Agreed(BaseModel):
    """What all processes serve in an arm.

    Attributes:
        number: of the decision; a later one is larger.
        now: what is served.
        before: what was served before it, to roll back to.
        seen: what was looked at last, good or not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int
    now: Target
    before: Target | None
    seen: Target | str


class Shared:
    """A directory of the processes of a server, and of nobody else.

    Args:
        directory: on a disk, so that what is not used need not stay in memory.
        imports: modules that have to be imported before a bundle can be opened.

    Attributes:
        metrics: directory of what each process counts.
        counts: file of what comes of the arms.
    """

    def __init__(self, directory: Path, imports: Sequence[str] = ()) -> None:
        self.directory, self.imports = directory, tuple(imports)
        self.metrics, self.counts = directory / "metrics", directory / "counts.sqlite"
        self.metrics.mkdir(parents=True, exist_ok=True)

    def arm(self, name: str) -> SharedArm:
        """What they have in common of an arm."""
        return SharedArm(self.directory / _ARMS / hashlib.blake2b(name.encode(), digest_size=8).hexdigest(), self)

    def all_applied(self, number: int) -> bool:
        """Whether the requests of all processes see a change of items, in every arm."""
        for place in self.directory.glob(f"{_ARMS}/*/{_APPLIED}/[0-9]*"):
            with suppress(FileNotFoundError):
                if int(place.read_text()) < number:
                    return False
        return True

    def forget(self, process: int) -> None:
        """A process has ended: nobody waits for it, and what it was doing does not count."""
        mark_process_dead(process, str(self.metrics))  # type: ignore[no-untyped-call]
        for place in self.directory.glob(f"{_ARMS}/*/{_APPLIED}/{process}"):
            place.unlink(missing_ok=True)


class SharedArm:
    """What the processes of a server have in common of an arm: the files of its bundle, and which one it is.

    Args:
        directory: of this arm.
        server: whose it is.
    """

    def __init__(self, directory: Path, server: Shared) -> None:
        self.directory, self._imports = directory, server.imports
        for name in (_APPLIED, _ARRAYS):
            (directory / name).mkdir(parents=True, exist_ok=True)

    def arrays(self, bundle: Path, base: str) -> Path:
        """The directory of a bundle's arrays, to be mapped. Who asks first has them made, by a process that ends then,
        and with it goes what opening the bundle took beside them; others wait.

        Raises:
            ValueError: if the bundle cannot be opened, is another one, or does not answer as it should.
        """
        place = self.directory / _ARRAYS / base
        with self._locked(_ARRAYS):
            if not place.is_dir():
                command = [sys.executable, "-P", "-m", "fullrank.serving.preparing", str(bundle), base, str(place)]
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
                made = subprocess.run([*command, *self._imports], env=environment, stderr=subprocess.PIPE, text=True)
                if made.returncode:
                    said = made.stderr.strip().splitlines() or [f"the process that opened it ended: {made.returncode}"]
                    raise ValueError(said[-1] if made.returncode == 2 else f"{bundle}: {said[-1]}")
        return place

    def keep(self, bases: Collection[str]) -> None:
        """Remove the files of all other bundles; processes that still map them are not disturbed."""
        with self._locked(_ARRAYS):
            for place in (self.directory / _ARRAYS).iterdir():
                if place.name not in bases:
                    shutil.rmtree(place, ignore_errors=True)

    def tell_applied(self, number: int) -> None:
        """Tell the others up to which change of items the requests of this process see them."""
        atomic.write_text(self.directory / _APPLIED / str(os.getpid()), str(number))

    @contextmanager
    def deciding(self, *, wait: bool = True) -> Iterator[bool]:
        """Alone among the processes, one may decide what is served in this arm.

        Args:
            wait: until no other does; else the result says whether it is so.
        """
        with self._locked("deciding", wait=wait) as alone:
            yield alone

    def agreed(self) -> Agreed | None:
        """The last decision."""
        try:
            return Agreed.model_validate_json((self.directory / _AGREED).read_bytes())
        except FileNotFoundError:
            return None

    def agree(self, now: Target, before: Target | None, seen: Target | str) -> Agreed:
        """Decide; the others follow."""
        last = self.agreed()
        agreed = Agreed(number=1 if last is None else last.number + 1, now=now, before=before, seen=seen)
        atomic.write_text(self.directory / _AGREED, agreed.model_dump_json())
        return agreed

    @contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        # A lock ends with the process that has it, however that ends.
        with (self.directory / f"{name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
