"""Parquet files as a stream of row blocks: folders, hive partitions, categories as 0/1 columns, missing values.

source = ParquetSource("clicks/", target="price", categories=["country"], missing="drop")
source.feature_names, source.categories, source.n_dropped
ParquetSource("later/", target="price", categories=source.categories)    # the same columns
"""

# Shapes: n rows, d columns of X, k rows of a block, t targets.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from fullrank.randomized.blocks import Array, Block, block_size, check_block, log_exposure
from fullrank.randomized.parameters import check, one_of
from fullrank.randomized.sources import RowSource

MOST_LEVELS = 100_000  # values of one category
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class Columns:
    """What a block is made of.

    Attributes:
        features: columns of the files, in order.
        levels: of those features that are categories: their values, one column of X for each.
        targets: columns of y; `single` for a y of one dimension.
        weight: column of row weights.
        offset, exposure: columns of offsets, and of numbers whose logarithms are added to them.
        complete: columns that must have a value in a row that is kept; empty where a missing value is an error.
    """

    features: tuple[str, ...]
    levels: Mapping[str, list[Any]]
    targets: tuple[str, ...]
    single: bool
    weight: str | None
    complete: tuple[str, ...] = ()
    offset: str | None = None
    exposure: str | None = None

    @property
    def others(self) -> list[str]:
        """Columns that are no part of X or y."""
        return [name for name in (self.weight, self.offset, self.exposure) if name]

    @property
    def read(self) -> list[str]:
        """All columns that have to be read."""
        return list(dict.fromkeys([*self.features, *self.targets, *self.others, *self.complete]))

    @property
    def feature_names(self) -> list[str]:
        """Of the columns of X."""
        return [
            column
            for name in self.features
            for column in ([f"{name}={level}" for level in self.levels[name]] if name in self.levels else [name])
        ]


