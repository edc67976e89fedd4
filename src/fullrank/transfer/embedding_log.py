"""An append-only log of coded embeddings that is read as it was known at a time."""

# Shapes: n events, Q queries, C bytes of a code.

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fullrank.data import atomic
from fullrank.training.lock import locked
from fullrank.transfer.codec import check_prefix, code_bytes
from fullrank.transfer.lookup import NO_EVENT, SECOND, Block, Bytes, HistorySequence, Ints, spread

MANIFEST, FORMAT = "log.json", 1
# A lookup that says so gets events of every version; else one version is pinned.
ALL_VERSIONS = "*"
DAY = 86_400 * SECOND
# In memory, of an event beside its code: id, two times and the version.
BYTES_OF_COLUMNS = 26
_COLUMNS = ("key", "event_id", "event_time", "available_at", "code")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class LeakageError(ValueError):
    """A model would say something of an event that it has learnt from, or of one before such an event."""


class EmbeddingLog:
    """Codes of events in Parquet: a file for each append and day, a row group for each bucket of keys.

    What an append writes is there when its name is in `log.json`, which is replaced in one step; nothing that is there
    ever changes. So a lookup of the past is the same whatever is appended later, and in whatever order.

    Args:
        path: the directory, made by the first append.
        dim, bits, prefix_dims: of the codes; default those of the log that is there.
        buckets: groups of keys; a lookup holds one of them in memory.
        cache_bytes: buckets to keep in memory between lookups.

    Raises:
        ValueError: if there is a log of other codes, or none and `dim` is not given.
    """

    def __init__(
        self,
        path: Path,
        dim: int | None = None,
        bits: int = 4,
        prefix_dims: Iterable[int] = (),
        *,
        buckets: int = 16,
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.path, self.cache_bytes = Path(path), cache_bytes
        self._cache: dict[tuple[int, str], tuple[tuple[str, ...], Block]] = {}
        prefixes = sorted({*prefix_dims} if dim is None else {*prefix_dims, dim})
        asked = {"dim": dim, "bits": bits, "prefix_dims": prefixes, "buckets": buckets}
        if (self.path / MANIFEST).exists():
            self._manifest = self._read()
            found = {name: self._manifest[name] for name in ("dim", "bits")}
            if dim is not None and found != {"dim": dim, "bits": bits}:
                raise ValueError(
                    f"{self.path} has codes of dim {found['dim']} in {found['bits']} bits, not of {dim} in {bits}"
                )
        elif dim is None or dim < 1 or bits not in (4, 32) or buckets < 1:
            raise ValueError(f"{self.path} is no log yet: expected dim >= 1, bits of 4 or 32 and buckets >= 1")
        else:
            self._manifest = {"format": FORMAT, **asked, "versions": {}, "files": []}
        self.dim, self.bits = int(self._manifest["dim"]), int(self._manifest["bits"])
        self.prefix_dims = tuple(self._manifest["prefix_dims"])
        self.buckets, self.code_bytes = int(self._manifest["buckets"]), code_bytes(self.dim, self.bits)

    @property
    def versions(self) -> dict[str, int]:
        """Training cut-off, in microseconds, by version."""
        return dict(self._manifest["versions"])

    def __len__(self) -> int:
        """Events that were appended, those that were appended twice counted twice."""
        return sum(file["rows"] for file in self._manifest["files"])

    @property
    def nbytes(self) -> int:
        """Of the files."""
        return sum((self.path / file["name"]).stat().st_size for file in self._manifest["files"])

    # Writing

    def append(
        self,
        keys: npt.ArrayLike,
        event_ids: npt.ArrayLike,
        event_times: npt.ArrayLike,
        codes: Bytes,
        available_at: npt.ArrayLike,
        fm_version: str,
        fm_train_cutoff: int,
    ) -> None:
        """Keep events, all or none.

        Args:
            keys, event_ids: shape (n,), whole numbers.
            event_times: microseconds since 1970, in order.
            codes: shape (n, C), uint8.
            available_at: when each could first be read, microseconds.
            fm_version: of the model that embedded them.
            fm_train_cutoff: the model has learnt from nothing at or after this time.

        Raises:
            LeakageError: if an event is before the cut-off.
            ValueError: if times are not whole, not in order, or before the event; shapes differ; or the version is
                there with another cut-off.
        """
        key, event, time, available = (
            whole_numbers(values, name)
            for values, name in (
                (keys, "keys"),
                (event_ids, "event_ids"),
                (event_times, "event_times"),
                (available_at, "available_at"),
            )
        )
        if not len(key) == len(event) == len(time) == len(available) == len(codes):
            raise ValueError(
                f"{len(key)} keys, {len(event)} event ids, {len(time)} times, {len(available)} times of availability "
                f"and {len(codes)} codes: expected equally many"
            )
        if codes.dtype != np.uint8 or codes.shape[1:] != (self.code_bytes,):
            raise ValueError(
                f"codes are {codes.dtype} of shape {codes.shape}, expected uint8 of shape (n, {self.code_bytes}): "
                f"{self.dim} numbers of {self.bits} bits"
            )
        if (row := _first(np.diff(time) < 0)) is not None:
            raise ValueError(f"event_times are not in order: that of row {row + 1} is before that of row {row}")
        if (row := _first(available < time)) is not None:
            raise ValueError(f"row {row} is available at {available[row]}, before it happened at {time[row]}")
        if (row := _first(time < fm_train_cutoff)) is not None:
            raise LeakageError(
                f"row {row} happened at {time[row]}, before the training cut-off {fm_train_cutoff} of version "
                f'"{fm_version}": the model may have learnt from it'
            )
        if not fm_version or fm_version == ALL_VERSIONS:
            raise ValueError(f'"{fm_version}" is no name of a version')
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path, "an append"):
            if (self.path / MANIFEST).exists():
                self._manifest = self._read()
            known = self._manifest["versions"].get(fm_version, int(fm_train_cutoff))
            if known != int(fm_train_cutoff):
                raise ValueError(f'version "{fm_version}" has the cut-off {known}, not {fm_train_cutoff}')
            number = len({file["name"].partition("/")[2] for file in self._manifest["files"]})
            files = []
            for day in np.unique(time // DAY):
                rows = np.flatnonzero(time // DAY == day)
                name = f"day={datetime.fromtimestamp(int(day) * 86_400, UTC):%Y-%m-%d}/{number:06d}.parquet"
                columns = tuple(column[rows] for column in (key, event, time, available, codes))
                files.append(self._write(name, fm_version, columns))
            versions = {**self._manifest["versions"], fm_version: int(fm_train_cutoff)}
            self._manifest = {**self._manifest, "versions": versions, "files": [*self._manifest["files"], *files]}
            atomic.write_text(self.path / MANIFEST, json.dumps(self._manifest, indent=1) + "\n")

    def _write(self, name: str, version: str, columns: tuple[Any, ...]) -> dict[str, Any]:
        key, event, time, available, codes = columns
        bucket = bucket_of(key, self.buckets)
        order = np.lexsort((available, event, time, key, bucket))
        counts = np.bincount(bucket, minlength=self.buckets)
        place = self.path / name
        place.parent.mkdir(exist_ok=True)
        partial = place.with_name(f".{place.name}")
        moment = pa.timestamp("us", tz="UTC")
        with pq.ParquetWriter(partial, _schema(self.code_bytes), compression="zstd", use_dictionary=False) as writer:
            for rows in np.split(order, np.cumsum(counts)[:-1]):
                if len(rows):
                    packed = pa.py_buffer(np.ascontiguousarray(codes[rows]))
                    code = pa.FixedSizeBinaryArray.from_buffers(pa.binary(self.code_bytes), len(rows), [None, packed])
                    times = [pa.array(column[rows]).cast(moment) for column in (time, available)]
                    arrays = [pa.array(key[rows]), pa.array(event[rows]), *times, code]
                    writer.write_table(pa.Table.from_arrays(arrays, schema=writer.schema), row_group_size=len(rows))
        atomic.replace(partial, place)
        span = {"from": int(time.min()), "to": int(time.max())}
        return {"name": name, "version": version, "rows": len(key), **span, "buckets": counts.tolist()}

    # Reading

    def lookup(
        self,
        keys: npt.ArrayLike,
        as_of: npt.ArrayLike,
        max_len: int,
        window: str | int | None = None,
        *,
        exclude_event_ids: npt.ArrayLike | None = None,
        fm_version: str,
        prefix: int | None = None,
    ) -> HistorySequence:
        """The last events of each key strictly before a time that had arrived by then, as they were known.

        Args:
            keys, as_of: shape (Q,); times in microseconds.
            max_len: most events of a query.
            window: no older than this: "30d", "12h", or microseconds; None for any age.
            exclude_event_ids: an event that each query leaves out: its own.
            fm_version: whose codes; `ALL_VERSIONS` mixes them, and says which is which.
            prefix: numbers of a code to show.

        Raises:
            KeyError: if there is no such version; says which there are.
            ValueError: if `max_len` is negative, the window is no length of time, the prefix was not trained, or the
                shapes differ.
        """
        key, time, since, exclude = asked(keys, as_of, max_len, window, exclude_event_ids)
        if fm_version != ALL_VERSIONS and fm_version not in self._manifest["versions"]:
            known = ", ".join(self._manifest["versions"]) or "none"
            raise KeyError(f'no version "{fm_version}" in {self.path}; there are {known}')
        width = check_prefix(prefix, self.dim, self.prefix_dims)
        found: list[tuple[Ints, Ints, Block, Ints]] = []
        lengths = np.zeros(len(key), np.int64)
        bucket = bucket_of(key, self.buckets)
        span = (int(since.min()), int(time.max())) if len(time) else (0, 0)
        for number in np.unique(bucket):
            rows = np.flatnonzero(bucket == number)
            rows = rows[np.argsort(key[rows], kind="stable")]
            block = self._block(int(number), fm_version, span)
            excluded = None if exclude is None else exclude[rows]
            places, lengths[rows] = block.find(key[rows], time[rows], since[rows], excluded, max_len)
            found.append((rows, places, block, lengths[rows]))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        total = int(offsets[-1])
        codes = np.empty((total, self.code_bytes), np.uint8)
        age, event_ids = np.empty(total, np.int64), np.empty(total, np.int64)
        versions = np.empty(total, np.int16)
        while found:
            rows, places, block, counts = found.pop()
            to = spread(offsets[rows], counts)
            codes[to], event_ids[to] = block.codes[places], block.event_id[places]
            age[to], versions[to] = np.repeat(time[rows], counts) - block.time[places], block.version[places]
        names = tuple(self._manifest["versions"])
        return HistorySequence(codes, offsets, age, event_ids, versions, names, self.dim, self.bits, width)

    def events(self, fm_version: str) -> Iterator[tuple[Ints, Ints, Ints, Ints, Bytes]]:
        """Keys, ids, times, times of availability and codes of a version, bucket by bucket."""
        files = [file for file in self._manifest["files"] if file["version"] == fm_version]
        for bucket in range(self.buckets):
            chosen = [file for file in files if file["buckets"][bucket]]
            if chosen:
                key, event, time, available, _, codes = self._columns(chosen, bucket)
                yield key, event, time, available, codes

    def _block(self, bucket: int, version: str, span: tuple[int, int]) -> Block:
        """A bucket's events of a version: of all time if they may stay in memory, else of the days that are asked."""
        files = [file for file in self._manifest["files"] if version in (ALL_VERSIONS, file["version"])]
        chosen = [file for file in files if file["buckets"][bucket]]
        names = tuple(file["name"] for file in chosen)
        kept = self._cache.get((bucket, version))
        if kept is not None and kept[0] == names:
            return kept[1]
        keep = sum(file["rows"] for file in files) * (self.code_bytes + BYTES_OF_COLUMNS) <= self.cache_bytes
        if not keep:
            chosen = [file for file in chosen if file["to"] >= span[0] and file["from"] < span[1]]
        block = Block(*self._columns(chosen, bucket))
        if keep:
            self._cache[bucket, version] = names, block
        return block

    def _columns(self, files: list[dict[str, Any]], bucket: int) -> Iterator[Any]:
        order = list(self._manifest["versions"])
        parts = []
        for file in files:
            group = sum(1 for rows in file["buckets"][:bucket] if rows)
            with pq.ParquetFile(self.path / file["name"]) as stored:
                table = stored.read_row_group(group, columns=list(_COLUMNS), use_threads=False)
            numbers = [table.column(name).cast(pa.int64()).to_numpy() for name in _COLUMNS[:-1]]
            code = table.column("code").combine_chunks()
            code = code.chunk(0) if isinstance(code, pa.ChunkedArray) else code
            raw = np.frombuffer(code.buffers()[1], np.uint8)[code.offset * self.code_bytes :]
            version = np.full(table.num_rows, order.index(file["version"]), np.int16)
            parts.append((*numbers, version, raw[: table.num_rows * self.code_bytes].reshape(-1, self.code_bytes)))
        if not parts:
            empty = np.empty(0, np.int64)
            return iter((empty, empty, empty, empty, empty.astype(np.int16), np.empty((0, self.code_bytes), np.uint8)))
        return (np.concatenate(columns) for columns in zip(*parts, strict=True))

    def _read(self) -> dict[str, Any]:
        return read_about(self.path / MANIFEST, FORMAT, "log of embeddings")


def read_about(place: Path, number: int, what: str) -> dict[str, Any]:
    """What the JSON file of a log says.

    Raises:
        ValueError: if it is none, or not of the format of this number; names what it should be.
    """
    try:
        about: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        known = about["format"] == number
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{place} is no {what} of format {number}")
    return about


def asked(
    keys: npt.ArrayLike,
    as_of: npt.ArrayLike,
    max_len: int,
    window: str | int | None,
    exclude_event_ids: npt.ArrayLike | None,
) -> tuple[Ints, Ints, Ints, Ints | None]:
    """Keys, times, since when, and events to leave out, of the queries of a lookup.

    Raises:
        ValueError: as `EmbeddingLog.lookup`.
    """
    key, time = whole_numbers(keys, "keys"), whole_numbers(as_of, "as_of")
    exclude = None if exclude_event_ids is None else whole_numbers(exclude_event_ids, "exclude_event_ids")
    if not len(key) == len(time) == (len(key) if exclude is None else len(exclude)):
        raise ValueError(f"{len(key)} keys and {len(time)} times, expected one of each for a query")
    if max_len < 0:
        raise ValueError(f"max_len is {max_len}, expected 0 or more")
    since = np.full(len(time), NO_EVENT) if window is None else time - microseconds(window)
    return key, time, since, exclude


def bucket_of(keys: Ints, buckets: int) -> Ints:
    """The bucket of each key: neighbours are spread."""
    mixed = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    return (mixed % np.uint64(buckets)).astype(np.int64)


def microseconds(window: str | int) -> int:
    """A length of time: "30d", "12h", "90m", "5s", or microseconds.

    Raises:
        ValueError: if it is none, or negative.
    """
    if isinstance(window, str):
        found = re.fullmatch(r"(\d+)([smhd])", window)
        if found is None:
            raise ValueError(f'window is "{window}", expected a number and s, m, h or d, such as 30d')
        return int(found[1]) * _UNITS[found[2]] * SECOND
    if window < 0:
        raise ValueError(f"window is {window}, expected 0 or more")
    return int(window)


def whole_numbers(values: npt.ArrayLike, name: str) -> Ints:
    """One row of whole numbers.

    Raises:
        ValueError: if they are not; counts NaN.
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} have shape {array.shape}, expected one row")
    if array.dtype.kind == "f" and (bad := int((~np.isfinite(array)).sum())):
        raise ValueError(f"{name} have {bad} NaN or infinite values, expected whole numbers")
    if array.dtype.kind not in "iu" and len(array) and not (array.dtype.kind == "f" and (array == array.round()).all()):
        raise ValueError(f"{name} are {array.dtype}, expected whole numbers")
    return array.astype(np.int64)


def _first(bad: npt.NDArray[np.bool_]) -> int | None:
    places = np.flatnonzero(bad)
    return int(places[0]) if len(places) else None


def _schema(width: int) -> pa.Schema:
    moment = pa.timestamp("us", tz="UTC")
    types = (pa.int64(), pa.int64(), moment, moment, pa.binary(width))
    return pa.schema(list(zip(_COLUMNS, types, strict=True)))
