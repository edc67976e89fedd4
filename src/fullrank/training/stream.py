"""Training that never ends: each window of a log is predicted, then learnt, then published.

The state of a stream after a window is a checkpoint: which bundle it published, what the optimisers know, and where in
the log the next window begins. All else follows from it and from the log, so that a stream that is killed, at any
moment, goes on from its last window to what it would have come to: no event is learnt twice, or lost.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from fullrank.data import atomic
from fullrank.models import Ranker
from fullrank.registry import Registry
from fullrank.training import checkpoint, publishing
from fullrank.training.arrivals import INTAKE, Arrivals, Log, Replay
from fullrank.training.evaluation import PairedLosses, TaskMetrics, observe
from fullrank.training.learner import Learner, batches_of
from fullrank.training.lock import locked
from fullrank.training.publisher import Publisher, State
from fullrank.training.publishing import Pointer
from fullrank.training.recipe import Recipe, parse_recipe, read_recipe
from fullrank.training.run import defined, open_dataset
from fullrank.training.run_directory import PAGE

# The recipe, which says that the rest is a stream's; a line for each window; the states after windows; what
# else the learner needs.
STREAM, METRICS, CHECKPOINTS, OWN = "stream.json", "metrics.jsonl", "checkpoints", "learner"
# Where there is nothing new, a stream that follows looks again after so many seconds.
POLL_SECONDS = 1.0
# Checkpoints: of what is served, of the one before, and one more should the newest be damaged.
KEPT = 3
# A rollback wants a difference of more standard errors than this.
SURE = 2.0
# Rows of one forward pass when predicting.
ROWS_AT_ONCE = 8192
# Section of a recipe -> what learns.
LEARNERS: Registry[type[Learner]] = Registry(
    "learner",
    "fullrank.learners",
    {"model": "fullrank.training.learner:RankerLearner", "funnel": "fullrank.funnel.stream:FunnelLearner"},
)

# Told what is going on: how many windows are done, and until when.
Progress = Callable[[int, str], None]


class Window(NamedTuple):
    """Seconds of event time, the end excluded."""

    begin: int
    end: int

    @property
    def name(self) -> str:
        """Of its bundle; names sort by time."""
        return datetime.fromtimestamp(self.begin, UTC).strftime("%Y%m%dT%H%M%SZ")


class Hook:
    """What can watch a stream, and add to its rows. Methods are called in the order of the list.

    Attributes:
        columns: those it adds that the model reads from `Batch.extra`.
    """

    columns: tuple[str, ...] = ()

    def rows(self, window: Window, rows: pl.DataFrame) -> pl.DataFrame:
        """Encoded rows that are about to be predicted and learnt; what comes back may have further columns, such as a
        teacher's predictions, and must follow from window and rows alone: a stream that was killed asks again."""
        return rows

    def predicted(self, window: Window, rows: pl.DataFrame, logits_BT: Tensor) -> None:
        """What is served said this of rows of a window, before it learnt them. A stream that was killed says so
        again."""

    def published(self, window: Window, bundle: Path, record: Mapping[str, Any]) -> None:
        """A window is over, `bundle` is what is served now, and `record` is its line of `metrics.jsonl`. A stream that
        was killed just then says so again, or, killed after the checkpoint, not at all."""


@dataclass
class StreamReport:
    """What a call of `stream` did.

    Attributes:
        directory: of the stream.
        windows: a record of each window that ended in this call, as in `metrics.jsonl`.
        pointer: what is served; None if nothing has been published.
        counts: over the life of the stream: windows, and rows taken up, refused, of forgotten users, late, trained,
            left aside and rolled back.
        seconds: wall time of this call.
        judge: the label whose metric decides on rollbacks.
    """

    directory: Path
    windows: list[dict[str, Any]]
    pointer: Pointer | None
    counts: dict[str, int]
    seconds: float
    judge: str = ""

    def summary(self) -> dict[str, Any]:
        """As JSON has it."""
        pointer = None if self.pointer is None else self.pointer.model_dump(mode="json")
        about = {"directory": str(self.directory), "current": pointer, "counts": self.counts, "seconds": self.seconds}
        summary: dict[str, Any] = defined({**about, "windows": self.windows})
        return summary


