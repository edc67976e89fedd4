"""What a teacher leaves behind as it goes through a log: labels and embeddings of each window before it learns it."""

# Shapes: n events, T binary labels.

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from fullrank.data import atomic
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.models import Ranker
from fullrank.training.arrivals import Replay
from fullrank.training.learner import batches_of
from fullrank.training.publishing import read_pointer
from fullrank.training.saving import load_model
from fullrank.training.stream import ROWS_AT_ONCE, Hook, Window
from fullrank.transfer.codec import MatryoshkaCodec
from fullrank.transfer.config import TransferConfig
from fullrank.transfer.embedding_log import EmbeddingLog
from fullrank.transfer.keys import event_columns
from fullrank.transfer.lookup import SECOND, Ints
from fullrank.transfer.tap import EmbeddingTap
from fullrank.transfer.teacher_labels import TeacherLabelLog

SNAPSHOTS, LABELS, EMBEDDINGS = "snapshots", "labels", "embeddings"
# Of a version: what the stream published, and the codec of its embeddings.
BUNDLE, CODEC = "bundle", "codec.safetensors"
# Windows before a version's cut-off, and most rows of them, that its codec is fitted to.
CODEC_WINDOWS, CODEC_ROWS = 5, 50_000


@dataclass(frozen=True)
class Snapshot:
    """A version of the teacher; it has learnt from nothing at or after `cutoff`, in seconds."""

    name: str
    cutoff: int
    place: Path


def check_keys(dataset: Dataset) -> None:
    """Raises:
    ValueError: if the schema lacks a key that labels and embeddings of events are filed under.
    """
    for key in ("request_id", "user_id", "timestamp"):
        if getattr(dataset.schema.keys, key) is None:
            raise ValueError(f"{dataset.path}: the schema names no {key}, and what a teacher says of an event needs it")


def first_window(dataset: Dataset, window: int) -> int:
    """Second at which the first window of a log begins."""
    column = pl.col(KEY_COLUMNS["timestamp"]).min()
    first = min(dataset.scan(split).select(column).collect().item() for split in dataset.splits if dataset.rows(split))
    return int(first) // window * window