class ParquetSource(RowSource):
    """Parquet files, read row group by row group and batch by batch; a fragment is one row group.

    Args:
        paths: a file, a folder (all *.parquet in it and below, sorted by path), or a list of files. Folders named
            key=value, as Hive and Spark write them, are a column `key`.
        features: columns of X; all but target and weight when omitted, and then all must be numbers or categories.
        target: column of y, or several.
        weight: column of row weights.
        offset: column that a generalised linear model adds to x'w.
        exposure: column whose logarithm is (part of) the offset.
        categories: columns that become one column of 0 and 1 for each value, named "country=NL"; their values are
            looked up in one pass, or given: a dict of lists, as the attribute of the source that a model was fitted on.
        missing: "error" refuses nulls and NaN; "drop" leaves such rows out, which takes one more pass to count them.
        block_rows: rows of a block; by size when omitted.

    Attributes:
        categories: dict of the values of every category, in the order of the columns.
        n_dropped: rows left out.

    Raises:
        ValueError: no file or no row; a missing column, a column that is neither a number nor a category, files that
            disagree in a column's type (file and column are named); while reading, nulls, NaN, infinity, negative
            weights, a value of a category that is none of those given.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        features: Sequence[str] | None = None,
        target: str | Sequence[str] | None = None,
        weight: str | None = None,
        *,
        offset: str | None = None,
        exposure: str | None = None,
        categories: Sequence[str] | Mapping[str, Sequence[Any]] = (),
        missing: str = "error",
        block_rows: int | None = None,
    ) -> None:
        import pyarrow.parquet as pq

        check("missing", missing, one_of("error", "drop"))
        self.paths = _parquet_files(paths)
        targets = () if target is None else (target,) if isinstance(target, str) else tuple(target)
        columns = Columns((), {}, targets, isinstance(target, str), weight, (), offset, exposure)
        others = [*targets, *columns.others]
        partitions = _partitions(paths, self.paths)
        groups: list[tuple[str, int, dict[str, Any]]] = []
        rows, first = [0], None
        for path, constants in zip(self.paths, partitions, strict=True):
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
            constants = {name: value for name, value in constants.items() if name not in schema.names}
            if first is None:
                first, names = schema, [*schema.names, *constants]
                chosen = [name for name in names if name not in others] if features is None else list(features)
                for name in categories:
                    if name not in chosen:
                        raise ValueError(f'{path.name}: category "{name}" is not among the features')
            for name in [*chosen, *others]:
                if name in constants:
                    if name not in categories and not isinstance(constants[name], (int, float)):
                        raise ValueError(f'{path}: "{name}" is "{constants[name]}", expected numbers{_ADVICE}')
                    continue
                if name not in schema.names:
                    raise ValueError(f'{path.name}: no column "{name}"')
                kind = schema.field(name).type
                if name not in categories and not _numeric(kind):
                    advice = _ADVICE if features is None else ""
                    raise ValueError(f'{path.name}: column "{name}" is {kind}, expected numbers{advice}')
                if kind != first.field(name).type:
                    expected = first.field(name).type
                    raise ValueError(f'{path.name}: column "{name}" is {kind}, {self.paths[0].name} has {expected}')
            for group in range(metadata.num_row_groups):
                if size := metadata.row_group(group).num_rows:
                    groups.append((str(path), group, constants))
                    rows.append(size)
        if not chosen:
            raise ValueError(f"{self.paths[0].name}: no column to use as a feature")
        self.columns = replace(columns, features=tuple(chosen))
        self.has_offset = bool(offset or exposure)
        self.single_target, self.n_dropped = isinstance(target, str), 0
        if missing == "drop":
            self.columns = replace(self.columns, complete=(*chosen, *others))
            kept = [_count_complete(*group, self.columns.complete) for group in groups]
            self.n_dropped = sum(rows) - sum(kept)
            groups = [group for group, size in zip(groups, kept, strict=True) if size]
            rows = [0, *(size for size in kept if size)]
        if not groups:
            raise ValueError(f"{self.paths[0].name}: no rows in {len(self.paths)} file(s)")
        self._groups = groups
        given = categories if isinstance(categories, Mapping) else {}
        self.categories = {name: list(given[name]) if given else _levels(groups, name) for name in categories}
        self.columns = replace(self.columns, levels=self.categories)
        self.feature_names = self.columns.feature_names
        self.n_cols, self.n_targets = len(self.feature_names), len(targets)
        self.starts = np.cumsum(rows)
        self.block_rows = block_size(self.n_cols, block_rows)

    def task(self, fragment: int) -> tuple[Callable[..., Iterator[Block]], tuple[Any, ...]]:
        return _parquet_blocks, (*self._groups[fragment], self.columns, int(self.starts[fragment]), self.block_rows)

    def without_features(self) -> ParquetSource:
        return self._shallow(columns=replace(self.columns, features=()))  # type: ignore[no-any-return]


_ADVICE = ": name it in categories, or list the features"


def _parquet_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(paths, (str, Path)):
        place = Path(paths)
        files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
        hidden = [file for file in files if any(part[0] in "._" for part in file.relative_to(place).parts)]
        files = [file for file in files if file not in hidden]
    else:
        files = [Path(path) for path in paths]
    if not files:
        raise ValueError(f"{paths}: no *.parquet file")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
    return files


def _partitions(paths: str | Path | Sequence[str | Path], files: list[Path]) -> list[dict[str, Any]]:
    """Columns that folders below the one given stand for; integers or numbers where all files have such."""
    if not isinstance(paths, (str, Path)) or not Path(paths).is_dir():
        return [{} for _ in files]
    found = []
    for file in files:
        parts = file.relative_to(paths).parts[:-1]
        pairs = (part.split("=", 1) for part in parts if "=" in part)
        found.append({name: None if value == _NO_VALUE else unquote(value) for name, value in pairs})
    names = [name for name in found[0] if all(name in values for values in found)]
    table: dict[str, list[Any]] = {}
    for name in names:
        values = [each[name] for each in found]
        table[name] = values
        for number in (int, float):
            try:
                table[name] = [np.nan if value is None else number(value) for value in values]
                break
            except ValueError:
                continue
    return [{name: table[name][i] for name in names} for i in range(len(files))]


def _numeric(kind: Any) -> bool:
    from pyarrow import types

    kinds = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
    return any(holds(kind) for holds in kinds)


def _batches(
    path: str, group: int, constants: Mapping[str, Any], names: Sequence[str], block_rows: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """Arrow arrays by name, and their length; a column of the folders repeats its value."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stored = [name for name in names if name not in constants]
    # Without pre-buffering a column chunk is read in small pieces, and memory does not grow with the row group.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**18) as file:
        for batch in file.iter_batches(block_rows, row_groups=[group], columns=stored):
            columns = {name: batch.column(name) for name in stored}
            for name in names:
                if name in constants:
                    columns[name] = pa.array([constants[name]] * batch.num_rows)
            yield columns, batch.num_rows


