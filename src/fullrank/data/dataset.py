"""An encoded log on disk: Parquet shards, fitted schema and encoders."""

from __future__ import annotations

import copy
import hashlib
import json
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import polars as pl

from fullrank.data import atomic
from fullrank.data.building import (
    FORMAT_VERSION,
    DatasetBuilder,
    Earlier,
    ShardWriter,
    encoded_columns,
    write_manifest,
)
from fullrank.data.checks import check
from fullrank.data.encoders import KEY_COLUMNS, Encoders
from fullrank.data.formats import open_format, usual_format
from fullrank.data.formats.base import Format, Sampled
from fullrank.data.formats.options import ReadOptions
from fullrank.data.frames import FrameLog, polars_frame
from fullrank.data.inference import schema_for, with_reading
from fullrank.data.raw import RawChunk, rejected_text
from fullrank.data.reading import read_log
from fullrank.data.scratch import Scratch
from fullrank.data.splits import PARTS, SplitSpec
from fullrank.data.tallies import TALLIES, hash_column, hashed_features, is_hash_column
from fullrank.schema import OUT_OF_VOCABULARY_ID, Role, Schema, TimeUnit


class Dataset:
    """A dataset directory (see `docs` for its layout), opened for reading.

    Attributes:
        path: the directory.
        schema: fitted schema of its columns.
        source: what it was made from.
        rejected: number of rejected source rows by reason.
        out_of_order: rows whose timestamp lies before that of the row above them in the source.
        published: by the name of a source file that has the layout of a public benchmark: its `benchmark`, the `part`
            of it that the file's rows are (None for none), and its `md5`.
        validation: where the validation rows come from, if the source came in files.
        forgotten: rows that an import left out because their users are to be forgotten; None if it did not ask.
        new_ids: by table: how many an import that extends the encoders of an earlier log added.
        later: of the id columns, the ids of values that `schema` does not know because they came later; they are read
            as out of vocabulary. See `as_known_to`.
        derived: of each history that was derived from earlier rows: its `events` and `rows_with_events`, and
            `rows_in_ties`, which share user and second with other rows and do not know these.
    """

    def __init__(self, path: Path, schema: Schema, manifest: dict[str, Any]) -> None:
        self.path = path
        self.schema = schema
        self.source: str = manifest["source"]
        self.rejected: dict[str, int] = manifest["rejected"]
        self.out_of_order: int = manifest.get("out_of_order", 0)
        self.published: dict[str, dict[str, Any]] = manifest.get("published", {})
        self.validation: str | None = manifest.get("validation")
        self.derived: dict[str, dict[str, int]] = manifest.get("derived", {})
        self.forgotten: int | None = manifest.get("forgotten")
        self.new_ids: dict[str, int] = manifest.get("new_ids", {})
        self.later: dict[str, range] = {}
        self._whole: Dataset | None = None
        self._rows: dict[str, int] = manifest["rows"]
        self._shards: dict[str, list[str]] = manifest["shards"]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a dataset directory and check that its shards are there and have the schema's columns.

        Raises:
            ValueError: if `path` is not a dataset, a shard is missing, or columns and schema differ.
        """
        path = Path(path)
        manifest_path = path / "dataset.json"
        if not manifest_path.is_file():
            raise ValueError(f"{path} is not a dataset: it has no dataset.json (make one with `fullrank data import`)")
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
            version = manifest["format_version"]
            rows, shards = manifest["rows"], manifest["shards"]
            manifest["source"], manifest["rejected"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest_path} is damaged: {error!r}") from None
        if version != FORMAT_VERSION:
            raise ValueError(f"{manifest_path}: format_version is {version!r}, this release reads {FORMAT_VERSION}")
        schema = Schema.read(path / "schema.json")
        expected = encoded_columns(schema)
        for split, names in shards.items():
            count = 0
            for name in names:
                shard = path / name
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise ValueError(f'{manifest_path}: shard "{name}" lies outside the dataset')
                if not shard.is_file():
                    raise ValueError(f"{path}: shard {name} is missing")
                _check_columns(shard, expected)
                count += _row_count(shard)
            if count != rows.get(split):
                raise ValueError(f"{path}: split {split} has {count} rows, dataset.json says {rows.get(split)}")
        return cls(path, schema, manifest)

    @classmethod
    def from_frame(
        cls,
        frame: object,
        schema: Schema | None = None,
        *,
        label: str | Collection[str] = (),
        user_id: str | None = None,
        item_id: str | None = None,
        timestamp: str | None = None,
        path: Path | str | None = None,
        like: Path | str | None = None,
        extend: bool = False,
        split: SplitSpec | str | None = None,
        options: ReadOptions | None = None,
        missing: Collection[str] | None = None,
        time_unit: TimeUnit | None = None,
        time_format: str | None = None,
        keep: Collection[str] = (),
        max_bad: float = 0.001,
        overwrite: bool = False,
        forgotten: Collection[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """A dataset of a table in memory or of a log in a file, made as `fullrank data import` makes it.

        Args:
            frame: a table of pandas, polars or Arrow; the path of a CSV or Parquet file, or of a directory of such
                files for each part; or the path of a dataset, which is opened and takes no other arguments.
            schema: what the columns mean. Default: guessed from the first rows, as `fullrank data inspect` does.
            label: columns to predict, if the schema is guessed; 0 and 1 (or truth values), or other numbers for a
                regression.
            user_id, item_id, timestamp: columns with these keys, if the schema is guessed.
            path: the directory to make. Default: a temporary one, which is deleted with the returned object; a frame
                that `scan` gives lazily has to be collected before.
            like, extend: an earlier log whose schema and encoders to take, and whether to add new values; see
                `import_dataset`.
            split: the kind of split, or all of it. Default: by time if there is a timestamp, else at random.
            options: how a text file is laid out, where that is not to be guessed.
            missing, time_unit, time_format: in place of those of the schema, or to guess it by; see `Schema`.
            keep: further columns to have in the dataset; see `import_dataset`.
            max_bad: share of bad rows above which it fails.
            overwrite: replace an existing dataset at `path`.
            forgotten: digests of users whose rows are left out; see `import_dataset`.
            progress: called with the number of good and bad rows read so far.

        Raises:
            ValueError: if there is no label, a column is missing, or too many rows are bad; names row and column.
        """
        labels = (label,) if isinstance(label, str) else tuple(label)
        named = {"user_id": user_id, "item_id": item_id, "timestamp": timestamp}
        keys = {key: column for key, column in named.items() if column is not None}
        source: Format
        if isinstance(frame, (str, Path)):
            place = Path(frame)
            if (place / "dataset.json").is_file():
                if schema or labels or keys or path or like or extend or split or options or keep or forgotten:
                    raise ValueError(f"{place} is a dataset already: its labels, keys, columns and split are made")
                return cls.open(place)
            if not place.exists():
                raise ValueError(f"{place} does not exist")
            source = open_format(usual_format(place), options)
        else:
            if options is not None:
                raise ValueError("options are for files of text: the columns of a table are known")
            place = Path("table")
            source = FrameLog(polars_frame(frame))
        earlier = Earlier.of(
            like,
            extend,
            schema=schema,
            label=labels or None,
            keys=keys or None,
            missing=missing,
            time_unit=time_unit,
            time_format=time_format,
        )
        if earlier is not None:
            schema = earlier.encoders.schema
        elif schema is None:
            if (labels or keys) and not isinstance(source, Sampled):
                raise ValueError(f"the format {source.name} says itself what its labels and keys are: pass a schema")
            schema = schema_for(
                source, place, labels, keys, missing=missing, time_unit=time_unit, time_format=time_format, keep=keep
            )
        elif labels or keys:
            raise ValueError("labels and keys are part of the schema: give either the schema or them")
        else:
            schema = with_reading(schema, missing, time_unit, time_format)
        if not schema.labels:
            raise ValueError(f'{place}: no label found; name its column, such as label="click"')
        scratch = Scratch() if path is None else None
        out = scratch.path / "dataset" if scratch is not None else Path(path or "")
        try:
            read_log(
                source,
                place,
                schema,
                out,
                split=SplitSpec.of(split),
                keep=keep,
                max_bad=max_bad,
                overwrite=overwrite,
                progress=progress,
                earlier=earlier,
                row_name="row",
                forgotten=forgotten,
            )
            dataset = cls.open(out)
        except BaseException:
            if scratch is not None:
                scratch.remove()
            raise
        if scratch is not None:
            weakref.finalize(dataset, scratch.remove)
        return dataset

    @cached_property
    def encoders(self) -> Encoders:
        return Encoders.load(self.path / "encoders")

    def as_known_to(self, encoders: Encoders) -> Self:
        """The same rows with the ids that these encoders give: what is new since is out of vocabulary.

        Raises:
            ValueError: if the dataset's encoders are neither these nor these extended.
        """
        if self.encoders.agrees_with(encoders):
            return self
        if not self.encoders.extends(encoders):
            raise ValueError(
                f"{self.path} has another schema or other vocabularies than the bundle: import its log with "
                "`fullrank data import ... --like BUNDLE`"
            )
        known, stored = encoders.schema.tables(), self.schema.tables()
        view = copy.copy(self)
        view._whole = self  # which may be a temporary one that goes with its object
        view.schema, view.encoders = encoders.schema, encoders
        tables = {name: feature.table_name for name, feature in self.schema.embedded().items()}
        view.later = {
            name: range(known[table], stored[table]) for name, table in tables.items() if known[table] < stored[table]
        }
        return view

    @cached_property
    def extra(self) -> dict[str, pl.DataType]:
        """Columns beside those of the schema, and their types: those that an import kept, and true probabilities."""
        known = {*encoded_columns(self.schema), *KEY_COLUMNS.values()}
        first = next((shard for split in self.splits for shard in self.shards(split)), None)
        columns = {} if first is None else pl.read_parquet_schema(first)
        return {name: dtype for name, dtype in columns.items() if name not in known and not is_hash_column(name)}

    @property
    def tallies(self) -> Path | None:
        """The file of what counters come to at the log's end; None without counters, or from an earlier release."""
        path = self.path / TALLIES
        return path if path.is_file() and self.schema.counters else None

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._shards)

    def rows(self, split: str) -> int:
        self._check_split(split)
        return self._rows[split]

    def shards(self, split: str) -> list[Path]:
        self._check_split(split)
        return [self.path / name for name in self._shards[split]]

    def fingerprint(self, split: str) -> str:
        """A hash of the rows of a split: of the whole content of its shards, and of what the columns mean."""
        digest = hashlib.sha256(self.schema.to_json().encode("utf-8"))
        for shard in self.shards(split):
            with shard.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def scan(self, split: str) -> pl.LazyFrame:
        """Encoded columns of a split, lazily, in stored order."""
        shards = self.shards(split)
        if not shards:
            return pl.LazyFrame(schema=encoded_columns(self.schema))
        lists = self.schema.jagged_keys
        return pl.scan_parquet(shards, glob=False).with_columns(
            pl.col(name).list.eval(_known(pl.element(), ids)) if name in lists else _known(pl.col(name), ids)
            for name, ids in self.later.items()
        )

    def catalogue(self, role: Literal["item", "user"], split: str = "train") -> pl.DataFrame:
        """One row per item (or user) of a split: its key and the last seen values of the features of that role.

        "Last" is by timestamp when the log has one, else by order of rows. The first column is `__item_id` or
        `__user_id`, the others are encoded features, and hashes of those that counters count by; rows are in order of
        the key.

        Raises:
            ValueError: if the schema names no key for the role.
        """
        if getattr(self.schema.keys, f"{role}_id") is None:
            raise ValueError(f"{self.path}: the schema names no {role}_id, so there is no catalogue of {role}s")
        key = KEY_COLUMNS[f"{role}_id"]
        wanted: set[Role] = {role}
        chosen = self.schema.select(wanted)
        columns = [*chosen.numeric_columns, *chosen.embedded(), *chosen.event_number_keys]
        if self.tallies is not None:
            columns += [hash_column(name) for name, whose in hashed_features(self.schema).items() if whose == role]
        frame = self.scan(split).select(key, *columns, *self._order_columns())
        if self.schema.keys.timestamp is not None:
            frame = frame.sort("__timestamp", maintain_order=True)
        return (
            frame.filter(pl.col(key).is_not_null())
            .group_by(key)
            .agg(pl.col(columns).last())
            .select(key, *columns)
            .sort(key)
            .collect()
        )

    def _order_columns(self) -> list[str]:
        return ["__timestamp"] if self.schema.keys.timestamp is not None else []

    def _check_split(self, split: str) -> None:
        if split not in self._shards:
            raise ValueError(f'{self.path} has no split "{split}"; it has {", ".join(self._shards) or "none"}')


