"""The layouts in which Amazon's reviews circulate: who took which item in which order, and what the items are."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from fullrank.data.formats.by_user import groups_for
from fullrank.data.formats.event_log import ITEM, TIME, USER, EventLog, Known
from fullrank.data.formats.json_lines import json_chunks, json_integer, json_text
from fullrank.data.formats.lines import first_line, read_blocks
from fullrank.data.formats.parquet import ParquetLog
from fullrank.data.raw import LINE_COLUMN, RawChunk, no_rejected, rejected_table
from fullrank.schema import Categorical, Label, Schema

# Later than this, a time is in milliseconds, as in the releases since 2023.
_LATEST_SECOND = 100_000_000_000
_SHOWN = 200


class Reviews:
    """Review JSON lines of J. McAuley's releases (2014: `reviewerID`, `asin`, `unixReviewTime`; 2018 the same; 2023:
    `user_id`, `parent_asin`, `timestamp` in ms), and metadata lines (JSON, or the Python literals of 2014).

    An item's category is the last, most specific one of its last list of categories.
    """

    timed = True

    def __init__(self, reviews: Path, metadata: Path | None) -> None:
        self._reviews, self._metadata = reviews, metadata
        self.known: Known = "" if metadata is None else "category_id"

    def events(self) -> Iterator[RawChunk]:
        keys = _keys(self._reviews)
        newer = "user_id" in keys
        names = (
            {USER: "user_id", ITEM: "parent_asin" if "parent_asin" in keys else "asin", TIME: "timestamp"}
            if newer
            else {USER: "reviewerID", ITEM: "asin", TIME: "unixReviewTime"}
        )
        fields = {
            names[USER]: (pa.string(), json_text),
            names[ITEM]: (pa.string(), json_text),
            names[TIME]: (pa.int64(), json_integer),
        }
        seconds = pl.when(pl.col(TIME) < _LATEST_SECOND).then(pl.col(TIME)).otherwise(pl.col(TIME) // 1000)
        for chunk in json_chunks(self._reviews, fields):
            frame = chunk.frame.rename({stored: name for name, stored in names.items()})
            yield RawChunk(frame.with_columns(seconds.alias(TIME)), chunk.rejected)

    def items(self, ids: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
        nothing = pl.DataFrame(schema={ITEM: pl.String, "category_id": pl.String})
        if self._metadata is None:
            return nothing, no_rejected()
        known = set(ids.to_list())
        is_json = first_line(self._metadata).startswith('{"')
        quote = b'"' if is_json else b"'"
        keys = _keys(self._metadata)
        key = "parent_asin" if "parent_asin" in keys else "asin"
        pattern = re.compile(quote + key.encode() + quote + rb"\s*:\s*" + quote + rb"([^'\"]+)" + quote)

        def wanted(text: bytes) -> bool:
            match = pattern.search(text)
            return match is None or match[1].decode("utf-8", "replace") in known

        chunks = json_chunks(
            self._metadata,
            {
                key: (pa.string(), json_text),
                "categories" if "categories" in keys else "category": (pa.string(), _last_category),
            },
            parse=json.loads if is_json else _literal,
            wanted=wanted,
        )
        found, rejected = [nothing], [no_rejected()]
        for chunk in chunks:
            frame = chunk.frame.drop(LINE_COLUMN)
            found.append(frame.rename(dict(zip(frame.columns, (ITEM, "category_id"), strict=True))))
            rejected.append(
                chunk.rejected.with_columns((pl.col("column") + f" ({self._metadata.name})").str.strip_chars())
            )
        # "" stands for an item whose list of categories is empty.
        items = pl.concat(found).filter(pl.col(ITEM).is_in(list(known)), pl.col("category_id") != "")
        return items.unique(ITEM, keep="first", maintain_order=True), pl.concat(rejected)

    def groups(self) -> int:
        # Four fifths of a review are its text, which is not kept.
        return max(groups_for([self._reviews]) // 4, 1)


class InteractionTables:
    """`interactions.parquet` (user_id, item_id, time in s) and `items.parquet` (item_id, i_category)."""

    timed = True
    known: Known = "category_id"

    def __init__(self, path: Path) -> None:
        self._path = path

    def events(self) -> Iterator[RawChunk]:
        file = self._path / "interactions.parquet"
        for chunk in _parquet(file, [USER, ITEM, "time"]):
            yield RawChunk(chunk.frame.rename({"time": TIME}), chunk.rejected)

    def items(self, ids: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
        chunks = list(_parquet(self._path / "items.parquet", [ITEM, "i_category"]))
        frame = pl.concat(chunk.frame for chunk in chunks).select(ITEM, pl.col("i_category").alias("category_id"))
        return frame.unique(ITEM, keep="first", maintain_order=True), pl.concat(chunk.rejected for chunk in chunks)

    def groups(self) -> int:
        return groups_for([self._path / "interactions.parquet"])


class Sequences:
    """`sequences.parquet` (user_id, item_ids) and `item_attributes.parquet` (item_id, attributes)."""

    timed = False
    known: Known = "attributes"

    def __init__(self, path: Path) -> None:
        self._path = path

    def events(self) -> Iterator[RawChunk]:
        for chunk in _parquet(self._path / "sequences.parquet", [USER, "item_ids"]):
            frame = chunk.frame.rename({"item_ids": ITEM}).explode(ITEM).drop_nulls(ITEM)
            yield RawChunk(frame, chunk.rejected)

    def items(self, ids: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
        chunks = list(_parquet(self._path / "item_attributes.parquet", [ITEM, "attributes"]))
        frame = pl.concat(chunk.frame for chunk in chunks).drop(LINE_COLUMN)
        return frame.unique(ITEM, keep="first", maintain_order=True), pl.concat(chunk.rejected for chunk in chunks)

    def groups(self) -> int:
        return groups_for([self._path / "sequences.parquet"])


class SequenceText:
    """`NAME.txt` (each line a user and their items, separated by spaces) and `NAME_item2attributes.json`."""

    timed = False

    def __init__(self, sequences: Path, attributes: Path | None) -> None:
        self._sequences, self._attributes = sequences, attributes
        self.known: Known = "" if attributes is None else "attributes"

    def events(self) -> Iterator[RawChunk]:
        line = 1
        for block in read_blocks(self._sequences, quote=b""):
            users: list[str] = []
            items: list[list[str]] = []
            lines: list[int] = []
            rejected: list[tuple[int, str, str, str]] = []
            for number, data in enumerate(block.split(b"\n"), start=line):
                try:
                    user, *taken = data.decode("utf-8").split() or ("",)
                except UnicodeDecodeError:
                    shown = data[:_SHOWN].decode("utf-8", "backslashreplace")
                    rejected.append((number, "", "not UTF-8", shown))
                    continue
                if taken:
                    users.append(user)
                    items.append(taken)
                    lines.append(number)
                elif user:
                    rejected.append((number, ITEM, "no items", user[:_SHOWN]))
            schema: dict[str, Any] = {USER: pl.String, ITEM: pl.List(pl.String), LINE_COLUMN: pl.Int64}
            frame = pl.DataFrame({USER: users, ITEM: items, LINE_COLUMN: lines}, schema=schema)
            yield RawChunk(frame.explode(ITEM), rejected_table(rejected))
            line += block.count(b"\n")

    def items(self, ids: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
        assert self._attributes is not None
        try:
            table: Any = json.loads(self._attributes.read_text(encoding="utf-8"))
            if not isinstance(table, dict):
                raise ValueError(f"it holds a {type(table).__name__}")
            texts = [[str(attribute) for attribute in attributes] for attributes in table.values()]
            schema: dict[str, Any] = {ITEM: pl.String, "attributes": pl.List(pl.String)}
            frame = pl.DataFrame({ITEM: list(table), "attributes": texts}, schema=schema)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f'{self._attributes}: expected one JSON object, {{"item": [attributes]}}: {error}'
            ) from None
        return frame, no_rejected()

    def groups(self) -> int:
        return groups_for([self._sequences])


def amazon_files(path: Path) -> EventLog:
    """The layout of a directory, or of a file of reviews or sequences.

    Raises:
        ValueError: if there is none.
    """
    if path.is_dir():
        if (path / "interactions.parquet").is_file():
            return InteractionTables(path)
        if (path / "sequences.parquet").is_file():
            return Sequences(path)
        lines = [file for file in sorted(path.iterdir()) if _is_json(file) or file.suffix == ".txt"]
        found = [file for file in lines if not _describes_items(file)]
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none of them"
            raise ValueError(
                f"{path}: expected interactions.parquet, sequences.parquet, train.csv, or one file of reviews "
                f"(.json, .jsonl, .json.gz) or sequences (.txt); found {names}"
            )
        path = found[0]
    elif not path.is_file():
        raise ValueError(f"{path} does not exist")
    beside = sorted(file for file in path.parent.iterdir() if _describes_items(file))
    if _is_json(path):
        metadata = [file for file in beside if _is_json(file) and file.name.lower().startswith("meta")]
        return Reviews(path, _for(path, metadata, "metadata"))
    if path.suffix == ".txt":
        attributes = [file for file in beside if file.name.lower().startswith(path.stem.lower() + "_item2attributes")]
        return SequenceText(path, _for(path, attributes, "attributes"))
    raise ValueError(f"{path}: expected reviews (.json, .json.gz, .jsonl) or sequences (.txt)")


def _is_json(file: Path) -> bool:
    return file.name.removesuffix(".gz").endswith((".json", ".jsonl"))


def _describes_items(file: Path) -> bool:
    return file.name.lower().startswith("meta") or "_item2attributes" in file.name.lower()


def _for(path: Path, found: list[Path], what: str) -> Path | None:
    """The one of the files beside `path` that belongs to it: the only one, or the one with the category in its name."""
    if len(found) > 1:
        category = re.sub(r"^reviews_|(_5)?\.(json|jsonl|txt)(\.gz)?$", "", path.name).lower()
        found = [file for file in found if category in file.name.lower()]
    if len(found) > 1:
        raise ValueError(f"{path}: several files of {what} beside it: {', '.join(file.name for file in found)}")
    return found[0] if found else None


def _keys(file: Path) -> frozenset[str]:
    """Keys of the object in the first line of a file.

    Raises:
        ValueError: if it is none.
    """
    line = first_line(file).encode()
    try:
        values = json.loads(line) if line.startswith(b'{"') else _literal(line)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not {"asin", "parent_asin"} & set(values):
        raise ValueError(f'{file} line 1: expected a JSON object with the key "asin", got "{line[:60].decode()}"')
    return frozenset(values)


def _literal(line: bytes) -> Any:
    """A Python literal; nothing in it is run.

    Raises:
        ValueError: if it is none, or one that cannot be, such as a dictionary with a list as a key.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in a text
        try:
            return ast.literal_eval(line.decode("utf-8"))
        except (SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError("not a Python literal") from None


def _last_category(value: Any) -> str:
    while isinstance(value, list):
        value = value[-1] if value else ""
    if not isinstance(value, str):
        raise ValueError("expected a list of categories")
    return value


def _parquet(file: Path, columns: list[str]) -> Iterator[RawChunk]:
    """Columns of a Parquet file with `__line`; rows with a null are rejected."""
    schema = Schema(features=tuple(Categorical(name=name) for name in columns[1:]), labels=(Label(name=columns[0]),))
    for chunk in ParquetLog().chunks(file, schema):
        frame = chunk.numbered().select(*columns, LINE_COLUMN)
        rejected: list[tuple[int, str, str, str]] = []
        for name in columns:
            missing = frame[name].is_null()
            rejected += [(line, name, "missing", "") for line in frame.filter(missing)[LINE_COLUMN].to_list()]
            frame = frame.filter(~missing)
        yield RawChunk(frame, rejected_table(rejected))
