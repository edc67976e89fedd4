"""What a teacher predicted of events, written down once for all its students."""

# Shapes: n events, T tasks.

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fullrank.data import atomic
from fullrank.training.lock import locked
from fullrank.transfer.embedding_log import LeakageError, read_about, whole_numbers
from fullrank.transfer.lookup import Ints

POINTER, FORMAT = "current.json", 1
Floats = npt.NDArray[np.float32]


class TeacherLabelLog:
    """Predictions in Parquet by event: per task a probability, with the teacher's version, its training cut-off and the
    time at which the event was scored.

    `current.json` lists the files that count, and is replaced in one step. An event that was scored twice has the
    prediction that came first.

    Args:
        path: the directory, made by the first append.
        tasks: names of labels; default those of the log that is there.

    Raises:
        KeyError: if a task is asked that the log has not.
        ValueError: if there is no log and no task is given.
    """

    def __init__(self, path: Path, tasks: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self._index: tuple[Ints, Ints, Floats] | None = None
        if (self.path / POINTER).exists():
            self._pointer = self._read()
        elif not tasks:
            raise ValueError(f"{self.path} has no labels of a teacher yet: expected at least one task")
        else:
            self._pointer = {"format": FORMAT, "tasks": list(tasks), "files": []}
        self.tasks = tuple(self._pointer["tasks"])
        self._require(tasks or ())

    @property
    def n_inferences(self) -> int:
        """Events that a teacher was asked about: each once."""
        return int(sum(file["rows"] for file in self._pointer["files"]))

    def append(
        self,
        event_ids: npt.ArrayLike,
        predictions: npt.ArrayLike,
        fm_version: str,
        fm_train_cutoff: int,
        scored_at: npt.ArrayLike,
        event_times: npt.ArrayLike | None = None,
    ) -> None:
        """Keep predictions, all or none.

        Args:
            event_ids: shape (n,), whole numbers.
            predictions: probabilities, shape (n, T).
            fm_train_cutoff: the teacher has learnt from nothing at or after this time, in microseconds.
            scored_at: when each could first be read, microseconds, shape (n,).
            event_times: if they are known, none may be before the cut-off.

        Raises:
            LeakageError: if an event is before the cut-off.
            ValueError: if a prediction is not in [0, 1]; says how many. Or if shapes differ.
        """
        event, scored = whole_numbers(event_ids, "event_ids"), whole_numbers(scored_at, "scored_at")
        label = np.asarray(predictions, np.float32)
        if label.shape != (len(event), len(self.tasks)) or len(scored) != len(event):
            raise ValueError(
                f"predictions have shape {label.shape} and scored_at {scored.shape}, expected "
                f"{(len(event), len(self.tasks))} and {event.shape}"
            )
        if bad := int((~((label >= 0) & (label <= 1))).sum()):
            raise ValueError(f"{bad} predictions of the teacher are NaN or outside [0, 1]")
        if event_times is not None:
            early = int((whole_numbers(event_times, "event_times") < fm_train_cutoff).sum())
            if early:
                raise LeakageError(
                    f'{early} events happened before the training cut-off {fm_train_cutoff} of version "{fm_version}": '
                    "the teacher may have learnt from them"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path, "an append"):
            if (self.path / POINTER).exists():
                self._pointer = self._read()
            name = f"{len(self._pointer['files']):06d}.parquet"
            columns = {"event_id": event, **dict(zip(self._columns, label.T, strict=True)), "scored_at": scored}
            about = {"fm_version": fm_version, "fm_train_cutoff": int(fm_train_cutoff)}
            table = pa.table(columns).replace_schema_metadata({key: str(value) for key, value in about.items()})
            partial = self.path / f".{name}"
            pq.write_table(table, partial, compression="zstd")
            atomic.replace(partial, self.path / name)
            files = [*self._pointer["files"], {"name": name, "rows": len(event), **about}]
            self._pointer = {**self._pointer, "files": files}
            atomic.write_text(self.path / POINTER, json.dumps(self._pointer, indent=1) + "\n")
        self._index = None

    def known(self, event_ids: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which events have been scored, shape (n,)."""
        events, _, _ = self._sorted()
        event = whole_numbers(event_ids, "event_ids")
        place = np.minimum(np.searchsorted(events, event), max(len(events) - 1, 0))
        return events[place] == event if len(events) else np.zeros(len(event), bool)

    def lookup(
        self, event_ids: npt.ArrayLike, tasks: Sequence[str] | None = None, as_of: npt.ArrayLike | None = None
    ) -> Floats:
        """Predictions, shape (n, T); NaN where there is none, or none by then.

        Args:
            tasks: which, in which order; default all.
            as_of: microseconds, shape (n,) or one for all.

        Raises:
            KeyError: if the teacher has no such task; says which it has.
        """
        places = self._require(self.tasks if tasks is None else tasks)
        events, scored, labels = self._sorted()
        event = whole_numbers(event_ids, "event_ids")
        found = np.full((len(event), len(places)), np.nan, np.float32)
        if len(events):
            place = np.minimum(np.searchsorted(events, event), len(events) - 1)
            there = events[place] == event
            if as_of is not None:
                there &= scored[place] <= np.asarray(as_of)
            found[there] = labels[place[there]][:, places]
        return found

    def coverage(self, event_ids: npt.ArrayLike, as_of: npt.ArrayLike | None = None) -> float:
        """Share of events that have a label, by then; NaN of none."""
        found = self.lookup(event_ids, self.tasks[:1], as_of)
        return float(np.isfinite(found).mean()) if len(found) else float("nan")

    def versions(self) -> dict[str, dict[str, int]]:
        """Training cut-off and events by version."""
        found: dict[str, dict[str, int]] = {}
        for file in self._pointer["files"]:
            about = found.setdefault(file["fm_version"], {"fm_train_cutoff": file["fm_train_cutoff"], "events": 0})
            about["events"] += file["rows"]
        return found

    @property
    def _columns(self) -> list[str]:
        return [f"prediction.{task}" for task in self.tasks]

    def _require(self, tasks: Sequence[str]) -> list[int]:
        for task in tasks:
            if task not in self.tasks:
                raise KeyError(f'the teacher of {self.path} has no task "{task}"; it has {", ".join(self.tasks)}')
        return [self.tasks.index(task) for task in tasks]

    def _sorted(self) -> tuple[Ints, Ints, Floats]:
        """Events, when they were scored, and their predictions, by event."""
        if self._index is None:
            tables = [pq.read_table(self.path / file["name"]) for file in self._pointer["files"]]
            if not tables:
                return np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, len(self.tasks)), np.float32)
            whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
            event, scored = whole["event_id"].to_numpy(), whole["scored_at"].to_numpy()
            label = np.stack([whole[name].to_numpy() for name in self._columns], 1)
            order = np.lexsort((scored, event))
            order = order[np.concatenate([[True], event[order][1:] != event[order][:-1]])]
            self._index = event[order], scored[order], label[order]
        return self._index

    def _read(self) -> dict[str, Any]:
        return read_about(self.path / POINTER, FORMAT, "list of a teacher's labels")
