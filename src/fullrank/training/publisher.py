"""The state of a stream, and how what it has learnt is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fullrank.training.deltas import position_of, write_delta
from fullrank.training.learner import Learner
from fullrank.training.publishing import BUNDLES, DELTAS, Pointer, prune, write_pointer


@dataclass
class State:
    """What a checkpoint says beside the optimisers' tensors.

    Attributes:
        windows: that are over; the number of the checkpoint.
        next: where the next window may begin.
        bundle: name of the one that the state is of, and is served.
        until: events up to this second are learnt.
        reason: why this bundle is served.
        parent: the checkpoint and the bundle of the model one window older, and until when it learnt.
        number: of the pointer.
        metrics_bytes: length of `metrics.jsonl`.
        trained, left_aside, rolled_back: rows: learnt by what is served, too few to learn from, and learnt by models
            that had to give way.
        log: what the log has to know.
    """

    windows: int = 0
    next: int = -(1 << 62)
    bundle: str | None = None
    until: int = 0
    reason: str = ""
    parent: tuple[int, str, int] | None = None
    number: int = 0
    metrics_bytes: int = 0
    trained: int = 0
    left_aside: int = 0
    rolled_back: int = 0
    log: dict[str, Any] | None = None
    identity: dict[str, Any] = field(default_factory=dict)


class Publisher:
    """Writes bundles and deltas, and lets the pointer point to them.

    Args:
        directory: of the stream.
        state: of the stream; the publisher writes down in it what is served.
        source: where the recipe comes from, for the bundles.
        with_deltas: whether deltas will follow a bundle.
    """

    def __init__(self, directory: Path, state: State, source: str, *, with_deltas: bool) -> None:
        self.directory, self.state, self.source, self.with_deltas = directory, state, source, with_deltas
        self.paths: list[str] = []

    def bundle(self, name: str) -> Path:
        """Where a bundle is."""
        return self.directory / BUNDLES / name

    def publish(self, learner: Learner, name: str, until: int, reason: str, record: Mapping[str, Any]) -> None:
        """Write a bundle, to be pointed to."""
        about = {"recipe": self.source, "window": record} if record else {"recipe": self.source}
        learner.save(self.bundle(name), about)
        self.serve(name, until, reason)
        self.remember(learner)

    def serve(self, name: str, until: int, reason: str) -> None:
        """Take note of the bundle that is to be pointed to."""
        state = self.state
        state.bundle, state.until, state.reason, state.number = name, until, reason, state.number + 1
        self.position, self.paths = position_of(self.bundle(name)), []

    def remember(self, learner: Learner) -> None:
        """Take note of the weights of the bundle, for the deltas after it."""
        assert self.state.bundle is not None
        self.position, self.paths = position_of(self.bundle(self.state.bundle)), []
        if self.with_deltas:
            self.weights = _copied(learner)

    def delta(self, learner: Learner, until: int) -> None:
        """Write what has changed since the last delta, and point to it."""
        state = self.state
        path = f"{DELTAS}/{state.bundle}/{self.position.number + 1:06d}"
        weights = _copied(learner)
        self.position = write_delta(
            self.directory / path, self.weights, weights, self.position, schema=learner.judged.schema, until=until
        )
        self.weights = weights
        self.paths.append(path)
        state.until, state.reason, state.number = until, "delta", state.number + 1
        self.point()

    def point(self) -> None:
        """Let the pointer point to what is served."""
        state = self.state
        pointer = Pointer(
            number=state.number,
            bundle=f"{BUNDLES}/{state.bundle}",
            base=self.position.base,
            deltas=tuple(self.paths),
            until=state.until,
            reason=state.reason,
        )
        write_pointer(self.directory, pointer)

    def prune(self, keep: int) -> None:
        """Remove bundles that are neither among the newest nor needed."""
        state = self.state
        assert state.bundle is not None
        needed = {state.bundle} if state.parent is None else {state.bundle, state.parent[1]}
        prune(self.directory, keep, needed)


def _copied(learner: Learner) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in learner.weights().items()}
