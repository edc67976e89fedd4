"""The log of a stream by the time of its events: a dataset that is replayed, or files that arrive one by one."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import polars as pl
from pydantic import BaseModel

from fullrank.data import atomic
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS, Encoders
from fullrank.data.forgotten import NobodyLeft
from fullrank.data.formats import open_format
from fullrank.data.formats.base import Sampled
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec
from fullrank.schema import Numeric, Schema
from fullrank.training.recipe import DataSpec, ImportSpec
from fullrank.training.stream_config import StreamConfig

TIME = KEY_COLUMNS["timestamp"]
INTAKE = "intake"


class Shard(NamedTuple):
    """A file of a dataset: its first and last second, and the slices that its rows lie in."""

    path: Path
    first: int
    last: int
    slices: frozenset[int]


class Piece:
    """The rows of one dataset by slices of event time. A row that came too late for its slice is in the first that was
    open when it came.

    Args:
        step: seconds of a slice.
        open_from: where the first slice begins that was open when these rows came; None if all were.
        until: later rows are refused.
    """

    def __init__(self, dataset: Dataset, step: int, open_from: int | None, until: int | None) -> None:
        self.dataset, self.step, self.open_from, self.until = dataset, step, open_from, until
        self.late = self.refused = self.rows = 0
        self.last = -(1 << 62)
        self._frames: dict[Path, pl.DataFrame] = {}
        self.shards = [
            shard for split in dataset.splits for path in dataset.shards(split) for shard in self._read(path)
        ]

    def _read(self, path: Path) -> Iterator[Shard]:
        times = pl.read_parquet(path, columns=[TIME], glob=False)[TIME]
        if times.null_count():
            raise ValueError(f"{path}: {times.null_count()} rows have no time, and a stream goes by time")
        known = times.to_numpy()
        if self.until is not None:
            self.refused += int((known > self.until).sum())
            known = known[known <= self.until]
        self.rows += len(known)
        if not len(known):
            return
        self.last = max(self.last, int(known.max()))
        begins = known // self.step * self.step
        if self.open_from is not None:
            self.late += int((begins < self.open_from).sum())
            begins = np.maximum(begins, self.open_from)
        yield Shard(path, int(known.min()), int(known.max()), frozenset(np.unique(begins).tolist()))

    @cached_property
    def slices(self) -> list[int]:
        """Where slices with rows begin, in order."""
        return sorted(set().union(*(shard.slices for shard in self.shards)))

    def rows_of(self, begin: int) -> tuple[pl.DataFrame, pl.DataFrame] | None:
        """The rows of a slice that were in time, and those that were late, each in the order of the dataset."""
        own = [shard for shard in self.shards if begin in shard.slices]
        if not own:
            return None
        frames = []
        for shard in own:
            if shard.path not in self._frames:
                self._frames[shard.path] = pl.read_parquet(shard.path, glob=False)
            frame = self._frames[shard.path]
            low = -(1 << 62) if begin == self.open_from else begin
            frame = frame.filter((pl.col(TIME) >= low) & (pl.col(TIME) < begin + self.step))
            frames.append(frame if self.until is None else frame.filter(pl.col(TIME) <= self.until))
        rows = pl.concat(frames)
        return rows.filter(pl.col(TIME) >= begin), rows.filter(pl.col(TIME) < begin)

    def forget(self, before: int) -> None:
        """Let go of files whose slices are over."""
        for shard in self.shards:
            if max(shard.slices) < before:
                self._frames.pop(shard.path, None)


class Log(Protocol):
    """Where the events of a stream come from.

    What is in a slice depends on the order in which files came and not on when: a stream that was killed finds the
    same.

    Attributes:
        encoders: of what was taken up so far.
        taken: how many files were.
    """

    encoders: Encoders
    taken: int

    def take(self) -> bool:
        """Take up the next file; False if there is none now."""

    def is_over(self, time: int) -> bool:
        """Whether events before this second are waited for no more."""

    def next_slice(self, begin: int) -> int | None:
        """Where the first slice from `begin` on that has rows begins."""

    def rows_of(self, begin: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The rows of a slice that were in time, in order of time, and those that were late."""

    def forget(self, before: int) -> None:
        """Let go of slices before this second: they are trained, and a checkpoint says so."""

    def counts(self) -> dict[str, int]:
        """Rows taken up, those refused, those left out because their users are to be forgotten, and how many of the
        first were late."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to know."""


