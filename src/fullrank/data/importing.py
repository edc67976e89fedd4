"""The one door for logs: any format in, a dataset directory out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fullrank.data import atomic
from fullrank.data.building import DatasetBuilder, encoded_columns
from fullrank.data.checks import check
from fullrank.data.chunk import Chunk
from fullrank.data.dataset import Dataset
from fullrank.data.formats import open_format
from fullrank.data.formats.base import SplitsRows
from fullrank.data.formats.published import fingerprints
from fullrank.data.hashing import stable_hash
from fullrank.data.held_out import validation
from fullrank.data.lookahead import prefetched
from fullrank.data.raw import RawChunk
from fullrank.data.splits import TRAIN, Parts, SplitSpec, by_hash
from fullrank.schema import Schema


def import_dataset(
    format: str,
    path: Path,
    out: Path,
    *,
    schema: Schema | None = None,
    split: SplitSpec | None = None,
    keep: Collection[str] = (),
    max_bad: float = 0.001,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read a log, set its bad rows aside, split it, fit encoders on the training part, and write a dataset.

    Memory does not grow with the log, but for a byte per row (its part), 8 more when request ids must be unique, the
    vocabularies, and the distinct seconds of a split by time.

    Args:
        format: a key of `FORMATS`.
        path: the log.
        out: the directory to make; it appears only when complete.
        schema: what to read; the format's own when omitted.
        split: when the source comes already split into files, only the share of validation rows (where it has no file
            of them) and the protocol.
        keep: further columns of the log to have in the dataset, beside the features: numbers (int64 if all are whole
            and none is missing, else float32), or lists of equally many numbers. What is not such a number is a bad
            row.
        max_bad: share of bad rows above which the import fails.
        overwrite: replace an existing dataset.
        progress: called with the number of good and bad rows read so far.

    Raises:
        ValueError: if the source is not in the format or lacks a column, or has too many bad rows; these are then
            listed in `<out>.rejected.tsv`.
    """
    path, out = Path(path), Path(out)
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad}, expected a share from 0 to 1")
    source = open_format(format)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    schema = schema or source.default_schema(path)
    if not schema.labels:
        raise ValueError(
            f"{path}: no label found (a column of 0 and 1 called label, click or the like); "
            "write a schema with `fullrank data inspect FILE --out schema.json`, name the label in it, and pass it"
        )
    _check_kept(keep, schema)
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
        for part, file in ({"": path} if given is None else given.files).items():
            checked = _checked(source.chunks(file, schema, extra), schema, split_column, keep)
            for raw, chunk, bad in prefetched(checked):
                builder.rejected.add(raw.rejected)
                builder.rejected.add(bad)
                parts = _split_rows(chunk, split, kind) if given is None else given.parts(part, chunk)
                builder.add(chunk, parts)
                if progress is not None:
                    progress(builder.rows, builder.rejected.count)
        builder.reject_duplicates()
        _check_rejected(path, out, builder, max_bad)
        about: dict[str, Any] = {
            "source": str(path.name),
            "format": format,
            "split": kind if given is None else "given",
        }
        if given is not None:
            about["validation"] = given.source
        if published:
            about["published"] = {name: vars(found) for name, found in published.items()}
        builder.write(valid=split.valid, test=split.test, about=about)
    _report_of(out).unlink(missing_ok=True)
    return Dataset.open(out)


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
        return by_hash(stable_hash(chunk.keys["user_id"]).fill_null(0).to_numpy(), split)
    if kind == "random":
        # The place in the source decides, so that a row keeps its part when others are rejected.
        return by_hash(chunk.line(np.arange(chunk.rows)).astype(np.uint64), split)
    assert chunk.parts is not None
    return chunk.parts


def _report_of(out: Path) -> Path:
    """Where the bad rows of a failed import are listed, until an import succeeds."""
    return out.with_name(f"{out.name}.rejected.tsv")


def _check_rejected(path: Path, out: Path, builder: DatasetBuilder, max_bad: float) -> None:
    rejected = builder.rejected
    total = builder.rows + rejected.count
    if not total:
        raise ValueError(f"{path} has no rows")
    if rejected.count <= max_bad * total:
        if not builder.rows:
            raise ValueError(f"{path} has no good rows")
        return
    report = _report_of(out)
    atomic.replace(rejected.path, report)
    first = "; ".join(
        f"line {line}: " + (f'column "{column}" is "{value}": {reason}' if column else f"{reason}: {value}")
        for line, column, reason, value in rejected.first
    )
    raise ValueError(
        f"{path}: {rejected.count:,} of {total:,} rows are bad ({rejected.count / total:.2%}, {max_bad:.2%} allowed by "
        f"--max-bad): {first}; all are listed in {report}"
    )