def _known(ids: pl.Expr, later: range) -> pl.Expr:
    return pl.when(ids < later.start).then(ids).otherwise(pl.lit(OUT_OF_VOCABULARY_ID, pl.Int32))


def _check_columns(shard: Path, expected: Mapping[str, pl.DataType]) -> None:
    try:
        found = pl.read_parquet_schema(shard)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{shard} is not a readable Parquet file: {error}") from None
    for name, dtype in expected.items():
        if name not in found:
            raise ValueError(f'{shard}: column "{name}" of schema.json is missing')
        if found[name] != dtype:
            raise ValueError(f'{shard}: column "{name}" is {found[name]}, expected {dtype}')


def _row_count(shard: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(shard).num_rows)


def write_dataset(
    out: Path,
    schema: Schema,
    parts: Mapping[str, Iterable[pl.DataFrame]],
    *,
    source: str = "",
    encoded: bool = False,
    overwrite: bool = False,
) -> Dataset:
    """Fit encoders on the part "train", encode every part and write a dataset directory.

    Args:
        out: the directory to make; it appears only when complete.
        schema: unfitted (or with the sizes that `hash` and `identity` need).
        parts: frames of each split, in order; each iterable is consumed once. Raw columns named as in the schema, as
            in `RawChunk.frame`, keys under the schema's key names; columns `__true_<label>` are kept as they are.
        source: what the data is, for `dataset.json`.
        encoded: the frames hold encoded columns already (ids, transformed numbers, keys under their fixed names such
            as `__user_id`). Every id feature must then have encoding `hash` or `identity`, every number the transform
            `none` or `log1p`, so that serving can encode without fitted state.
        overwrite: replace an existing dataset.

    Raises:
        ValueError: if there is no "train" part, or a row is bad: a caller's own data is expected to be clean.
    """
    if "train" not in parts:
        raise ValueError(f'no part "train" to fit encoders on; the parts are {", ".join(parts) or "none"}')
    for name in parts:
        if name not in PARTS:
            raise ValueError(f'unknown part "{name}", expected one of {", ".join(PARTS)}')
    about = {"source": source, "format": "frames", "split": "given"}
    with atomic.new_directory(Path(out), overwrite=overwrite) as partial:
        if encoded:
            _write_encoded(partial, schema, parts, about)
        else:
            builder = DatasetBuilder(partial, schema)
            stored = schema.stored
            for name in sorted(parts, key=PARTS.index):
                row = 1
                for frame in parts[name]:
                    chunk, bad = check(stored, RawChunk(frame, first_line=row))
                    if bad.height:
                        line, *what = bad.row(0)
                        raise ValueError(f"part {name} row {line}: {rejected_text(*what)}")
                    builder.add(chunk, np.full(chunk.rows, PARTS.index(name), dtype=np.int8))
                    row += frame.height
            builder.reject_duplicates()
            if builder.rejected.count:
                line, *what = builder.rejected.first[0]
                raise ValueError(f"row {line}: {rejected_text(*what)}")
            builder.write(valid=0, test=0, about=about)
    return Dataset.open(Path(out))


