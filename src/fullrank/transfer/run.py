"""A recipe's teacher and students on a log: score, train, report."""

# Shapes: n rows, T binary labels.

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fullrank.data import atomic
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.training.recipe import Recipe
from fullrank.training.run import Progress, Report, defined, open_dataset
from fullrank.training.stream import Hook, StreamReport, Window, stream
from fullrank.transfer.config import TransferConfig
from fullrank.transfer.embedding_log import ALL_VERSIONS, DAY, EmbeddingLog
from fullrank.transfer.gain import Compared, Estimate
from fullrank.transfer.histories import AGE, CODES, ServedHistory, history_columns
from fullrank.transfer.keys import event_columns, kind_of
from fullrank.transfer.lookup import SECOND
from fullrank.transfer.scoring import EMBEDDINGS, LABELS, TeacherScorer, first_window, staleness_of
from fullrank.transfer.student import TEACHER, export_student
from fullrank.transfer.teacher_labels import TeacherLabelLog

TEACHING, STUDENTS, SERVED, PREDICTIONS, REPORT, SHARED = (
    "teacher",
    "students",
    "served",
    "predictions",
    "report.json",
    "shared.json",
)
# What the teacher's rows are called in a report.
TEACHER_ROW = "teacher"
# Told who learns, how many windows are done, and the last one's name.
Tell = Callable[[str, int, str], None]


class TransferColumns(Hook):
    """Adds to rows what a teacher left of them: its labels, as far as they are there at the end of the window, and each
    user's history of embeddings as it was known at the time of the row.

    Rows of windows that the first version has learnt from are left out.

    Args:
        config: of all.
        student: whose columns.
        dataset: of the stream.
        out: where the teacher left them.
    """

    def __init__(self, config: TransferConfig, student: str, dataset: Dataset, out: Path) -> None:
        self.config, self.own = config, config.students[student]
        self.begin = first_window(dataset, config.window) + config.teacher.warm_up * config.window
        self.tasks = [label.name for label in dataset.schema.labels if label.kind == "binary"]
        self.labels: TeacherLabelLog | None = None
        self.embeddings: EmbeddingLog | None = None
        if self.own.distillation is not None:
            self.labels = TeacherLabelLog(out / LABELS / str(staleness_of(config, student)))
            self.columns = (TEACHER,)
        if self.own.history is not None:
            self.embeddings = EmbeddingLog(out / EMBEDDINGS)
            self.columns = (*self.columns, CODES, AGE)

    def rows(self, window: Window, rows: pl.DataFrame) -> pl.DataFrame:
        if window.begin < self.begin:
            rows = rows.clear()
        event, user, time = event_columns(rows)
        if self.labels is not None:
            said_nT = self.labels.lookup(event, self.tasks, window.end * SECOND)
            rows = rows.with_columns(pl.Series(TEACHER, said_nT, dtype=pl.Array(pl.Float32, len(self.tasks))))
        if self.embeddings is not None and self.own.history is not None and self.config.embeddings is not None:
            days, fixed = self.config.embeddings.days, self.config.embeddings.fixed
            found = self.embeddings.lookup(
                user,
                time,
                self.own.history.length,
                None if days is None else days * DAY,
                exclude_event_ids=event,
                fm_version=next(iter(self.embeddings.versions)) if fixed else ALL_VERSIONS,
            )
            rows = rows.with_columns(history_columns(found, self.own.history.length))
        return rows


