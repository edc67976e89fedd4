"""Which bundle several processes serve: one decides, the others follow."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from fullrank.serving.instruments import Instruments
from fullrank.serving.live import Live
from fullrank.serving.shared import Agreed, Shared
from fullrank.serving.versions import Opened, Target, Versions, opened, target_of
from fullrank.training.publishing import POINTER

log = logging.getLogger(__name__)


def opened_alike(place: Path, shared: Shared) -> Opened:
    """What a process that starts serves: what the others do; or what the directory wants, if there are none, or if what
    they serve is not there any more.

    Raises:
        ValueError: see `target_of` and `opened`.
    """
    agreed = shared.agreed()
    if agreed is not None:
        with suppress(ValueError, OSError):
            return opened(agreed.now, shared=shared)
    with shared.deciding():
        target = target_of(place)
        found = opened(target, shared=shared)
        shared.agree(target, None if agreed is None else agreed.before, target)
        return found


class SharedVersions(Versions):
    """`Versions` of one of several processes.

    Who sees first that the directory wants another bundle opens it, asks it for a few answers and serves it; the others
    do so within a second or two. So it is with refusals and rollbacks.

    Args:
        shared: what they have in common.
    """

    def __init__(self, place: Path, first: Opened, live: Live, instruments: Instruments, shared: Shared) -> None:
        self._shared, self._number = shared, 0
        super().__init__(place, first, live, instruments)

    def look(self, *, again: bool = False) -> str:
        return self._look(again, wait=True)

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
        self._follow()
        if asked or (self.place / POINTER).is_file():
            # What another one is about to decide need not be waited for.
            self._look(asked, wait=asked)

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
        """Serve what the others do."""
        agreed = self._shared.agreed()
        if agreed is None or agreed.number == self._number:
            return agreed
        with self._changing:
            self._number, self._seen, before = agreed.number, agreed.seen, self._before
            if agreed.now != self.now:
                try:
                    held = before is not None and before.content is not None and before.target == agreed.now
                    self._swap(before if held and before is not None else self._opened(agreed.now))
                except (ValueError, OSError, RuntimeError) as error:
                    log.error("what the other processes serve cannot be opened: %s", str(error).splitlines()[0])
        return agreed
