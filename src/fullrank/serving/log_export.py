"""What a server showed and what came of it as a log: the store's impressions joined with its feedback."""

from __future__ import annotations

import glob
import heapq
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from fullrank.data import atomic
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.forgotten import EVENTS, digest, forgotten_users, is_url
from fullrank.data.hashing import hash_text
from fullrank.data.scratch import Scratch
from fullrank.schema import EventNumber, Label, MultiCategorical, Numeric, Schema, Sequence
from fullrank.serving.sqlite import connected

# Seconds after an impression in which feedback counts as what came of it.
WINDOW = 86_400
ROWS_AT_ONCE = 4096
USER, ITEM, TIME = (KEY_COLUMNS[name] for name in ("user_id", "item_id", "timestamp"))
COUNTED = ("lists", "feedback", "outside", "forgotten")
# Where an exported file says how far it goes.
_METADATA = b"fullrank.export"


class Position(BaseModel):
    """How far a store was exported: the numbers of its last impression and its last event that were."""

    impressions: int = 0
    events: int = 0


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        rows: of the file.
        lists: that were shown.
        feedback: rows of feedback on no list that is known.
        labels: rows by label in which it is not 0.
        outside: events that came later after their list than the window.
        forgotten: events and lists left out, because the user was to be forgotten and came again.
        waiting: lists left for the next export.
    """

    rows: int
    lists: int
    feedback: int
    labels: dict[str, int]
    outside: int
    forgotten: int
    waiting: int


def export_log(
    store: Path | str,
    like: Path,
    out: Path,
    *,
    after: Path | None = None,
    window: int = WINDOW,
    wait: int | None = None,
    since: int | None = None,
    until: int | None = None,
    impressions_only: bool = False,
    overwrite: bool = False,
    now: int | None = None,
) -> Exported:
    """Write the impressions of a store, a row for each item that was shown, with the labels that feedback gave it.

    Columns are those of the schema that a log itself holds, with the features that the server judged by, and
    `propensity`, `slate`, `slot` (see `LogColumns`), `event_id` (one for each row), `impression_id`, `model_version`. A
    label is 1, or the number that feedback said last, if feedback names list and item by `impression_id` and `item_id`
    and came within `window`, else 0. Feedback on no list that is known is a row of its own, with a propensity of null
    and the features that it said.

    Args:
        store: directory of `fullrank serve --store`, or the URL of its Redis, which is copied first.
        like: a bundle or a dataset, whose schema names the columns.
        out: the Parquet file to make.
        after: what an earlier export wrote: begin where it ended.
        window: seconds.
        wait: what is younger, in seconds, is left for the next export; default `window`, when labels are final.
        since, until: seconds since 1970, the end excluded.
        impressions_only: without rows of feedback alone.
        now: seconds since 1970; default those of the clock.

    Raises:
        ValueError: if there is no store or schema, `out` exists, or `after` is no export.
    """
    schema, out = _schema_of(like), Path(out)
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already: choose another name or pass --overwrite")
    begin, columns = Position() if after is None else _position_of(after), _Columns(schema)
    cut = (int(time.time()) if now is None else now) - (window if wait is None else wait)
    cut = cut if until is None else min(cut, until)
    gone = forgotten_users(store)
    with _on_disk(store) as place, closing(connected(place / EVENTS)) as connection:
        try:
            connection.execute("BEGIN")  # one view of the store, whatever is written meanwhile
            end = Position(
                impressions=_last(connection, "impressions", begin.impressions, cut),
                events=_last(connection, "events", begin.events, cut),
            )
            log = _Log(connection, schema, window, gone)
            first = -(2**62) if since is None else since
            parts = [log.shown(begin.impressions, end.impressions, first)]
            if not impressions_only:
                parts.append(log.feedback(begin.events, end.events, first))
            rows = _write(out, columns, heapq.merge(*parts, key=lambda row: row[TIME]), end)
            (waiting,) = connection.execute(
                "SELECT COUNT(*) FROM impressions WHERE number > ?", (end.impressions,)
            ).fetchone()
        except sqlite3.Error as error:
            raise ValueError(f"{store} cannot be read as a store of impressions: {error}") from None
    labels = {label.name: log.labels[label.name] for label in schema.labels}
    return Exported(rows, labels=labels, waiting=waiting, **{name: log.counts[name] for name in COUNTED})


@contextmanager
def _on_disk(store: Path | str) -> Iterator[Path]:
    """The directory of a store; that of a copy for one in a Redis."""
    if not is_url(store):
        yield Path(store)
        return
    from fullrank.serving.redis_store import RedisStore

    with Scratch() as place:
        with closing(RedisStore(str(store))) as redis:
            redis.copy(place)
        yield place


class _Log:
    """Rows of a store: labels and features by column of the log, keys by their fixed names."""

    def __init__(self, connection: sqlite3.Connection, schema: Schema, window: int, forgotten: frozenset[str]) -> None:
        self.connection, self.schema, self.window, self.forgotten = connection, schema, window, forgotten
        self.counts: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()

    def shown(self, begin: int, end: int, since: int) -> Iterator[dict[str, Any]]:
        """A row for each item of the impressions behind the first number up to the second."""
        found = self.connection.execute(
            "SELECT request_id, user, time, version, features, items FROM impressions "
            "WHERE number > ? AND number <= ? AND time >= ? ORDER BY time, number",
            (begin, end, since),
        )
        for request_id, user, then, version, features, items in found:
            if self._is_forgotten(user):
                continue
            self.counts["lists"] += 1
            asker, came = json.loads(features), self._came_of(request_id, then)
            slate = hash_text(request_id) >> 1
            for slot, (item, propensity, described) in enumerate(json.loads(items)):
                labels = came.get(item, {})
                self._count(labels)
                yield {
                    **asker,
                    **described,
                    **labels,
                    USER: user,
                    ITEM: item,
                    TIME: then,
                    "propensity": propensity,
                    "slate": slate,
                    "slot": slot,
                    "event_id": f"{request_id}/{slot}",
                    "impression_id": request_id,
                    "model_version": version,
                }

    def _came_of(self, request_id: str, then: int) -> dict[str, dict[str, float]]:
        """Labels by item of the feedback on a list."""
        found: dict[str, dict[str, float]] = {}
        for item, at, labels in self.connection.execute(
            "SELECT item, time, labels FROM events WHERE impression = ? ORDER BY time, number", (request_id,)
        ):
            if at > then + self.window:
                self.counts["outside"] += 1
                continue
            own = found.setdefault(item, {})
            for label in self.schema.labels:
                value = json.loads(labels).get(label.name)
                if value is not None:
                    is_binary = label.kind == "binary"
                    own[label.name] = max(value, own.get(label.name, 0.0)) if is_binary else value
        return found

    def feedback(self, begin: int, end: int, since: int) -> Iterator[dict[str, Any]]:
        """A row for each event, behind the first number up to the second, on no list that is known."""
        names = {label.name for label in self.schema.labels}
        found = self.connection.execute(
            "SELECT number, user, item, time, labels, features, event_id, impression FROM events "
            "WHERE number > ? AND number <= ? AND time >= ? ORDER BY time, number",
            (begin, end, since),
        )
        for number, user, item, then, labels, features, event_id, impression in found:
            if self._was_shown(impression, item) or self._is_forgotten(user):
                continue
            self.counts["feedback"] += 1
            name = f"event/{number}" if event_id is None else event_id
            said = {label: value for label, value in json.loads(labels).items() if label in names}
            self._count(said)
            yield {
                **json.loads(features),
                **said,
                USER: user,
                ITEM: item,
                TIME: then,
                "slate": hash_text(name) >> 1,
                "slot": 0,
                "event_id": name,
                "impression_id": impression,
            }

    def _count(self, labels: Mapping[str, float]) -> None:
        self.labels.update(name for name, value in labels.items() if value)

    def _was_shown(self, request_id: str | None, item: str) -> bool:
        if request_id is None:
            return False
        found = self.connection.execute("SELECT items FROM impressions WHERE request_id = ?", (request_id,)).fetchone()
        return found is not None and any(item == shown for shown, *_ in json.loads(found[0]))

    def _is_forgotten(self, user: str | None) -> bool:
        if user is None or not self.forgotten or digest(user) not in self.forgotten:
            return False
        self.counts["forgotten"] += 1
        return True


def _last(connection: sqlite3.Connection, table: str, begin: int, cut: int) -> int:
    """The number before the first row that is too young; those behind it wait with it, so that none is lost."""
    sql = f"SELECT MIN(number) FROM {table} WHERE number > ? AND time >= ?"
    (young,) = connection.execute(sql, (begin, cut)).fetchone()
    if young is not None:
        return int(young) - 1
    (last,) = connection.execute(f"SELECT MAX(number) FROM {table}").fetchone()
    return max(begin, last or 0)


class _Columns:
    """The columns of an exported file: their types, and what makes a value of each from a row of `_Log`.

    Raises:
        ValueError: if the schema has a column of its own with a name that the log needs.
    """

    def __init__(self, schema: Schema) -> None:
        stored, keys = schema.stored, schema.keys
        self.types: dict[str, pa.DataType] = {}
        self.made: dict[str, Callable[[Mapping[str, Any]], Any]] = {}
        for feature in stored.features:
            if isinstance(feature, Sequence):
                for part in feature.fields:
                    is_number = isinstance(part, EventNumber)
                    self._add_list(feature.column(part), feature.separator, _number if is_number else _text)
            elif isinstance(feature, MultiCategorical):
                self._add_list(feature.name, feature.separator, _text)
            else:
                self._add(feature.name, feature.name, _number if isinstance(feature, Numeric) else _text)
        for label in schema.labels:
            self.types[label.name] = pa.string() if label.positive else pa.float64()
            self.made[label.name] = _label(label)
        for key, name in ((USER, keys.user_id), (ITEM, keys.item_id), ("event_id", keys.request_id)):
            if name is not None:
                self._add(name, key, _text)
        if keys.timestamp is not None:
            plain = schema.time_unit == "s" and schema.time_format is None
            self._add(keys.timestamp, TIME, int, pa.int64() if plain else pa.timestamp("s"))
        for market, otherwise in ((keys.weight, 1.0), (keys.bid, 0.0)):
            if market is not None:
                self._add(market, market, _number_or(otherwise), pa.float64())
        for name, kind, change in (
            ("propensity", pa.float64(), _number), ("slate", pa.int64(), int), ("slot", pa.int64(), int),
            ("event_id", pa.string(), _text), ("impression_id", pa.string(), _text),
            ("model_version", pa.string(), _text),
        ):  # fmt: skip
            if name in self.types and name != keys.request_id:
                raise ValueError(f'the schema has a column "{name}", and so has a log that is exported')
            self._add(name, name, change, kind)

    def _add(self, column: str, name: str, change: Callable[[Any], Any], kind: pa.DataType | None = None) -> None:
        self.types[column] = kind or (pa.float64() if change is _number else pa.string())
        self.made[column] = lambda row: change(row.get(name))

    def _add_list(self, name: str, separator: str, change: Callable[[Any], Any]) -> None:
        def made(row: Mapping[str, Any]) -> list[Any]:
            value = row.get(name) or []
            return [change(each) for each in (value.split(separator) if isinstance(value, str) else value)]

        self.types[name] = pa.list_(pa.float64() if change is _number else pa.string())
        self.made[name] = made


def _label(label: Label) -> Callable[[Mapping[str, Any]], Any]:
    def made(row: Mapping[str, Any]) -> Any:
        value = float(row.get(label.name, 0.0))
        if label.kind == "regression":
            return value
        if label.positive:
            return label.positive[0] if value >= 0.5 else label.negative[0] if label.negative else "0"
        return float(value >= 0.5)

    return made


def _text(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None else str(value)


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def _number_or(otherwise: float) -> Callable[[Any], float]:
    def number(value: Any) -> float:
        found = _number(value)
        return otherwise if found is None else found

    return number


def _write(out: Path, columns: _Columns, rows: Iterable[Mapping[str, Any]], end: Position) -> int:
    """Write the file, whole or not at all.

    Returns:
        how many rows.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.clear_leftovers(out.parent, glob.escape(out.name))
    schema = pa.schema(columns.types).with_metadata({_METADATA: end.model_dump_json()})
    count, rows = 0, iter(rows)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with atomic.naming(out):
            with pq.ParquetWriter(partial, schema, compression="zstd") as file:
                while some := list(islice(rows, ROWS_AT_ONCE)):
                    count += len(some)
                    made = {name: [make(row) for row in some] for name, make in columns.made.items()}
                    file.write_batch(pa.RecordBatch.from_pydict(made, schema=schema))
            atomic.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _schema_of(like: Path) -> Schema:
    place = Path(like) / "schema.json"
    if not place.is_file():
        raise ValueError(f"{like} is neither a bundle nor a dataset: it has no schema.json")
    return Schema.read(place)


def _position_of(file: Path) -> Position:
    try:
        return Position.model_validate_json((pq.read_schema(file).metadata or {})[_METADATA])
    except (OSError, pa.ArrowException, KeyError, ValidationError):
        raise ValueError(
            f"{file} is no log that `fullrank data export` wrote: it does not say how far it goes"
        ) from None
