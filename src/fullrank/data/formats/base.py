"""What a format of logs has to provide."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import polars as pl

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


def training_file(source: Format, path: Path) -> Path:
    """The file of the training part, or `path` itself where that is the whole log."""
    return (source.parts(path) or {"train": path})["train"]


def split_files(path: Path, suffixes: Sequence[str]) -> dict[str, Path] | None:
    """The files `train.*`, `valid.*` and `test.*` of a directory, or None when `path` is a file.

    Raises:
        ValueError: if the directory has no train file.
    """
    if not path.is_dir():
        return None
    found: dict[str, Path] = {}
    for part in PARTS:
        for name in (part, "validation" if part == "valid" else part):
            for suffix in suffixes:
                if part not in found and (path / f"{name}{suffix}").is_file():
                    found[part] = path / f"{name}{suffix}"
    if "train" not in found:
        wanted = " or ".join(f"train{suffix}" for suffix in suffixes)
        raise ValueError(f"{path} is a directory without {wanted}")
    return found