class Replay:
    """A dataset, all parts of it, as if it happened now."""

    def __init__(self, dataset: Dataset, step: int) -> None:
        self._piece = Piece(dataset, step, None, None)
        self.encoders, self.taken = dataset.encoders, 1

    def take(self) -> bool:
        return False

    def is_over(self, time: int) -> bool:
        return True

    def next_slice(self, begin: int) -> int | None:
        return next((at for at in self._piece.slices if at >= begin), None)

    def rows_of(self, begin: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        rows = self._piece.rows_of(begin)
        assert rows is not None
        return rows[0].sort(TIME, maintain_order=True), rows[1]

    def forget(self, before: int) -> None:
        self._piece.forget(before)

    def counts(self) -> dict[str, int]:
        return {"rows": self._piece.rows, "refused": 0, "forgotten": 0, "late": 0}

    def state(self) -> dict[str, Any]:
        return {}


class _Entry(BaseModel):
    """What is written down of a file before it is imported.

    Attributes:
        file: its name.
        open_from, until: see `Piece`.
        columns: of it, with their kinds.
    """

    file: str
    open_from: int | None
    until: int
    columns: dict[str, str]


class Arrivals:
    """The files of a directory, each imported once with the encoders of the one before.

    Names that begin with `.` or `_` are left alone: write a file under such a name and rename it. So are files without
    rows.

    Args:
        place: where the imported files go; `<place>/<number>` until they are trained.
        start: a bundle whose encoders the first file is imported with.
        done: what `state` gave, of a stream that is resumed.

    Raises:
        ValueError: if the source cannot be read file by file.
    """

    def __init__(
        self, data: DataSpec, config: StreamConfig, place: Path, start: Path | None, done: dict[str, Any] | None
    ) -> None:
        if data.source is None or not data.source.path.is_dir():
            found = "nothing" if data.source is None else str(data.source.path)
            raise ValueError(f"stream.arrivals: data.source.path is {found}, expected a directory that files arrive in")
        self.data, self.source, self.config, self.place, self.start = data, data.source, config, place, start
        done = done or {"taken": 0, "files": [], "watermark": None, "columns": None, "counts": {}}
        self.taken: int = done["taken"]
        self.files: list[str] = done["files"]
        self.columns: dict[str, str] | None = done["columns"]
        self.watermark: int | None = done["watermark"]
        self._counts = {"rows": 0, "refused": 0, "forgotten": 0, "late": 0, **done["counts"]}
        self._pieces: dict[int, Piece] = {}
        place.mkdir(parents=True, exist_ok=True)
        atomic.clear_leftovers(place, "*", alone=True)
        numbers = self._numbers()
        for path in place.glob("*.json"):
            if int(path.stem) not in numbers:
                path.unlink()
        for number in numbers:
            if number <= self.taken:
                entry = self._entry(number)
                self._pieces[number] = Piece(self._dataset(number), config.step, entry.open_from, entry.until)
        if self.taken:
            self.encoders = self._dataset(self.taken).encoders
        elif start is not None:
            self.encoders = Encoders.load(start / "encoders")

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self.place.glob("*.json") if (self.place / path.stem).is_dir())

    def _entry(self, number: int) -> _Entry:
        return _Entry.model_validate_json((self.place / f"{number:06d}.json").read_text(encoding="utf-8"))

    def _dataset(self, number: int) -> Dataset:
        return Dataset.open(self.place / f"{number:06d}")

    def take(self) -> bool:
        number = self.taken + 1
        if number not in self._numbers() and not self._import(number):
            return False
        entry, dataset = self._entry(number), self._dataset(number)
        _check_schema(self.source.path / entry.file, dataset.schema)
        piece = self._pieces[number] = Piece(dataset, self.config.step, entry.open_from, entry.until)
        self.encoders = piece.dataset.encoders
        self.columns = self.columns or entry.columns
        self.files.append(entry.file)
        self.taken = number
        if piece.rows:
            self.watermark = max(piece.last, self.watermark if self.watermark is not None else piece.last)
        forgotten = dataset.forgotten or 0
        taken = {"rows": piece.rows, "refused": piece.refused, "forgotten": forgotten, "late": piece.late}
        for name, more in taken.items():
            self._counts[name] += more
        return True

    def _import(self, number: int) -> bool:
        known = set(self.files)
        found = sorted(path for path in self.source.path.iterdir() if path.is_file() and path.name not in known)
        file = next((path for path in found if not path.name.startswith((".", "_")) and not _is_empty(path)), None)
        if file is None:
            return False
        columns = _columns(self.source, file)
        like = self.place / f"{self.taken:06d}" if self.taken else self.start
        schema = None if like is None else Encoders.load(like / "encoders").schema
        _check_columns(file, columns, self.columns, schema)
        written = math.ceil(file.stat().st_mtime)
        entry = _Entry(file=file.name, open_from=self._open_from, until=written + self.config.skew, columns=columns)
        atomic.write_text(self.place / f"{number:06d}.json", entry.model_dump_json() + "\n")
        out = self.place / f"{number:06d}"
        if schema is None and self.source.schema_file is not None:
            schema = Schema.read(self.source.schema_file)
        try:
            import_dataset(
                self.source.format,
                file,
                out,
                schema=schema if like is None else None,
                split=SplitSpec(kind="none"),
                like=like,
                extend=like is not None and self.config.extend,
                keep=self.data.extra,
                max_bad=self.source.max_bad,
                overwrite=True,
                forgotten=self.source.forgotten_users(),
            )
        except NobodyLeft as error:
            self._counts["forgotten"] += error.rows
            self.files.append(file.name)
            return self._import(number)
        return True

    @property
    def _open_from(self) -> int | None:
        """Where the first open slice begins."""
        if self.watermark is None:
            return None
        return (self.watermark - self.config.lateness) // self.config.step * self.config.step

    def is_over(self, time: int) -> bool:
        return self.watermark is not None and time + self.config.lateness <= self.watermark

    def next_slice(self, begin: int) -> int | None:
        return min((at for piece in self._pieces.values() for at in piece.slices if at >= begin), default=None)

    def rows_of(self, begin: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        found = [rows for _, piece in sorted(self._pieces.items()) if (rows := piece.rows_of(begin)) is not None]
        timely, late = (_joined([rows[which] for rows in found]) for which in (0, 1))
        return timely.sort(TIME, maintain_order=True), late

    def forget(self, before: int) -> None:
        for number, piece in list(self._pieces.items()):
            piece.forget(before)
            if number < self.taken and (not piece.slices or piece.slices[-1] < before):
                del self._pieces[number]
                atomic.remove(self.place / f"{number:06d}")
                (self.place / f"{number:06d}.json").unlink()

    def state(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "files": list(self.files),
            "watermark": self.watermark,
            "columns": self.columns,
            "counts": dict(self._counts),
        }

    def counts(self) -> dict[str, int]:
        return dict(self._counts)


def _joined(frames: list[pl.DataFrame]) -> pl.DataFrame:
    """Frames of the same columns; a key that is a number in one file and text in another is text."""
    types = [frame.schema for frame in frames]
    mixed = {name for name in types[0] if len({schema[name] for schema in types}) > 1}
    keys = {name: pl.String() for name in mixed if name in KEY_COLUMNS.values()}
    return pl.concat([frame.cast(keys) for frame in frames], how="vertical_relaxed")  # type: ignore[arg-type]


def _is_empty(file: Path) -> bool:
    """Whether a file has no rows: no bytes, Parquet that says so, or a table of text with its head alone."""
    if file.suffix == ".parquet":
        with contextlib.suppress(pl.exceptions.PolarsError):  # the import says what is wrong
            return bool(pl.scan_parquet(file, glob=False).select(pl.len()).collect().item() == 0)
    if file.suffix in (".csv", ".tsv"):
        with file.open("rb") as lines:
            return sum(1 for _ in itertools.islice(lines, 2)) < 2
    return file.stat().st_size == 0


def _columns(source: ImportSpec, file: Path) -> dict[str, str]:
    """The columns of a file and the kinds of their values; none where the format says itself what they are."""
    opened = open_format(source.format)
    if not isinstance(opened, Sampled):
        return {}
    return {name: _kind(dtype) for name, dtype in opened.sample(file).schema.items()}


def _kind(dtype: pl.DataType) -> str:
    if isinstance(dtype, pl.List | pl.Array):
        return f"lists of {_kind(dtype.inner)}"  # type: ignore[arg-type]
    for kind, is_one in (
        ("integers", dtype.is_integer()),
        ("numbers", dtype.is_numeric()),
        ("times", dtype.is_temporal()),
    ):
        if is_one:
            return kind
    return {pl.String(): "text", pl.Null(): "nothing", pl.Boolean(): "truth values"}.get(dtype, str(dtype))


def _check_columns(file: Path, found: dict[str, str], before: dict[str, str] | None, schema: Schema | None) -> None:
    """Raises:
    ValueError: if a column is gone or new, or holds another kind of values than in the first file.
    """
    if before is None:
        return
    numeric = set()
    if schema is not None:
        numeric = {feature.name for feature in schema.features if isinstance(feature, Numeric)}
        numeric |= {label.name for label in schema.labels}
    for name, kind in before.items():
        if name not in found:
            raise ValueError(f'{file}: the column "{name}" of the files before is gone')
        both = {kind, found[name]}
        if len(both) > 1 and "nothing" not in both and not (both == {"integers", "numbers"} and name in numeric):
            raise ValueError(f'{file}: column "{name}" holds {found[name]}, and {kind} in the files before')
    for name in found:
        if name not in before:
            raise ValueError(f'{file}: column "{name}" is new: the files before do not have it')


def _check_schema(file: Path, schema: Schema) -> None:
    if schema.keys.timestamp is None:
        raise ValueError(f"{file}: the schema names no timestamp, and a stream goes by time")
    derived = [counter.name for counter in schema.counters] + [sequence.name for sequence in schema.histories]
    if derived:
        raise ValueError(
            f'{file}: the feature "{derived[0]}" is derived from earlier rows, which another file has: let the log '
            "carry it, or import the whole log and replay it (stream.arrivals: false)"
        )
