"""What a format of logs has to provide."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable
from urllib.parse import unquote

import polars as pl

from fullrank.data.formats.lines import bare_name
from fullrank.data.formats.options import ReadOptions
from fullrank.data.raw import RawChunk
from fullrank.data.splits import PARTS
from fullrank.schema import Schema


class Format(Protocol):
    """A way in which logs are stored.

    A format that comes as a directory of several files takes the directory as `path`. What else one may have, such as
    `Sampled`, are protocols of their own.
    """

    name: str

    def default_schema(self, path: Path) -> Schema:
        """The unfitted schema to use when the user gives none.

        Raises:
            ValueError: if `path` is not in this format.
        """
        ...

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        """The rows of `path` in order, about 10^5 at a time, in bounded memory. Called once per import and part.

        Args:
            schema: the columns to read.
            extra: further columns of the source to read, under their own names, such as the one that names each row's
                part. One that the source lacks may be left out: the importer says so.

        Raises:
            ValueError: if `path` is not in this format at all; single bad rows are reported in the chunk.
        """
        ...

    def parts(self, path: Path) -> dict[str, Path] | None:
        """The files of each split (`train`, `valid`, `test`) when the source comes already split, else None."""
        ...


@runtime_checkable
class SplitsRows(Protocol):
    """A format whose rows name their part, as the data's users usually split it.

    Attributes:
        split_column: column of its chunks with train, valid or test; used unless the caller asks for another split.
    """

    split_column: str


@runtime_checkable
class HoldsOut(Protocol):
    """A format that may come as a train and a test file, without a validation file.

    Attributes:
        held_out: what to set aside of the train file: all rows of some users drawn at random, or its last rows.
    """

    held_out: Literal["users", "rows"]


@runtime_checkable
class Sampled(Protocol):
    """A format that says nothing of what its columns mean, so that a schema is guessed from the first rows."""

    def sample(self, path: Path) -> pl.DataFrame:
        """The first rows of the training part.

        Raises:
            ValueError: if `path` is not in this format or has no rows.
        """
        ...


@runtime_checkable
class Noted(Protocol):
    """A format that guesses how its files are laid out, and says what it found."""

    def notes(self, path: Path) -> list[str]:
        """A line each: what was guessed, and how many of the first rows do not fit."""
        ...


@runtime_checkable
class TakesOptions(Protocol):
    """A format that can be told how its files are laid out."""

    def with_options(self, options: ReadOptions) -> Format:
        """The format, told so.

        Raises:
            ValueError: if it takes only some of the options.
        """
        ...


def training_file(source: Format, path: Path) -> Path:
    """The file of the training part, or `path` itself where that is the whole log."""
    return (source.parts(path) or {"train": path})["train"]


def split_files(path: Path, suffixes: Sequence[str], *, pieces: bool = False) -> dict[str, Path] | None:
    """The files (or directories) `train.*`, `valid.*` and `test.*` of a directory, or None when `path` is a file.

    Args:
        suffixes: of the files, without the ending of a container.
        pieces: the format reads directories of files too: None for one that holds no such parts.

    Raises:
        ValueError: if the directory has no train file.
    """
    if not path.is_dir():
        return None
    inside: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        inside.setdefault(bare_name(file), file)
    found: dict[str, Path] = {}
    for part in PARTS:
        for name in (part, "validation" if part == "valid" else part):
            for suffix in suffixes:
                if part not in found and f"{name}{suffix}" in inside and inside[f"{name}{suffix}"].is_file():
                    found[part] = inside[f"{name}{suffix}"]
            if pieces and part not in found and name in inside and inside[name].is_dir():
                found[part] = inside[name]
    if "train" not in found:
        if pieces and not found and part_files(path, suffixes):
            return None
        wanted = " or ".join(f"train{suffix}" for suffix in suffixes)
        raise ValueError(f"{path} is a directory without {wanted}")
    return found


def part_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """All files of a log: `path` itself, or the files of a directory, at any depth, with one of the suffixes.

    Raises:
        ValueError: if `path` does not exist.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if bare_name(file).endswith(tuple(suffixes))
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
        and file.is_file()
    ]
    return files


def file_rows(
    path: Path, file: Path, rows: Callable[[Collection[str]], Iterator[RawChunk]], *, several: bool
) -> Iterator[RawChunk]:
    """The rows of one file of a log; what the directories between `path` and it say (`day=1`) becomes columns.

    Args:
        rows: reads the file, given the columns that need not come from it.
        several: the log has other files, so that a report of a bad row needs this one's name.
    """
    known = _partition(path, file)
    for chunk in rows(known):
        new = {name: pl.lit(value, dtype=pl.String) for name, value in known.items() if name not in chunk.frame.columns}
        if new:
            chunk = replace(chunk, frame=chunk.frame.with_columns(**new))
        if several and chunk.rejected.height:
            named = (pl.col("column") + f" ({file.relative_to(path)})").str.strip_chars()
            chunk = replace(chunk, rejected=chunk.rejected.with_columns(named))
        yield chunk


def _partition(path: Path, file: Path) -> dict[str, str | None]:
    """Names and values of the directories `name=value` between a log and one of its files."""
    found: dict[str, str | None] = {}
    for part in file.relative_to(path).parts[:-1] if path.is_dir() else ():
        name, equals, value = part.partition("=")
        if equals and name:
            found[unquote(name)] = None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
    return found
