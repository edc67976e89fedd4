"""MIND: impressions of news, each with the news that its user clicked before."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import polars as pl

from fullrank.data.arrow import as_series, list_array
from fullrank.data.formats.delimited import delimited_chunks
from fullrank.data.formats.layout import Layout
from fullrank.data.formats.lines import bare_name
from fullrank.data.raw import (
    LINE_COLUMN,
    RawChunk,
    check_columns,
    no_rejected,
    only_rejected,
    raw_columns,
    rejected_table,
)
from fullrank.data.splits import PARTS
from fullrank.data.values import lists_of
from fullrank.schema import Categorical, EventId, Keys, Label, Schema, Sequence

BEHAVIORS, NEWS = "behaviors.tsv", "news.tsv"
COLUMNS = ("impression_id", "user_id", "time", "history", "impressions")
NEWS_COLUMNS = ("item_id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
HISTORY = 50
_BLOCK_BYTES = 2 << 20
# Rows of a chunk; an impression shows some dozens of news.
_CHUNK_ROWS = 131_072
_PARTS = {"train": ("train",), "valid": ("valid", "dev"), "test": ("test",)}
_SHOWN = 200


class Mind:
    """A directory with `behaviors.tsv` and `news.tsv`, or one with such directories (`MINDsmall_train`, `..._dev`).

    Each news item shown in an impression is a row, with label `click` and the user's clicked news before it; the time
    is read as UTC. `impression_id` can be kept as a further column.
    """

    name = "mind"

    def default_schema(self, path: Path) -> Schema:
        parts = self.parts(path)
        _file(path if parts is None else parts["train"], BEHAVIORS)
        fields = (EventId(name="item", table="item_id"), EventId(name="category", table="category"))
        return Schema(
            features=(
                Categorical(name="user_id", role="user"),
                Categorical(name="item_id", role="item"),
                Categorical(name="category", role="item"),
                Categorical(name="subcategory", role="item"),
                Sequence(name="history", fields=fields, max_length=HISTORY),
            ),
            labels=(Label(name="click"),),
            keys=Keys(user_id="user_id", item_id="item_id", timestamp="timestamp"),
        )

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        available = ["impression_id", "user_id", "item_id", "timestamp", "click", "category", "subcategory"]
        available += ["history.item", "history.category"]
        wanted = list(dict.fromkeys([*raw_columns(schema), *extra]))
        check_columns(path, wanted, available)
        news, rejected = _news(path)
        if rejected.height:
            yield only_rejected(wanted, rejected)
        layout = Layout(COLUMNS, "\t", quote="", skipped=0)
        file = _file(path, BEHAVIORS)
        for chunk in delimited_chunks(file, layout, COLUMNS, plain=frozenset(COLUMNS), block_bytes=_BLOCK_BYTES):
            frame = chunk.numbered()
            shown = frame["impressions"].str.count_matches(r"\S+").cum_sum()
            first = 0
            for place in range(1, frame.height + 1):
                if place == frame.height or shown[place] - (shown[first - 1] if first else 0) > _CHUNK_ROWS:
                    yield _rows(frame[first:place], chunk.rejected if not first else no_rejected(), news)
                    first = place
            if not frame.height and chunk.rejected.height:
                yield only_rejected(wanted, chunk.rejected)

    def parts(self, path: Path) -> dict[str, Path] | None:
        if not path.is_dir() or any(bare_name(file) == BEHAVIORS for file in path.iterdir()):
            return None
        found: dict[str, Path] = {}
        for directory in sorted(path.iterdir()):
            if not directory.is_dir() or not any(bare_name(file) == BEHAVIORS for file in directory.iterdir()):
                continue
            part = next((part for part in PARTS if any(name in directory.name.lower() for name in _PARTS[part])), None)
            if part is not None:
                found.setdefault(part, directory)
        if "train" not in found:
            raise ValueError(f"{path}: expected {BEHAVIORS}, or directories with it called ..train, ..dev, ..test")
        return {part: found[part] for part in PARTS if part in found}


def _file(path: Path, name: str) -> Path:
    """A file of a directory, packed or not; `path` itself may be it."""
    directory = path if path.is_dir() else path.parent
    if not directory.is_dir():
        raise ValueError(f"{path} does not exist")
    found = next((file for file in sorted(directory.iterdir()) if bare_name(file) == name), None)
    if found is None:
        raise ValueError(f"{directory}: {name} is missing")
    return found


def _news(path: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Category and subcategory of each item, once, and the bad lines."""
    columns = list(NEWS_COLUMNS[:3])
    layout = Layout(NEWS_COLUMNS, "\t", quote="", skipped=0)
    good, bad = [], [no_rejected()]
    for chunk in delimited_chunks(_file(path, NEWS), layout, columns, plain=frozenset(columns)):
        good.append(chunk.frame.select(columns))
        bad.append(chunk.rejected.with_columns((pl.col("column") + f" ({NEWS})").str.strip_chars()))
    return pl.concat(good).unique("item_id", keep="first", maintain_order=True), pl.concat(bad)


def _rows(frame: pl.DataFrame, rejected: pl.DataFrame, news: pl.DataFrame) -> RawChunk:
    time = frame["time"].str.strip_chars().str.to_datetime("%m/%d/%Y %I:%M:%S %p", strict=False)
    items = frame["impressions"].str.extract_all(r"\S+")
    wrong = time.is_null()
    empty = items.list.len() == 0
    bad = [
        (line, column, reason, (value or "")[:_SHOWN])
        for mask, column, reason in (
            (wrong, "time", "not a time such as 11/11/2019 9:05:58 AM"),
            (empty & ~wrong, "impressions", "no news"),
        )
        for line, value in frame.filter(mask).select(LINE_COLUMN, column).iter_rows()
    ]
    good = ~(wrong | empty)
    frame, items, time = frame.filter(good), items.filter(good), time.filter(good)
    histories = lists_of(frame["history"].str.strip_chars(), " ").cut(HISTORY, newest=True)
    taken = as_series(histories.elements, "item_id")
    row = np.repeat(np.arange(frame.height), items.list.len().to_numpy())
    shown = items.explode()
    cut = shown.str.extract_groups(r"^(.*?)(?:-([01]))?$").struct.unnest()
    columns = {
        "user_id": frame["user_id"].gather(row),
        "impression_id": frame["impression_id"].gather(row),
        "timestamp": time.dt.epoch("s").gather(row),
        "item_id": cut.to_series(0),
        "click": cut.to_series(1),
        "history.item": pl.Series(row.astype(np.int32)),
        "history.category": pl.Series(row.astype(np.int32)),
        LINE_COLUMN: frame[LINE_COLUMN].gather(row),
    }
    known = taken.to_frame().join(news, on="item_id", how="left", maintain_order="left")["category"]
    lists = {
        "history.item": as_series(list_array(histories.offsets, taken), "history.item"),
        "history.category": as_series(list_array(histories.offsets, known), "history.category"),
    }
    table = pl.DataFrame(columns).join(news, on="item_id", how="left", maintain_order="left")
    return RawChunk(table, pl.concat([rejected, rejected_table(bad)]), dictionaries=lists)