def _complete(columns: Mapping[str, Any], names: Sequence[str], k: int) -> NDArray[np.bool_]:
    """Rows that have a value in all of these columns."""
    import pyarrow.compute as pc

    whole = np.ones(k, dtype=bool)
    for name in names:
        column = columns[name]
        whole &= ~pc.is_null(column, nan_is_null=column.type in _floats()).to_numpy(zero_copy_only=False)
    return whole


def _floats() -> tuple[Any, ...]:
    import pyarrow as pa

    return (pa.float16(), pa.float32(), pa.float64())


def _count_complete(path: str, group: int, constants: Mapping[str, Any], names: Sequence[str]) -> int:
    batches = _batches(path, group, constants, list(dict.fromkeys(names)), block_size(len(names)))
    return sum(int(_complete(columns, names, k).sum()) for columns, k in batches)


def _levels(groups: Sequence[tuple[str, int, dict[str, Any]]], name: str) -> list[Any]:
    """Sorted values of a column, without nulls."""
    found: set[Any] = set()
    for path, group, constants in groups:
        for columns, _ in _batches(path, group, constants, [name], block_size(1)):
            found.update(value for value in columns[name].unique().to_pylist() if value is not None)
        if len(found) > MOST_LEVELS:
            raise ValueError(f'{Path(path).name}: category "{name}" has more than {MOST_LEVELS} values')
    return sorted(found)


def _parquet_blocks(
    path: str, group: int, constants: Mapping[str, Any], columns: Columns, start: int, block_rows: int
) -> Iterator[Block]:
    import pyarrow as pa

    place, t = Path(path).name, len(columns.targets)
    names = [*columns.features, *columns.targets, *columns.others]
    feature_names = columns.feature_names
    for batch, size in _batches(path, group, constants, columns.read, block_rows):
        k, arrays = size, batch
        if columns.complete:
            whole = _complete(batch, columns.complete, size)
            k = int(whole.sum())
            if not k:
                continue
            if k < size:
                arrays = {name: column.filter(pa.array(whole)) for name, column in batch.items()}
        # Columns are contiguous on both sides of this copy; a transposed view is what BLAS calls column-major.
        cells = np.empty((len(names), k))
        for j, name in enumerate(names):
            column = arrays[name]
            if column.null_count:
                raise ValueError(f'{place}: column "{name}" has {column.null_count} nulls near row {start}')
            if name in columns.levels:
                cells[j] = _codes(column, columns.levels[name], f'{place}: column "{name}"')
            else:
                cells[j] = column.to_numpy(zero_copy_only=False)
        d = len(columns.features)
        y = None if not t else cells[d] if columns.single else cells[d : d + t].T
        X = _one_hot(cells[:d], columns) if any(name in columns.levels for name in columns.features) else cells[:d].T
        others = dict(zip(columns.others, cells[d + t :], strict=True))
        offset = others[columns.offset] if columns.offset else None
        if columns.exposure:
            logarithm = log_exposure(others[columns.exposure], start, place)
            offset = logarithm if offset is None else offset + logarithm
        block = Block(X, y, others[columns.weight] if columns.weight else None, start, offset)
        check_block(block, feature_names, place)
        yield block
        start = block.stop


def _codes(column: Any, levels: Sequence[Any], place: str) -> NDArray[np.int64]:
    """Positions of the values among the levels."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    codes = pc.index_in(column, value_set=pa.array(levels, type=column.type))
    if codes.null_count:
        row = pc.index(pc.is_null(codes), True).as_py()
        raise ValueError(f'{place} has "{column[row].as_py()}", none of its {len(levels)} values')
    return np.asarray(codes.to_numpy(zero_copy_only=False), dtype=np.int64)


def _one_hot(cells: Array, columns: Columns) -> sp.csr_array:
    """Numbers as they are and categories as a one in the column of their value; (k, d)."""
    k, position = cells.shape[1], 0
    values, places = cells.T.copy(), np.empty((k, len(cells)), dtype=np.int32)
    for j, name in enumerate(columns.features):
        places[:, j] = position
        if name in columns.levels:
            places[:, j] += cells[j].astype(np.int32)
            values[:, j] = 1.0
        position += len(columns.levels[name]) if name in columns.levels else 1
    ends = np.arange(0, places.size + 1, len(cells))
    return sp.csr_array((values.ravel(), places.ravel(), ends), shape=(k, position))
