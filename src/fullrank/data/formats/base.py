"""What a format of logs has to provide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from fullrank.data.raw import RawChunk
from fullrank.schema import Schema


class Format(Protocol):
    """A way in which logs are stored.

    A format that comes as a directory of several files takes the directory as `path`.
    """

    name: str

    def default_schema(self, path: Path) -> Schema:
        """The unfitted schema to use when the user gives none.

        Raises:
            ValueError: if `path` is not in this format.
        """
        ...

    def chunks(self, path: Path, schema: Schema) -> Iterator[RawChunk]:
        """The rows of `path` in order, about 10^5 at a time, in bounded memory. Called once per import and part.

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