def stream(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    directory: Path,
    *,
    start: Path | None = None,
    follow: bool = False,
    hooks: Sequence[Hook] = (),
    progress: Progress | None = None,
    source: str | None = None,
    page: Callable[[Path, str], str] | None = None,
) -> StreamReport:
    """Go through a log window by window, from where the last call in the same directory ended.

    Args:
        recipe: with a section `model` or `funnel`, and `stream`.
        directory: for bundles, deltas, `current.json`, checkpoints and metrics.
        start: a bundle to go on from, in the first call.
        follow: wait for further files for ever; else end when all windows that are over are done.
        hooks: see `Hook`.
        page: what makes `report.html`, of the directory and the label that is judged by.

    Raises:
        ValueError: if the recipe is wrong, another one than the stream began with, another process is at a stream
            there, or the log changes its columns; what is served stays.
    """
    source = source or ("recipe" if isinstance(recipe, Recipe | Mapping) else str(recipe))
    if isinstance(recipe, Mapping):
        recipe = parse_recipe(dict(recipe), source)
    elif not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe))
    if recipe.section not in LEARNERS:
        raise ValueError(f'{source}: a recipe with a section "{recipe.section}" cannot be streamed')
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    begin = time.perf_counter()
    found = [path for path in directory.iterdir() if not path.name.startswith(".")] if directory.is_dir() else []
    if found and not (directory / STREAM).exists():
        raise ValueError(f"{directory} was not made by a stream: choose another --out")
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory, "a stream"):
        running = _Stream(recipe, directory, start, hooks, progress, source)
        try:
            running.go(follow)
        finally:
            if page is not None and running.records:
                atomic.write_text(directory / PAGE, page(directory, running.judge))
    return StreamReport(
        directory,
        running.records,
        publishing.read_pointer(directory),
        running.counts(),
        time.perf_counter() - begin,
        running.judge,
    )