class TeacherScorer(Hook):
    """Scores each window of the stream in which a teacher learns, before it learns it.

    Versions are copies of what the stream published, kept for good under `snapshots`. An event that a log has is not
    scored again, so that a call which was killed goes on where it was.

    Args:
        config: which versions there are, and what is logged.
        dataset: of the stream.
        stream: its directory.
        out: for snapshots, labels and embeddings.

    Attributes:
        n_inferences: events that a version was asked about in this call.
    """

    def __init__(self, config: TransferConfig, dataset: Dataset, stream: Path, out: Path) -> None:
        check_keys(dataset)
        self.config, self.dataset, self.stream, self.out = config, dataset, stream, out
        self.origin = first_window(dataset, config.window)
        self.n_inferences = 0
        tasks = [label.name for label in dataset.schema.labels if label.kind == "binary"]
        self.labels = {late: TeacherLabelLog(out / LABELS / str(late), tasks) for late in config.teacher.staleness}
        self.embeddings: EmbeddingLog | None = None
        if config.embeddings is not None:
            asked = config.embeddings
            with torch.device("meta"):  # a layer that is not there is found out now
                EmbeddingTap(config.teacher.model.build(dataset.schema), asked.layers)
            self.embeddings = EmbeddingLog(out / EMBEDDINGS, asked.dim, asked.bits, asked.prefix_dims)
        self.snapshots = sorted(
            (
                Snapshot(place.name, int(place.name.rpartition("-")[2]), place)
                for place in (out / SNAPSHOTS).glob("[!.]*")
            ),
            key=lambda snapshot: snapshot.cutoff,
        )
        self._models: dict[str, Ranker] = {}
        self._codecs: dict[str, MatryoshkaCodec] = {}

    def rows(self, window: Window, rows: pl.DataFrame) -> pl.DataFrame:
        self._snapshot()
        if rows.height and self.snapshots:
            rows = rows.sort(KEY_COLUMNS["timestamp"], maintain_order=True)
            self._score(window, rows)
        return rows

    def _snapshot(self) -> None:
        """Keep what is served now, if it is to be a version."""
        pointer = read_pointer(self.stream)
        if pointer is None:
            return
        teacher = self.config.teacher
        learnt = (pointer.until - self.origin) // self.config.window
        if self.snapshots:
            last = self.snapshots[-1]
            age = (pointer.until - last.cutoff) // self.config.window
            if teacher.refresh is None or age < teacher.refresh:
                return
        elif learnt < teacher.warm_up:
            return
        name = f"v{len(self.snapshots) + 1:04d}-{pointer.until}"
        place = self.out / SNAPSHOTS / name
        place.parent.mkdir(exist_ok=True)
        with atomic.new_directory(place) as partial:
            shutil.copytree(self.stream / pointer.bundle, partial / BUNDLE)
            if self.embeddings is not None and (not self.snapshots or not self._fixed):
                self._fit_codec(load_model(partial / BUNDLE), pointer.until).save(partial / CODEC)
        self.snapshots.append(Snapshot(name, pointer.until, place))

    def _fit_codec(self, model: Ranker, cutoff: int) -> MatryoshkaCodec:
        asked, window = self.config.embeddings, self.config.window
        assert asked is not None
        log, frames = Replay(self.dataset, window), []
        for begin in range(cutoff - CODEC_WINDOWS * window, cutoff, window):
            if log.next_slice(begin) == begin:
                frames.append(log.rows_of(begin)[0])
        tap = EmbeddingTap(model, asked.layers)
        rows = pl.concat(frames).tail(CODEC_ROWS)
        e_nI = torch.cat([tap(batch).embeddings_BE for batch in batches_of(rows, model.schema, ROWS_AT_ONCE)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.teacher.training.seed)
            return MatryoshkaCodec(e_nI.shape[1], asked.dim, asked.prefix_dims, asked.bits).fit(e_nI)

    @property
    def _fixed(self) -> bool:
        return self.config.embeddings is not None and self.config.embeddings.fixed

    def _score(self, window: Window, rows: pl.DataFrame) -> None:
        event, user, time = event_columns(rows)
        ready = time + self.config.teacher.delay * SECOND
        for late, log in self.labels.items():
            until = window.begin - (late - 1) * self.config.window
            old = [snapshot for snapshot in self.snapshots if snapshot.cutoff <= until]
            new = np.flatnonzero(~log.known(event))
            if not old or not len(new):
                continue
            version = old[-1]
            said = self._predictions(version, rows[new])
            log.append(event[new], said, version.name, version.cutoff * SECOND, ready[new], time[new])
            self.n_inferences += len(new)
        if self.embeddings is not None:
            version = self.snapshots[0] if self._fixed else self.snapshots[-1]
            self._embed(self.embeddings, version, rows, event, user, time, ready)

    def _predictions(self, version: Snapshot, rows: pl.DataFrame) -> np.ndarray:
        model = self._model(version)
        binary = [place for place, label in enumerate(model.schema.labels) if label.kind == "binary"]
        with torch.inference_mode():
            logits = [model(batch).logits_BT[:, binary] for batch in batches_of(rows, model.schema, ROWS_AT_ONCE)]
        said: np.ndarray = torch.sigmoid(torch.cat(logits)).numpy()
        return said

    def _embed(
        self, log: EmbeddingLog, version: Snapshot, rows: pl.DataFrame, event: Ints, user: Ints, time: Ints, ready: Ints
    ) -> None:
        """Log the embeddings of rows that are not there; an append is of a window whole, so its last row tells."""
        asked = self.config.embeddings
        assert asked is not None
        if version.name in log.versions:
            there = log.lookup(user[-1:], time[-1:] + 1, 1 << 20, fm_version=version.name)
            if event[-1] in there.event_ids[there.age == 1]:
                return
        if version.name not in self._codecs:
            self._codecs[version.name] = MatryoshkaCodec.load(version.place / CODEC)
        model = self._model(version)
        tap = EmbeddingTap(model, asked.layers)
        e_nI = torch.cat([tap(batch).embeddings_BE for batch in batches_of(rows, model.schema, ROWS_AT_ONCE)])
        codes = self._codecs[version.name].encode(e_nI)
        log.append(user, event, time, codes, ready, version.name, version.cutoff * SECOND)

    def _model(self, version: Snapshot) -> Ranker:
        if version.name not in self._models:
            if len(self._models) > 2 + len(self.labels):
                self._models.pop(next(iter(self._models)))
            self._models[version.name] = load_model(version.place / BUNDLE)
        return self._models[version.name]


def staleness_of(config: TransferConfig, student: str) -> int:
    """Of the labels that a student learns from."""
    own = config.students[student].staleness
    return config.teacher.staleness[0] if own is None else own
