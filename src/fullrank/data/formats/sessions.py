"""Sessions: who took which item, without a word of what was shown and left; and lists of items, one a line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

import polars as pl

from fullrank.data.formats.by_user import groups_for
from fullrank.data.formats.delimited import delimited_chunks
from fullrank.data.formats.event_log import ITEM, TIME, USER, EventLog, Known, event_rows, event_schema
from fullrank.data.formats.layout import Layout, text_layout
from fullrank.data.formats.lines import first_line, read_blocks
from fullrank.data.raw import LINE_COLUMN, RawChunk, no_rejected, rejected_table
from fullrank.data.spelling import as_text
from fullrank.data.times import parsed_times, seconds_of, unit_of
from fullrank.schema import MISSING_MARKERS, Schema

# Names of columns, without case, underscores and blanks.
_SESSIONS = ("sessionid", "session", "visitorid", "userid", "user")
_ITEMS = ("itemid", "item", "productid", "articleid", "newsid", "sku")
_TIMES = ("timestamp", "time", "ts", "datetime", "eventtime", "eventdate", "date")
_YOOCHOOSE = ("session_id", "timestamp", "item_id", "category")
_CATEGORIES = "product-categories.csv"
# Milliseconds since the session began, beside a date.
_OFFSET = "timeframe"
_SHOWN = 200


class Sessions:
    """Tables of events with a session (or user) and an item, as YooChoose's clicks, which have no header, Diginetica's
    views, and Retailrocket's events; or lines that each hold a session's items, separated by blanks or commas.

    Each event of a session after the first gives a row with label 1, and one with label 0 for an item that the session
    never has, drawn evenly from all items of the log with a fixed seed; both carry the session's earlier items. Events
    of one second keep their order in the file, or that of Diginetica's `timeframe`. A session's last event is test, the
    last but one validation, unless another split is asked for: `--split time` tests the latest.
    """

    name = "sessions"
    split_column = "split"
    held_out: Literal["users", "rows"] = "users"

    def default_schema(self, path: Path) -> Schema:
        log = _event_log(path)
        return event_schema(log.known, timed=log.timed)

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        return event_rows(_event_log(path), schema)

    def parts(self, path: Path) -> dict[str, Path] | None:
        return None


class _Table:
    """A table of events, and Diginetica's categories where they lie beside it."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path, self._layout = path, layout
        bare = {_bare(name): name for name in reversed(layout.named)}
        session, item, time = (
            next((bare[name] for name in names if name in bare), None) for names in (_SESSIONS, _ITEMS, _TIMES)
        )
        if session is None or item is None:
            raise ValueError(
                f"{path}: expected columns of a session (or user) and an item, such as session_id and item_id, or "
                f"lines of items alone; its columns are {', '.join(layout.named)[:_SHOWN]}"
            )
        self._session, self._item, self._time = session, item, time
        self._offset = bare.get(_OFFSET) if time is not None and _bare(time) in ("eventdate", "date") else None
        self._described = path.parent / _CATEGORIES
        self.timed = time is not None
        self.known: Known = "category_id" if self._described.is_file() and path != self._described else ""

    def events(self) -> Iterator[RawChunk]:
        given = (self._session, self._item, self._time, self._offset)
        wanted = list(dict.fromkeys(name for name in given if name is not None))
        for chunk in delimited_chunks(self._path, self._layout, wanted, plain=frozenset(wanted)):
            frame = chunk.numbered()
            lines = frame[LINE_COLUMN]
            columns = {USER: as_text(frame[self._session], MISSING_MARKERS)}
            columns[ITEM] = as_text(frame[self._item], MISSING_MARKERS)
            bad = {USER: columns[USER].is_null(), ITEM: columns[ITEM].is_null()}
            if self._time is not None:
                columns[TIME] = _seconds(frame[self._time])
                if self._offset is not None:
                    milliseconds = frame[self._offset].cast(pl.Int64, strict=False)
                    columns[TIME] = columns[TIME] + milliseconds // 1000
                bad[TIME] = columns[TIME].is_null()
            rejected: list[tuple[int, str, str, str]] = []
            good = pl.Series([True] * frame.height, dtype=pl.Boolean)
            stored = {USER: self._session, ITEM: self._item, TIME: self._time or ""}
            for name, wrong in bad.items():
                reason = "not a time" if name == TIME else "missing"
                found = frame.filter(wrong & good)
                texts = found[stored[name]].fill_null("").str.slice(0, _SHOWN).to_list()
                places = zip(found[LINE_COLUMN].to_list(), texts, strict=True)
                rejected += [(line, stored[name], reason, text) for line, text in places]
                good &= ~wrong
            events = pl.DataFrame([*(column.alias(name) for name, column in columns.items()), lines]).filter(good)
            yield RawChunk(events, pl.concat([chunk.rejected, rejected_table(rejected)]))

    def items(self, ids: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
        layout = text_layout(self._described)
        bare = {_bare(name): name for name in layout.named}
        names = [bare.get("itemid"), bare.get("categoryid")]
        if None in names:
            raise ValueError(f"{self._described}: expected the columns itemId and categoryId")
        wanted = [name for name in names if name is not None]
        found, rejected = [pl.DataFrame(schema={ITEM: pl.String, "category_id": pl.String})], [no_rejected()]
        for chunk in delimited_chunks(self._described, layout, wanted, plain=frozenset(wanted)):
            texts = [as_text(chunk.frame[name], MISSING_MARKERS) for name in wanted]
            found.append(pl.DataFrame({ITEM: texts[0], "category_id": texts[1]}).drop_nulls())
            rejected.append(chunk.rejected.with_columns((pl.col("column") + f" ({_CATEGORIES})").str.strip_chars()))
        items = pl.concat(found).filter(pl.col(ITEM).is_in(ids.implode()))
        return items.unique(ITEM, keep="first", maintain_order=True), pl.concat(rejected)

    def groups(self) -> int:
        return groups_for([self._path])


class _Lines:
    """Lines of items; a session is called by the number of its line."""

    timed = False
    known: Known = ""

    def __init__(self, path: Path) -> None:
        self._path = path

    def events(self) -> Iterator[RawChunk]:
        line = 1
        for block in read_blocks(self._path, quote=b""):
            text = pl.Series(ITEM, [part.decode("utf-8", "replace") for part in block.split(b"\n")], dtype=pl.String)
            numbers = pl.Series(LINE_COLUMN, range(line, line + len(text)), dtype=pl.Int64)
            line += block.count(b"\n")
            damaged = text.str.contains("\ufffd", literal=True)
            shown = zip(numbers.filter(damaged).to_list(), text.filter(damaged).str.slice(0, _SHOWN), strict=True)
            rejected = [(number, "", "not UTF-8", each) for number, each in shown]
            items = text.str.strip_chars(" \t\r,").str.replace_all(r"[\s,;|]+", " ").str.split(" ")
            frame = pl.DataFrame({USER: numbers.cast(pl.String), ITEM: items, LINE_COLUMN: numbers})
            frame = frame.filter(~damaged).explode(ITEM)
            yield RawChunk(
                frame.with_columns(as_text(frame[ITEM], MISSING_MARKERS)).drop_nulls(), rejected_table(rejected)
            )

    def items(self, ids: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
        raise AssertionError("nothing is known of these items")

    def groups(self) -> int:
        return groups_for([self._path])


def _event_log(path: Path) -> EventLog:
    """The layout of a file, or of the one file of sessions in a directory."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith((".", "_"))]
        named = [file for file in files if any(word in file.name.lower() for word in ("click", "view", "event"))]
        found = named or [file for file in files if file.name != _CATEGORIES]
        if len(found) != 1:
            shown = ", ".join(file.name for file in found)[:_SHOWN] or "none"
            raise ValueError(f"{path}: expected one file of clicks, views or events; found {shown}")
        path = found[0]
    elif not path.is_file():
        raise ValueError(f"{path} does not exist")
    fields = first_line(path).strip().split(",")
    if (
        len(fields) == len(_YOOCHOOSE)
        and fields[0].isdigit()
        and parsed_times(pl.Series(fields[1:2])).null_count() == 0
    ):
        return _Table(path, Layout(_YOOCHOOSE, ",", skipped=0))
    layout = text_layout(path)
    names = {_bare(name) for name in layout.named}
    if not names & set(_ITEMS) and (layout.values or path.name.lower().partition(".")[2].startswith("txt")):
        return _Lines(path)
    return _Table(path, layout)


def _seconds(values: pl.Series) -> pl.Series:
    text = as_text(values, MISSING_MARKERS)
    return seconds_of(text, unit_of(text) or "s")


def _bare(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "").partition(":")[0]
