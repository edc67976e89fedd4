"""Which bundle is served: that of a directory, or where the pointer of a stream points."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fullrank.funnel.bundle import load_bundle
from fullrank.funnel.canary import check_answers
from fullrank.funnel.deltas import with_deltas
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import Scorer
from fullrank.serving.instruments import Instruments
from fullrank.serving.live import Live
from fullrank.training.deltas import Position, position_of
from fullrank.training.manifest import MANIFEST
from fullrank.training.memory import return_freed_memory
from fullrank.training.publishing import POINTER, read_pointer

if TYPE_CHECKING:
    from fullrank.serving.shared import SharedArm

log = logging.getLogger(__name__)

# Seconds between two looks at a pointer.
LOOK = 1.0


class Target(NamedTuple):
    """What is to be served.

    Attributes:
        bundle: its directory.
        base: identity of the bundle.
        deltas: directories of those after it, in order.
        until: seconds since 1970 up to which events are learnt; when the bundle was written, if it does not say.
    """

    bundle: Path
    base: str
    deltas: tuple[Path, ...]
    until: float

    @property
    def version(self) -> str:
        return self.base[:12] + (f"+{len(self.deltas)}" if self.deltas else "")


class Opened(NamedTuple):
    """A bundle that was opened, and has answered as it should.

    Attributes:
        content: None of a funnel that is served, which is held where it is served, with the changes of its items.
    """

    target: Target
    content: Funnel | Scorer | None
    position: Position


def target_of(place: Path) -> Target:
    """What a directory wants to be served: a bundle itself, or what the pointer of a stream names.

    Raises:
        ValueError: if it is neither, or the pointer is damaged.
    """
    pointer = read_pointer(place)
    if pointer is None:
        manifest = place / MANIFEST
        if not manifest.is_file():
            nested = [place / name for name in ("bundle", "model") if (place / name / MANIFEST).is_file()]
            hint = f"; did you mean {nested[0]}?" if nested else ""
            raise ValueError(
                f"{place} is not a bundle: it has no {MANIFEST}, nor is it a stream that has published: "
                f"it has no {POINTER}{hint}"
            )
        return Target(place, position_of(place).base, (), manifest.stat().st_mtime)
    deltas = tuple(place / name for name in pointer.deltas)
    return Target(place / pointer.bundle, pointer.base, deltas, pointer.until)


def opened(target: Target, shared: SharedArm | None = None) -> Opened:
    """Open a bundle with its deltas, and ask it for a few answers.

    Args:
        shared: with other processes, whose arrays are mapped, also those of what is served already.

    Raises:
        ValueError: if a part is missing, damaged, or does not fit the others, or it does not answer as it should.
    """
    arrays = None if shared is None else shared.arrays(target.bundle, target.base)
    content, position = load_bundle(target.bundle, arrays), position_of(target.bundle)
    if position.base != target.base:
        raise ValueError(f"{target.bundle} is another bundle than the one that the pointer means: it was changed")
    if target.deltas:
        content, position = with_deltas(content, target.deltas, position, in_place=True)
    check_answers(content, None if target.deltas else target.bundle)
    if shared is not None:
        return_freed_memory()
    return Opened(target, content, position)


class Versions:
    """Watches a directory, and lets another bundle be served once it is there, has been opened and has answered.

    Args:
        place: a bundle, or the directory of a stream.
        first: what is served already.
        live: where it is served.
        control: whether the metrics about the model are of this one, not of another arm.
    """

    def __init__(
        self, place: Path, first: Opened, live: Live, instruments: Instruments, *, control: bool = True
    ) -> None:
        self.place, self.live, self._instruments, self._control = place, live, instruments, control
        self._now = _light(first)
        self._before: Opened | None = None
        # What was looked at last, good or not; not to be opened again until the directory wants something else.
        self._seen: Target | str = first.target
        self._changing = threading.Lock()
        self._stop = threading.Event()
        self._look_now = threading.Event()
        self._tell()
        self._thread = threading.Thread(target=self._watch, name="versions", daemon=True)
        self._thread.start()

    @property
    def now(self) -> Target:
        """What is served."""
        return self._now.target

    def look(self, *, again: bool = False) -> str:
        """Serve what the directory wants, if that is something else.

        Args:
            again: also if that was refused or rolled back before.

        Returns:
            `unchanged`, `swapped`, or why it was refused.
        """
        with self._changing:
            try:
                target = target_of(self.place)
            except (ValueError, OSError) as error:
                return self._refused(str(error), str(error), again)
            if target == self._now.target or (target == self._seen and not again):
                return "unchanged"
            self._seen = target
            try:
                self._serve(target)
            except (ValueError, OSError, RuntimeError) as error:
                return self._refused(target, str(error), True)
            self._instruments.swaps.labels("swapped").inc()
            log.info("serving %s", target.version)
            return "swapped"

    def roll_back(self) -> bool:
        """Serve what was served before the last swap; false if there is nothing. Calling it twice goes forth again.

        What was given up is not taken again, unless by `look(again=True)`, until the directory wants something else.
        """
        with self._changing:
            if self._before is None or self._before.content is None:
                return False
            self._swap(self._before)
            self._instruments.swaps.labels("rolled_back").inc()
            return True

    def look_soon(self) -> None:
        """Have the thread look now; for signals."""
        self._look_now.set()

    def stop(self) -> None:
        self._stop.set()
        self._look_now.set()
        self._thread.join()

    def _serve(self, target: Target) -> None:
        """Serve a target, and hold on to what was served. If it is that and more deltas, they are applied to a copy."""
        if not self._goes_on(target):
            self._swap(self._opened(target))
            return
        now, before = self._now, self._held()

        def newer(content: Funnel | Scorer) -> tuple[Funnel | Scorer, Position]:
            content, position = with_deltas(content, target.deltas[len(now.target.deltas) :], now.position)
            check_answers(content)
            return content, position

        self._note(before, Opened(target, *self.live.update(newer, target.version)))

    def _goes_on(self, target: Target) -> bool:
        """Whether a target is what is served, and more deltas."""
        now = self._now.target
        return (now.bundle, now.base) == target[:2] and target.deltas[: len(now.deltas)] == now.deltas

    def _swap(self, found: Opened) -> None:
        """Serve something else, and hold on to what was served."""
        assert found.content is not None
        before = self._held()
        self.live.replace(found.content, found.target.version)
        self._note(before, found)

    def _held(self) -> Opened:
        """What is served, with its content."""
        return self._now._replace(content=self.live.served.content)

    def _note(self, before: Opened, found: Opened) -> None:
        self._before, self._now = before, _light(found)
        self._tell()

    def _watch(self) -> None:
        while not self._stop.is_set():
            asked = self._look_now.wait(LOOK)
            self._look_now.clear()
            if not self._stop.is_set():
                try:
                    self._glance(asked)
                except Exception:
                    log.exception("%s could not be looked at", self.place)

    def _glance(self, asked: bool) -> None:
        """What the thread does every second, and when it is asked to."""
        if asked or (self.place / POINTER).is_file():
            self.look(again=asked)

    def _opened(self, target: Target) -> Opened:
        return opened(target)

    def _refused(self, seen: Target | str, reason: str, is_new: bool) -> str:
        reason = reason.splitlines()[0]
        if is_new or seen != self._seen:
            log.error("the new bundle is refused, the old one stays: %s", reason)
            self._instruments.swaps.labels("refused").inc()
        self._seen = seen
        return reason

    def _tell(self) -> None:
        if self._control:
            self._instruments.serve_model(self._now.target.version, self._now.target.until)


def _light(found: Opened) -> Opened:
    return found._replace(content=None) if isinstance(found.content, Funnel) else found
