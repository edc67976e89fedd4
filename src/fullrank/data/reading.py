"""A log of any format into the files of a dataset: rows checked, split, encoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fullrank.data import atomic
from fullrank.data.building import DatasetBuilder, Earlier, encoded_columns
from fullrank.data.checks import check
from fullrank.data.chunk import Chunk
from fullrank.data.forgotten import NobodyLeft, is_forgotten
from fullrank.data.formats.base import Format, SplitsRows
from fullrank.data.formats.lines import ENCODING_CURE
from fullrank.data.formats.published import fingerprints
from fullrank.data.held_out import validation
from fullrank.data.lookahead import prefetched
from fullrank.data.raw import RawChunk, rejected_text
from fullrank.data.splits import TRAIN, Parts, SplitSpec, by_hash, by_user
from fullrank.schema import Schema


def read_log(
    source: Format,
    path: Path,
    schema: Schema,
    out: Path,
    *,
    split: SplitSpec | None,
    keep: Collection[str],
    max_bad: float,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
    earlier: Earlier | None = None,
    row_name: str = "line",
    report: Path | None = None,
    forgotten: Collection[str] = (),
) -> None:
    """Read the log at `path`, set its bad rows aside, split it, fit encoders on the training part, and write it all.

    The arguments are those of `importing.import_dataset`, and

    Args:
        earlier: encoders to use instead of fitting some.
        row_name: what a message calls the place of a row.
        report: where to list the bad rows if there are too many.
    """
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad}, expected a share from 0 to 1")
    _check_kept(keep, schema)
    if forgotten and schema.keys.user_id is None:
        raise ValueError(f"{path}: the schema names no user_id, and so nobody whose rows are to be left out")
    split = split or SplitSpec()
    files = source.parts(path)
    if files is None and split.kind is None and isinstance(source, SplitsRows):
        split = split.model_copy(update={"kind": "given", "column": source.split_column})
    kind = split.kind or ("time" if schema.keys.timestamp is not None else "random")
    if files is None:
        _check_split(split, kind, schema)
    elif split.kind is not None:
        raise ValueError(f"{path} comes already split into {', '.join(files)}: leave out the split")
    if split.protocol == "bars" and (files is None or "test" not in files):
        raise ValueError(f'{path}: protocol "bars" is for a log that comes as a train and a test file')
    with atomic.new_directory(out, overwrite=overwrite) as partial:
        given = None if files is None else validation(source, files, split, schema)
        split_column = split.column if given is None else None
        extra = [*keep, split_column] if split_column is not None else list(keep)
        published = fingerprints([path] if files is None else files.values())
        builder = DatasetBuilder(partial, schema)
        stored, left_out = schema.stored, 0
        for part, file in ({"": path} if given is None else given.files).items():
            checked = _checked(source.chunks(file, stored, extra), stored, split_column, keep)
            for raw, chunk, bad in prefetched(checked):
                builder.rejected.add(raw.rejected)
                builder.rejected.add(bad)
                parts = _split_rows(chunk, split, kind) if given is None else given.parts(part, chunk)
                if forgotten and (gone := is_forgotten(chunk.keys["user_id"], forgotten)).any():
                    left_out += int(gone.sum())
                    chunk, parts = chunk.take(np.flatnonzero(~gone)), None if parts is None else parts[~gone]
                builder.add(chunk, parts)
                if progress is not None:
                    progress(builder.rows, builder.rejected.count)
        if left_out and not builder.rows:
            raise NobodyLeft(path, left_out)
        builder.reject_duplicates()
        _check_rejected(path, builder, max_bad, row_name, report)
        about: dict[str, Any] = {
            "source": str(path.name),
            "format": source.name,
            "split": kind if given is None else "given",
        }
        if given is not None:
            about["validation"] = given.source
        if forgotten:
            about["forgotten"] = left_out
        if published:
            about["published"] = {name: vars(found) for name, found in published.items()}
        builder.write(valid=split.valid, test=split.test, about=about, earlier=earlier)


def _checked(
    chunks: Iterator[RawChunk], schema: Schema, split_column: str | None, keep: Collection[str]
) -> Iterator[tuple[RawChunk, Chunk, pl.DataFrame]]:
    for raw in chunks:
        yield raw, *check(schema, raw, split_column=split_column, keep=keep)


def _check_kept(keep: Collection[str], schema: Schema) -> None:
    for name in keep:
        if name in encoded_columns(schema):
            raise ValueError(f'the column "{name}" to keep is a feature or a label: it is in the dataset already')
        if name.startswith("__"):
            raise ValueError(f'the column "{name}" to keep has a name that begins with __, as those of a dataset do')


def _check_split(split: SplitSpec, kind: str, schema: Schema) -> None:
    if kind == "time" and schema.keys.timestamp is None:
        raise ValueError('split "time" needs a timestamp among the keys of the schema')
    if kind == "user" and schema.keys.user_id is None:
        raise ValueError('split "user" needs a user_id among the keys of the schema')


def _split_rows(chunk: Chunk, split: SplitSpec, kind: str) -> Parts | None:
    if kind == "time":
        return None
    if kind == "none":
        return np.full(chunk.rows, TRAIN, dtype=np.int8)
    if kind == "user":
        return by_user(chunk.keys["user_id"], split)
    if kind == "random":
        # The place in the source decides, so that a row keeps its part when others are rejected.
        return by_hash(chunk.line(np.arange(chunk.rows)).astype(np.uint64), split)
    assert chunk.parts is not None
    return chunk.parts


def _check_rejected(path: Path, builder: DatasetBuilder, max_bad: float, row_name: str, report: Path | None) -> None:
    rejected = builder.rejected
    total = builder.rows + rejected.count
    if not total:
        raise ValueError(f"{path} has no rows")
    if rejected.count <= max_bad * total:
        if not builder.rows:
            raise ValueError(f"{path} has no good rows")
        return
    if report is not None:
        atomic.replace(rejected.path, report)
    limit = "max_bad" if report is None else "--max-bad"
    cure = f"; {ENCODING_CURE}" if any(reason == "not UTF-8" for reason in rejected.reasons) else ""
    first = "; ".join(
        f"{row_name} {line}: {rejected_text(column, reason, value)}" for line, column, reason, value in rejected.first
    )
    raise ValueError(
        f"{path}: {rejected.count:,} of {total:,} rows are bad ({rejected.count / total:.2%}, {max_bad:.2%} allowed by "
        f"{limit}): {first}{cure}" + (f"; all are listed in {report}" if report is not None else "")
    )