class Predictions(Hook):
    """Writes down what was said of each row before it was learnt, with its binary labels."""

    def __init__(self, dataset: Dataset, out: Path) -> None:
        self.out = out
        self.labels = [
            (place, label.name) for place, label in enumerate(dataset.schema.labels) if label.kind == "binary"
        ]
        out.mkdir(parents=True, exist_ok=True)

    def predicted(self, window: Window, rows: pl.DataFrame, logits_BT: Tensor) -> None:
        event, user, time = event_columns(rows)
        columns: dict[str, Any] = {"event": event, "user": user, "time": time // SECOND}
        for place, name in self.labels:
            columns[f"label.{name}"], columns[f"logit.{name}"] = rows[name], logits_BT[:, place].numpy()
        path = self.out / f"{window.name}.parquet"
        partial = path.with_name(f".{path.name}")
        pl.DataFrame(columns).write_parquet(partial)
        atomic.replace(partial, path)


def score(recipe: Recipe, config: TransferConfig, out: Path, source: str, tell: Tell | None = None) -> dict[str, Any]:
    """Let the teacher go through the log and leave labels and embeddings in `out`; goes on where a call was killed.

    Returns:
        Versions, events with a label, and inferences of this call.
    """
    out.mkdir(parents=True, exist_ok=True)
    _same_as_before(recipe, config, out)
    scorer = TeacherScorer(config, open_dataset(recipe.data), out / TEACHING, out)
    _stream(config.recipe_of_teacher(recipe), out / TEACHING, [scorer], source, TEACHING, tell)
    logs = {str(late): log for late, log in scorer.labels.items()}
    if not any(log.n_inferences for log in logs.values()):
        raise ValueError(f"{source}: the log ends before the teacher is asked: it has {config.teacher.warm_up} windows "
                         "or fewer, transfer.teacher.warm_up")  # fmt: skip
    return {
        "versions": next(iter(logs.values())).versions(),
        "labelled": {late: log.n_inferences for late, log in logs.items()},
        "inferences": scorer.n_inferences,
        "embeddings": None if scorer.embeddings is None else len(scorer.embeddings),
    }


def train(
    recipe: Recipe, config: TransferConfig, out: Path, source: str, tell: Tell | None = None
) -> dict[str, StreamReport]:
    """Let the students go through the log, with what `score` left in `out`; each is served from `served/<name>`.

    Raises:
        ValueError: if there is nothing that a teacher left.
    """
    if not (out / LABELS).is_dir():
        raise ValueError(f"{out} has no labels of a teacher: run `fullrank transfer score` first")
    _same_as_before(recipe, config, out)
    dataset, reports = open_dataset(recipe.data), {}
    (out / STUDENTS).mkdir(exist_ok=True)
    for name in config.students:
        hooks = [TransferColumns(config, name, dataset, out), Predictions(dataset, out / PREDICTIONS / name)]
        place = out / STUDENTS / name
        reports[name] = _stream(config.recipe_of(name, recipe), place, hooks, source, name, tell)
        pointer = reports[name].pointer
        assert pointer is not None
        history = _served(config, name, dataset, out)
        export_student(place / pointer.bundle, out / SERVED / name, history=history, overwrite=True)
    return reports


def _served(config: TransferConfig, student: str, dataset: Dataset, out: Path) -> ServedHistory | None:
    """What a server has to know of a student's history; None where it has none, or one of several versions."""
    if config.students[student].history is None or config.embeddings is None or not config.embeddings.fixed:
        return None
    columns = dataset.scan(dataset.splits[0]).collect_schema()
    users, events = (kind_of(columns[KEY_COLUMNS[key]]) for key in ("user_id", "request_id"))
    version = next(iter(EmbeddingLog(out / EMBEDDINGS).versions))
    return ServedHistory(version=version, days=config.embeddings.days, users=users, events=events)


def report(recipe: Recipe, config: TransferConfig, out: Path, source: str) -> dict[str, Any]:
    """How students and teacher did on the same rows, each predicted before it was learnt; also in `report.json`.

    Raises:
        ValueError: if a student has not been trained, or there is no row to compare on.
    """
    _same_as_before(recipe, config, out)
    dataset = open_dataset(recipe.data)
    begin = first_window(dataset, config.window)
    begin += (config.teacher.warm_up + config.measure_from) * config.window
    frames = {}
    for name in config.students:
        files = sorted((out / PREDICTIONS / name).glob("[!.]*.parquet"))
        if not files:
            raise ValueError(f"{out / PREDICTIONS / name} has no predictions: run `fullrank transfer train` first")
        frames[name] = (
            pl.concat([pl.read_parquet(file) for file in files]).filter(pl.col("time") >= begin).sort("event")
        )
    first = next(iter(frames.values()))
    if any(not frame["event"].equals(first["event"]) for frame in frames.values()):
        raise ValueError(f"{out / PREDICTIONS}: students have seen different rows: train them on one log, to its end")
    labels = [label.name for label in dataset.schema.labels if label.kind == "binary"]
    found: dict[str, Any] = {"rows": first.height, "labels": {name: _of(name, config, frames, out) for name in labels}}
    found["coverage"] = {
        str(late): TeacherLabelLog(out / LABELS / str(late)).coverage(first["event"].to_numpy())
        for late in config.teacher.staleness
    }
    atomic.write_text(out / REPORT, _as_json(found))
    return found


def _same_as_before(recipe: Recipe, config: TransferConfig, out: Path) -> None:
    """Raises:
    ValueError: if what is in `out` is of another log, teacher or kind of embeddings.
    """
    path, shared = out / SHARED, {"window", "teacher", "embeddings"}
    now = {"data": recipe.data.model_dump(mode="json"), **config.model_dump(mode="json", include=shared)}
    if not path.exists():
        atomic.write_text(path, json.dumps(now, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if before != now:
        changed = ", ".join(sorted(name for name in now if before.get(name) != now[name]))
        raise ValueError(f"{out} holds what another recipe left ({changed} differ): choose another --out")


def _of(label: str, config: TransferConfig, frames: dict[str, pl.DataFrame], out: Path) -> dict[str, Any]:
    first = next(iter(frames.values()))
    late = config.teacher.staleness[0]
    said = TeacherLabelLog(out / LABELS / str(late)).lookup(first["event"].to_numpy(), [label])[:, 0]
    kept = np.isfinite(said) & first[f"label.{label}"].is_not_null().to_numpy()
    if not kept.any():
        raise ValueError(f'no row of the label "{label}" has both a prediction of the teacher and an outcome')
    logits = {name: torch.from_numpy(frame[f"logit.{label}"].to_numpy()[kept]) for name, frame in frames.items()}
    logits[TEACHER_ROW] = torch.logit(torch.from_numpy(said[kept]), eps=1e-6)
    outcome = torch.from_numpy(first[f"label.{label}"].cast(pl.Float32).to_numpy()[kept])
    compared = Compared(logits, outcome, torch.from_numpy(first["user"].to_numpy()[kept]))
    rows: dict[str, Any] = {}
    for name in logits:
        row: dict[str, Any] = {metric: compared.metric(name, metric) for metric in ("ne", "auc", "calibration")}
        if name != config.reference:
            row["ne_minus_baseline"] = compared.minus(name, config.reference)
        if name not in (config.reference, TEACHER_ROW):
            try:
                row["transfer_ratio"] = compared.transfer_ratio(config.reference, name, TEACHER_ROW)
            except ValueError as error:
                row["transfer_ratio"] = None
                row["note"] = str(error)
        if name != TEACHER_ROW and config.students[name].distillation is not None:
            row["staleness"] = staleness_of(config, name)
        rows[name] = row
    gain = None if config.gain is None else compared.gain_report(**config.gain.model_dump())
    return {"rows": int(kept.sum()), "baseline": config.reference, "models": rows, "gain": gain}


def _stream(recipe: Recipe, place: Path, hooks: list[Hook], source: str, who: str, tell: Tell | None) -> StreamReport:
    def show(windows: int, name: str) -> None:
        if tell is not None:
            tell(who, windows, name)

    return stream(recipe, place, hooks=hooks, source=source, progress=show)


def _as_json(found: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, Estimate):
            return {"value": value.value, "interval": [value.low, value.high]}
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return value

    return json.dumps(defined(plain(found)), indent=1, allow_nan=False) + "\n"


def refuse(
    recipe: Recipe,
    dataset: Dataset,
    directory: Path | None,
    *,
    source: str,
    resume: bool = False,
    start: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """What `fullrank train` says of a recipe with a section `transfer`."""
    raise ValueError(f"{source} has a section transfer: run `fullrank transfer score`, `train` and `report` on it")
