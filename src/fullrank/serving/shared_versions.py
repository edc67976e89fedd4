"""Which bundle several processes serve in an arm: one decides, the others follow."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

from fullrank.serving.instruments import Instruments
from fullrank.serving.live import Live
from fullrank.serving.shared import Agreed, SharedArm
from fullrank.serving.versions import Opened, Target, Versions, opened, target_of
from fullrank.training.deltas import position_of
from fullrank.training.publishing import POINTER

log = logging.getLogger(__name__)

# Seconds between attempts to open what was agreed; after the last a process ends, and another begins.
PAUSES = (1.0, 3.0)
# What opening a bundle may raise.
_FAULTS = (ValueError, OSError, RuntimeError, MemoryError)


class NotFollowed(ValueError):
    """What the other processes serve cannot be opened."""

    def __init__(self, why: Exception | str) -> None:
        line = (str(why).splitlines() or [type(why).__name__])[0]
        super().__init__(f"what the other processes serve cannot be opened: {line}")


def opened_alike(place: Path, shared: SharedArm) -> Opened:
    """What a process that starts serves: what the others do, or what the directory wants if there are none.

    If what they serve is not there any more, all go on with what the directory wants, unless that was refused or rolled
    back.

    Raises:
        ValueError: see `target_of` and `opened`.
        NotFollowed: if what the others serve is there, or nothing else is wanted, and it cannot be opened.
    """
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        agreed = shared.agreed()
        if agreed is None or not _is_there(agreed.now):
            break
        try:
            return opened(agreed.now, shared=shared)
        except _FAULTS as error:
            fault = NotFollowed(error)
    else:
        raise fault
    with shared.deciding():
        agreed = shared.agreed()
        if agreed is None:
            target = target_of(place)
        elif _is_there(agreed.now):  # somebody else has decided
            return opened(agreed.now, shared=shared)
        else:
            target = target_of(place)
            if target == agreed.seen != agreed.now:
                gone = f"{agreed.now.bundle} is not {agreed.now.version} any more"
                raise NotFollowed(f"{gone}, and {target.version} was refused or rolled back")
            log.warning("%s is not %s any more: all go on with %s", *agreed.now[:2], target.version)
        found = opened(target, shared=shared)
        shared.agree(target, None if agreed is None else agreed.before, target)
        return found


class SharedVersions(Versions):
    """`Versions` of one of several processes.

    Who sees first that the directory wants another bundle opens it, asks it for a few answers and serves it; the others
    do so within a second or two. So it is with refusals and rollbacks. A process that cannot open what was agreed tries
    again, and then ends, for another one to take its place: the rest stay with what was agreed.

    Args:
        shared: what they have in common.
    """

    def __init__(
        self,
        place: Path,
        first: Opened,
        live: Live,
        instruments: Instruments,
        shared: SharedArm,
        *,
        control: bool = True,
    ) -> None:
        self._shared, self._number = shared, 0
        self._attempts, self._next_attempt = 0, 0.0
        super().__init__(place, first, live, instruments, control=control)

    def look(self, *, again: bool = False) -> str:
        try:
            return self._look(again, wait=True)
        except NotFollowed as error:
            return str(error)

    def _look(self, again: bool, *, wait: bool) -> str:
        with self._shared.deciding(wait=wait) as alone:
            if not alone:
                return "unchanged"
            self._follow()
            outcome = super().look(again=again)
            self._agree()
            return outcome

    def roll_back(self) -> bool:
        with self._shared.deciding():
            agreed = self._follow()
            before = None if agreed is None else agreed.before
            if before is not None and (self._before is None or self._before.target != before):
                # It began after the swap, or while it opened one bundle there were two more.
                self._before = self._opened(before)
            done = super().roll_back()
            self._agree()
        return done

    def _glance(self, asked: bool) -> None:
        if time.monotonic() < self._next_attempt:
            return
        try:
            self._follow()
            if asked or (self.place / POINTER).is_file():
                # What another one is about to decide need not be waited for.
                self._look(asked, wait=asked)
        except NotFollowed as error:
            if self._attempts <= len(PAUSES):
                self._next_attempt = time.monotonic() + PAUSES[self._attempts - 1]
                log.warning("%s; it is tried again", error)
            else:
                log.error("%s; process %d ends, for another to begin", error, os.getpid())
                self._stop.set()
                _end()

    def _goes_on(self, target: Target) -> bool:
        # Of a bundle that is opened again, only what the deltas change is not shared.
        return False

    def _opened(self, target: Target) -> Opened:
        return opened(target, shared=self._shared)

    def _agree(self) -> None:
        """Tell the others what came of a look."""
        agreed = self._shared.agreed()
        before = None if self._before is None else self._before.target
        if agreed is None or (agreed.now, agreed.seen) != (self.now, self._seen):
            agreed = self._shared.agree(self.now, before, self._seen)
            self._shared.keep({self.now.base, *([] if before is None else [before.base])})
        self._number = agreed.number

    def _follow(self) -> Agreed | None:
        """Serve what the others do.

        Raises:
            NotFollowed: if it cannot be opened; then this process may not decide either.
        """
        try:
            agreed = self._shared.agreed()
            if agreed is not None and agreed.number != self._number:
                with self._changing:
                    self._follow_to(agreed)
        except _FAULTS as error:
            self._attempts += 1
            raise NotFollowed(error) from None
        self._attempts = 0
        return agreed

    def _follow_to(self, agreed: Agreed) -> None:
        before = self._before
        if agreed.now != self.now:
            held = before is not None and before.content is not None and before.target == agreed.now
            self._swap(before if held and before is not None else self._opened(agreed.now))
        self._number, self._seen = agreed.number, agreed.seen


def _is_there(target: Target) -> bool:
    """Whether the directories of a bundle and its deltas are still those."""
    try:
        return position_of(target.bundle).base == target.base and all(delta.is_dir() for delta in target.deltas)
    except _FAULTS:
        return False


def _end() -> None:
    """End this process, once it has answered what it was asked."""
    os.kill(os.getpid(), signal.SIGTERM)
