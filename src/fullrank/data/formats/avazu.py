"""Avazu click-through rate: one CSV with the hour as YYMMDDHH, or a benchmark's CSV with anonymous fields."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl

from fullrank.data.formats.base import split_files, training_file
from fullrank.data.formats.delimited import delimited_chunks
from fullrank.data.formats.layout import text_layout
from fullrank.data.raw import RawChunk, check_columns, raw_columns
from fullrank.schema import Categorical, Keys, Label, Role, Schema

CATEGORIES: dict[str, Role] = {
    "C1": "context",
    "banner_pos": "context",
    "site_id": "context",
    "site_domain": "context",
    "site_category": "context",
    "app_id": "context",
    "app_domain": "context",
    "app_category": "context",
    "device_id": "user",
    "device_ip": "user",
    "device_model": "user",
    "device_type": "user",
    "device_conn_type": "context",
    **{f"C{place}": "item" for place in range(14, 22)},
}
COLUMNS = ("id", "click", "hour", *CATEGORIES)
FROM_HOUR = ("timestamp", "hour_of_day", "weekday", "is_weekend")
# The columns of the benchmark split Avazu_x1.
ANONYMOUS = ("label", *(f"feat_{place}" for place in range(1, 23)))
# As in the public benchmark's first Avazu setting: a value seen once shares the out-of-vocabulary row.
MIN_COUNT = 2
_OF = " of Avazu's format"


class Avazu:
    """The hour becomes the timestamp (read as UTC) and three categories: hour of the day, weekday (1 is Monday), and
    whether it is a weekend. Of files with a label and `feat_1` to `feat_22` (Avazu_x1), each field is a category."""

    name = "avazu"

    def default_schema(self, path: Path) -> Schema:
        names = text_layout(training_file(self, path)).named
        if "feat_1" in names:
            check_columns(path, ANONYMOUS, names, _OF)
            fields = [Categorical(name=name) for name in ANONYMOUS[1:]]
            return Schema(features=tuple(fields), labels=(Label(name="label"),))
        check_columns(path, COLUMNS, names, _OF)
        times = [Categorical(name=name) for name in FROM_HOUR[1:]]
        others = [Categorical(name=name, role=role, min_count=MIN_COUNT) for name, role in CATEGORIES.items()]
        keys = Keys(request_id="id", timestamp="timestamp")
        return Schema(features=(*times, *others), labels=(Label(name="click"),), keys=keys)

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        layout = text_layout(path)
        named = list(dict.fromkeys([*raw_columns(schema), *extra]))
        derived = [name for name in named if name in FROM_HOUR]
        wanted = [name for name in named if name not in FROM_HOUR]
        if derived:
            wanted.append("hour")
        check_columns(path, wanted, layout.named, _OF)
        chunks = delimited_chunks(path, layout, list(dict.fromkeys(wanted)), plain=frozenset({"id"}))
        return (_with_times(chunk, derived) for chunk in chunks)

    def parts(self, path: Path) -> dict[str, Path] | None:
        return split_files(path, (".csv",))


def _with_times(chunk: RawChunk, derived: list[str]) -> RawChunk:
    if not derived:
        return chunk
    hour = chunk.frame["hour"]
    texts = chunk.dictionaries.get("hour", hour)
    # polars reads an hour only with its minute; eight digits, so that a shorter text is not read as another day.
    parsed = (texts + "00").str.to_datetime("%y%m%d%H%M", time_unit="ms", strict=False)
    parsed = parsed.zip_with(texts.str.len_chars() == 8, pl.Series([None] * len(texts), dtype=parsed.dtype))
    # An hour that does not parse is shown in the report of bad rows, and must not pass for a number of seconds.
    seconds = parsed.dt.epoch("s").cast(pl.String)
    values = {
        "timestamp": seconds.zip_with(seconds.is_not_null(), "hour " + texts),
        "hour_of_day": parsed.dt.hour().cast(pl.String),
        "weekday": parsed.dt.weekday().cast(pl.String),
        "is_weekend": (parsed.dt.weekday() > 5).cast(pl.Int8).cast(pl.String),
    }
    columns = {name: values[name] for name in derived}
    if "hour" not in chunk.dictionaries:
        return replace(chunk, frame=chunk.frame.with_columns(**columns))
    frame = chunk.frame.with_columns(**dict.fromkeys(derived, hour))
    return replace(chunk, frame=frame, dictionaries={**chunk.dictionaries, **columns})