def _write_encoded(
    directory: Path, schema: Schema, parts: Mapping[str, Iterable[pl.DataFrame]], about: dict[str, Any]
) -> None:
    encoders = Encoders.without_fitting(schema)
    expected = encoded_columns(encoders.schema)
    writers: dict[str, ShardWriter] = {}
    for name in sorted(parts, key=PARTS.index):
        writer = writers[name] = ShardWriter(directory, name)
        for frame in parts[name]:
            for column, dtype in expected.items():
                found = frame.schema.get(column)
                if found != dtype:
                    raise ValueError(
                        f'part {name}: encoded column "{column}" is {found or "missing"}, expected {dtype}'
                    )
            _check_ids(name, frame, encoders.schema)
            writer.add(frame)
        writer.close()
    if not writers["train"].rows:
        raise ValueError("no row is left to train on")
    write_manifest(directory, encoders, {name: w for name, w in writers.items() if w.rows}, {}, about)


def _check_ids(part: str, frame: pl.DataFrame, schema: Schema) -> None:
    for column, feature in schema.embedded().items():
        ids = frame[column]
        if isinstance(ids.dtype, pl.List):
            ids = ids.explode().drop_nulls()
        assert feature.num_embeddings is not None
        if len(ids) and not ids.is_between(0, feature.num_embeddings - 1).all():
            raise ValueError(f'part {part}: column "{column}" has ids outside 0 to {feature.num_embeddings - 1}')