class _Stream:
    """The state of one call of `stream`."""

    def __init__(
        self,
        recipe: Recipe,
        directory: Path,
        start: Path | None,
        hooks: Sequence[Hook],
        progress: Progress | None,
        source: str,
    ) -> None:
        self.recipe, self.directory, self.hooks = recipe, directory, hooks
        self.progress, self.source, self.config = progress, source, recipe.stream
        self.records: list[dict[str, Any]] = []
        self.judge = ""
        self.learner: Learner | None = None
        self.window: Window | None = None
        self.reached = 0
        publishing.clear_leftovers(directory)
        checkpoint.clear_leftovers(directory / CHECKPOINTS, alone=True)
        identity = json.loads(recipe.model_dump_json(exclude={"threads", "imports"}))
        found = checkpoint.latest(directory / CHECKPOINTS)
        if found is None and checkpoint.list_steps(directory / CHECKPOINTS):
            raise ValueError(
                f"{directory / CHECKPOINTS}: every checkpoint is damaged: stream anew in another directory"
            )
        self.state = State(identity=identity) if found is None else State(**found.state)
        if self.state.identity != identity:
            changed = sorted(key for key in identity if self.state.identity.get(key) != identity[key])
            raise ValueError(
                f"{directory} holds a stream of another recipe ({', '.join(changed)} differ): go on with the same one, "
                "or choose another --out and begin there --from the current bundle"
            )
        self.publisher = Publisher(directory, self.state, source, with_deltas=self.config.delta is not None)
        atomic.write_text(directory / STREAM, recipe.model_dump_json(indent=2) + "\n")
        self._truncate_metrics()
        self.log = self._open_log(start)
        added = tuple(column for hook in hooks for column in hook.columns)
        if added:
            data = recipe.data.model_copy(update={"extra": (*recipe.data.extra, *added)})
            self.recipe = recipe.model_copy(update={"data": data})
        self.start, self.forget_before = start, self.state.next
        if found is not None:
            assert self.state.bundle is not None
            self.learner = self._learner(None)
            self.learner.load(self.publisher.bundle(self.state.bundle), found.tensors())
            self.publisher.remember(self.learner)
            self._tidy()

    def _open_log(self, start: Path | None) -> Log:
        place = self.directory / INTAKE
        if self.config.arrivals:
            return Arrivals(self.recipe.data, self.config, place, start, self.state.log)
        dataset = open_dataset(self.recipe.data)
        if dataset.schema.keys.timestamp is None:
            raise ValueError(f"{dataset.path}: the schema names no timestamp, and a stream goes by time")
        return Replay(dataset, self.config.step)

    def _truncate_metrics(self) -> None:
        """Forget what was written down of a window whose end a kill prevented."""
        path = self.directory / METRICS
        if path.exists() and path.stat().st_size > self.state.metrics_bytes:
            with path.open("r+b") as file:
                file.truncate(self.state.metrics_bytes)

    def counts(self) -> dict[str, int]:
        state = self.state
        learnt = {"trained": state.trained, "left_aside": state.left_aside, "rolled_back": state.rolled_back}
        return {"windows": state.windows, **learnt, **self.log.counts()}

    # The loop

    def go(self, follow: bool) -> None:
        while True:
            self._through_what_is_over()
            if self.log.take():
                continue
            if not follow:
                return
            time.sleep(POLL_SECONDS)

    def _through_what_is_over(self) -> None:
        """Do every slice, and end every window, that no event is waited for any more."""
        if self.learner is None:
            if not self.log.taken:
                return
            self._begin()
        step = self.config.step
        while True:
            at = self.log.next_slice(self.state.next if self.window is None else self.reached)
            if self.window is not None and (at is None or at >= self.window.end):
                if not self.log.is_over(self.window.end):
                    return
                self._end_window()
                continue
            if at is None or not self.log.is_over(at + step):
                return
            if self.window is None:
                self._begin_window(
                    Window(at - at % self.config.window, at - at % self.config.window + self.config.window)
                )
            self._slice(at)
            self.reached = at + step

    def _learner(self, start: Path | None) -> Learner:
        kind = LEARNERS[self.recipe.section]
        return kind.begin(self.recipe, self.log.encoders, start, self.source, self.directory / OWN)

    def _begin(self) -> None:
        self.learner = self._learner(self.start)
        if self.start is not None:
            self.publisher.publish(self.learner, "0-start", 0, f"started from {self.start.name}", {})
            self._commit()

    # A window

    def _begin_window(self, window: Window) -> None:
        assert self.learner is not None
        self.window, self.reached, self.slices = window, window.begin, list[int]()
        self.deltas, self.timely, self.late = 0, 0, 0
        state = self.state
        self.trained_before, self.encoders = state.trained, self.log.encoders
        # What the window is learnt on top of, as the last checkpoint has it.
        self.base = None if state.bundle is None else (state.windows, state.bundle, state.until)
        grew = self.learner.grow(self.encoders)
        # What deltas may be for. They are between models of the same tables.
        self.has_base = state.bundle is not None and (not grew or self.learner.is_whole)
        if grew and self.config.delta is not None and self.has_base:
            self.publisher.publish(self.learner, f"{window.name}-ids", state.until, "new ids", {})
            self.publisher.point()
        labels = self.learner.judged.schema.labels
        self.judge, self.paired = labels[0].name, PairedLosses(labels[0])
        self.parent: Ranker | None = None
        if state.parent is not None:
            self.parent = self.learner.opened(self.publisher.bundle(state.parent[1]))
        self.metrics = [TaskMetrics(labels) for _ in range(2)]

    def _slice(self, at: int) -> None:
        """Predict the events of a slice, with what is served and with the model one window older. With deltas, learn
        them and publish; without, a slice is the window, and is learnt when what is served has been judged."""
        assert self.window is not None
        timely, late = self.held = self._rows(at)
        self.slices.append(at)
        self.timely, self.late = self.timely + timely.height, self.late + late.height
        assert self.learner is not None
        if self.state.bundle is not None and timely.height:
            served = self._observe(self.learner.judged, timely, self.metrics[0])
            for hook in self.hooks:
                hook.predicted(self.window, timely, served)
            if self.parent is not None:
                older = self._observe(self.parent, timely, self.metrics[1])
                labels = torch.from_numpy(timely[self.judge].fill_null(math.nan).to_numpy().copy())
                self.paired.update(served[:, 0], older[:, 0], labels)
        if self.config.delta is not None:
            self._learn(at, pl.concat([timely, late]))
            if self.has_base:
                self.publisher.delta(self.learner, at + self.config.step)
                self.deltas += 1

    def _rows(self, at: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        assert self.window is not None
        timely, late = self.log.rows_of(at)
        for hook in self.hooks:
            timely, late = hook.rows(self.window, timely), hook.rows(self.window, late)
        return timely, late

    def _observe(self, model: Ranker, rows: pl.DataFrame, metrics: TaskMetrics) -> Tensor:
        return observe(model, batches_of(rows, model.schema, ROWS_AT_ONCE, self.recipe.data.extra), metrics)

    def _learn(self, at: int, rows: pl.DataFrame) -> None:
        assert self.learner is not None
        seed = (self.recipe.training.seed * 1_000_003 + at // self.config.step) % (1 << 31)
        aside = self.learner.learn(rows, seed)
        self.state.left_aside += aside
        self.state.trained += rows.height - aside

    def _end_window(self) -> None:
        assert self.window is not None and self.learner is not None
        window, state = self.window, self.state
        found, older = (self._computed(metrics) for metrics in self.metrics)
        reason = self._misstep(found, older)
        compared = {"metrics": older, "standard_errors": self.paired.standard_errors}
        record: dict[str, Any] = {
            "window": window.name,
            "begin": window.begin,
            "end": window.end,
            "empty_before": max(0, window.begin - state.next) // self.config.window if state.windows else 0,
            "rows": self.timely,
            "late": self.late,
            "served": state.bundle,
            "metrics": found,
            "older": None if state.parent is None else {"bundle": state.parent[1], **compared},
            "rolled_back": reason,
            "deltas": self.deltas,
            "published": window.name,
        }
        parent = self.base
        if reason is not None:
            parent = state.parent
            self._roll_back(reason)
        if self.config.delta is None:
            self._learn(self.slices[0], pl.concat(self.held))
        elif reason is not None:
            # What has been learnt of this window went into the model that gave way.
            for at in self.slices:
                self._learn(at, pl.concat(self._rows(at)))
        self.learner.end_window(window.begin)
        record = defined(record)
        self.publisher.publish(self.learner, window.name, window.end, f"window {window.name}", record)
        state.windows, state.next, state.parent = state.windows + 1, window.end, parent
        with (self.directory / METRICS).open("ab") as file:
            file.write((json.dumps(record, allow_nan=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            state.metrics_bytes = file.tell()
        self._commit()
        self.records.append(record)
        self.window = None
        for hook in self.hooks:
            hook.published(window, self.publisher.bundle(window.name), record)
        if self.progress is not None:
            self.progress(state.windows, window.name)

    def _computed(self, metrics: TaskMetrics) -> dict[str, dict[str, float]]:
        """Of the labels that the window has."""
        found = {}
        for label in metrics.labels:
            with contextlib.suppress(ValueError):  # there is no row
                found[label.name] = metrics.of(label)
        return found

    def _misstep(
        self, found: Mapping[str, Mapping[str, float]], older: Mapping[str, Mapping[str, float]]
    ) -> str | None:
        """Why what is served is to give way to the model one window older; None if it is not."""
        if self.config.rollback is None or self.judge not in found or self.judge not in older:
            return None
        metric = "ne" if "ne" in found[self.judge] else "mse"
        new, old = found[self.judge][metric], older[self.judge][metric]
        if not (new > old * (1 + self.config.rollback) and self.paired.standard_errors > SURE):
            return None
        assert self.state.parent is not None
        name = {"ne": "NE", "mse": "squared error"}[metric]
        return (
            f'{name} of "{self.judge}" is {new:.5f}, and {old:.5f} of {self.state.parent[1]}: more than '
            f"{self.config.rollback:.2%} worse, by {self.paired.standard_errors:.1f} standard errors"
        )

    def _roll_back(self, reason: str) -> None:
        """Serve the older model again, and go on from it."""
        state = self.state
        assert state.parent is not None and self.learner is not None
        number, bundle, until = state.parent
        found = checkpoint.of_step(self.directory / CHECKPOINTS, number)
        self.publisher.serve(bundle, until, f"rolled back: {reason}")
        self.publisher.point()
        self.learner.load(self.publisher.bundle(bundle), found.tensors())
        self.learner.grow(self.encoders)
        state.rolled_back += self.trained_before - found.state["trained"]
        state.trained, state.left_aside = found.state["trained"], found.state["left_aside"]

    def _commit(self) -> None:
        """Make what was done last: from here on it is not done again."""
        assert self.learner is not None and self.state.bundle is not None
        state = self.state
        state.log = self.log.state()
        protect = set() if state.parent is None else {state.parent[0]}
        place = self.directory / CHECKPOINTS
        checkpoint.write(place, state.windows, self.learner.state(), vars(state), keep=KEPT, protect=protect)
        self._tidy()

    def _tidy(self) -> None:
        """Point to what is served, and remove what is not needed for it any more."""
        self.publisher.point()
        self.publisher.prune(self.config.keep)
        # A window longer than it seems needed: should the checkpoint be damaged, the one before does.
        self.log.forget(self.forget_before)
        self.forget_before = self.state.next
