"""RecBole's atomic files: tab-separated tables whose header types its columns (`item_id:token`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import polars as pl

from fullrank.data.column_facts import LABEL_NAMES
from fullrank.data.formats.base import part_files
from fullrank.data.formats.delimited import delimited_chunks
from fullrank.data.formats.layout import Layout, text_layout
from fullrank.data.formats.lines import bare_name
from fullrank.data.formats.options import ReadOptions
from fullrank.data.inference import KEY_NAMES
from fullrank.data.raw import LINE_COLUMN, RawChunk, check_columns, no_rejected, only_rejected, raw_columns
from fullrank.data.splits import PARTS
from fullrank.schema import (
    Categorical,
    EventId,
    Feature,
    Keys,
    Label,
    MultiCategorical,
    Numeric,
    Role,
    Schema,
    Sequence,
)

_TYPES = ("token", "token_seq", "float", "float_seq")
_LIST_ENDING = "_list"
_LABELS = (*LABEL_NAMES, "rating")
_SAMPLE_BYTES = 1 << 20


class RecBole:
    """A directory with `NAME.inter` and, if there are, `NAME.user` and `NAME.item`; or the `.inter` file among them.

    Files `NAME.train.inter`, `NAME.valid.inter` and `NAME.test.inter` are a split. A `token` is an id, a `token_seq` a
    bag, or a history of the ids of another column (`item_id_list` of `item_id`), a `float` a number; `float_seq` is
    left out. A column called label, click, rating and the like is the label: 0 and 1, or a regression.
    """

    name = "recbole"

    def default_schema(self, path: Path) -> Schema:
        parts = self.parts(path)
        inter, others = _tables(path if parts is None else parts["train"])
        by_name = {name.lower(): name for name in reversed(list(inter.kinds))}
        named = {
            key: next((by_name[name] for name in names if name in by_name), None) for key, names in KEY_NAMES.items()
        }
        keys = {key: named[key] for key in ("user_id", "item_id", "timestamp") if named[key] is not None}
        label = next(
            (by_name[name] for name in _LABELS if name in by_name and "seq" not in inter.kinds[by_name[name]]), None
        )
        features: list[Feature] = []
        known: set[str] = {name for name in (keys.get("timestamp"), label) if name is not None}
        for table, role in ((inter, "context"), *others):
            for name, kind in table.kinds.items():
                mine: Role = {keys.get("user_id"): "user", keys.get("item_id"): "item"}.get(name, role)  # type: ignore[assignment]
                feature = None if name in known else _feature(name, kind, mine, inter.kinds)
                known.add(name)
                if feature is not None:
                    features.append(feature)
        labels = () if label is None else (Label(name=label, kind=_label_kind(inter, label)),)
        return Schema(features=tuple(features), labels=labels, keys=Keys(**keys))

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        inter, others = _tables(path)
        available = dict.fromkeys([*inter.kinds, *(name for table, _ in others for name in table.kinds)])
        stored = raw_columns(schema, available)
        wanted = dict.fromkeys([*stored.values(), *extra])
        check_columns(inter.file, wanted, available)
        about: list[tuple[str, pl.DataFrame]] = []
        for table, _ in others:
            mine = [name for name in table.kinds if name in wanted and name not in inter.kinds]
            if not mine:
                continue
            frame, rejected = _about(table, mine)
            about.append((table.key, frame))
            if rejected.height:
                yield only_rejected(wanted, rejected)
        here = [name for name in inter.kinds if name in wanted or name in {key for key, _ in about}]
        for chunk in delimited_chunks(inter.file, inter.layout, here, plain=frozenset(here) if about else frozenset()):
            for key, frame in about:
                chunk = replace(chunk, frame=chunk.frame.join(frame, on=key, how="left", maintain_order="left"))
            yield chunk

    def parts(self, path: Path) -> dict[str, Path] | None:
        if not path.is_dir():
            return None
        found = {
            part: file for part in PARTS for file in _inter_files(path) if bare_name(file).endswith(f".{part}.inter")
        }
        return found if "train" in found else None


@dataclass(frozen=True)
class _Table:
    """A file, its layout, the type of each column, and the column that other files name its rows by."""

    file: Path
    layout: Layout
    kinds: dict[str, str]

    @property
    def key(self) -> str:
        return next(iter(self.kinds))


def _inter_files(path: Path) -> list[Path]:
    return [file for file in part_files(path, (".inter",)) if file.parent == path]


def _tables(path: Path) -> tuple[_Table, list[tuple[_Table, Role]]]:
    if path.is_dir():
        files = _inter_files(path)
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise ValueError(f"{path}: expected one file NAME.inter, or NAME.train.inter and so on; found {names}")
        path = files[0]
    inter = _table(path)
    others: list[tuple[_Table, Role]] = []
    stem = bare_name(path).removesuffix(".inter")
    for part in PARTS:
        stem = stem.removesuffix(f".{part}")
    for file in sorted(path.parent.iterdir()):
        for role in ("user", "item"):
            if bare_name(file) == f"{stem}.{role}":
                table = _table(file)
                if table.key not in inter.kinds:
                    raise ValueError(f'{file}: its first column "{table.key}" is none of those of {path.name}')
                others.append((table, role))
    return inter, others


def _table(file: Path) -> _Table:
    layout = text_layout(file, ReadOptions(separator="\t"))
    kinds: dict[str, str] = {}
    for typed in layout.names:
        name, colon, kind = typed.rpartition(":")
        if not colon or kind not in _TYPES:
            raise ValueError(f'{file} line 1: "{typed[:60]}" is no name with a type ({", ".join(_TYPES)})')
        if name in kinds:
            raise ValueError(f'{file} line 1: the column "{name}" appears twice')
        kinds[name] = kind
    return _Table(file, replace(layout, names=tuple(kinds)), kinds)


def _feature(name: str, kind: str, role: Role, kinds: dict[str, str]) -> Feature | None:
    if kind == "token":
        return Categorical(name=name, role=role)
    if kind == "float":
        return Numeric(name=name, role=role, transform="standard")
    if kind != "token_seq":
        return None
    of = name.removesuffix(_LIST_ENDING)
    if of != name and kinds.get(of) == "token":
        return Sequence(name=name, fields=(EventId(name=of, table=of),), separator=" ")
    return MultiCategorical(name=name, role=role, separator=" ")


def _label_kind(table: _Table, label: str) -> Literal["binary", "regression"]:
    """Binary, if the first labels are 0 and 1."""
    for chunk in delimited_chunks(
        table.file, table.layout, [label], plain=frozenset([label]), block_bytes=_SAMPLE_BYTES
    ):
        numbers = chunk.frame[label].cast(pl.Float64, strict=False).drop_nulls()
        return "binary" if numbers.is_in([0.0, 1.0]).all() else "regression"
    return "binary"


def _about(table: _Table, columns: list[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Columns of a table of users or items, once per id, and its bad lines."""
    good, bad = [], [no_rejected()]
    named = list(dict.fromkeys([table.key, *columns]))
    for chunk in delimited_chunks(table.file, table.layout, named, plain=frozenset(named)):
        good.append(chunk.frame.drop(LINE_COLUMN, strict=False))
        where = (pl.col("column") + f" ({table.file.name})").str.strip_chars()
        bad.append(chunk.rejected.with_columns(where))
    if not good:
        return pl.DataFrame(schema=dict.fromkeys(named, pl.String)), pl.concat(bad)
    return pl.concat(good).unique(table.key, keep="first", maintain_order=True), pl.concat(bad)
