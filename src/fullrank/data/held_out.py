"""Validation rows for a log that is published as a train and a test file."""

# Shapes: n rows of a chunk.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fullrank.data.chunk import Chunk
from fullrank.data.formats.base import Format, HoldsOut
from fullrank.data.formats.lines import read_blocks
from fullrank.data.splits import PARTS, TRAIN, VALID, Parts, SplitSpec, by_user
from fullrank.schema import Schema


@dataclass(frozen=True)
class Validation:
    """Where the validation rows of a log in files come from.

    Attributes:
        files: of each part; one file may serve two.
        of_train: part of each row of the train file, if some of them are set aside.
        source: one phrase for `dataset.json`.
    """

    files: dict[str, Path]
    of_train: Callable[[Chunk], Parts] | None
    source: str

    def parts(self, part: str, chunk: Chunk) -> Parts:
        """Part of each row of the file of `part`."""
        if self.of_train is not None and part == PARTS[TRAIN]:
            return self.of_train(chunk)
        return np.full(chunk.rows, PARTS.index(part), dtype=np.int8)


def validation(source: Format, files: dict[str, Path], split: SplitSpec, schema: Schema) -> Validation:
    """The published validation file; or, where there is none and the format says how, a share of the train file.

    With `split.protocol` "bars" the test file is read as the validation part too.

    Raises:
        ValueError: if the train file is to be divided by users and the schema names no user_id.
    """
    if "valid" in files:
        return Validation(files, None, "published file")
    if split.protocol == "bars" and "test" in files:
        both = {"train": files["train"], "valid": files["test"], "test": files["test"]}
        return Validation(both, None, "the test rows (protocol bars)")
    if not isinstance(source, HoldsOut) or split.valid == 0:
        return Validation(files, None, "none")
    if source.held_out == "users":
        if schema.keys.user_id is None:
            raise ValueError(
                f"{files['train']}: validation rows are those of {split.valid:.0%} of the users, and the schema names "
                "no user_id among its keys"
            )
        of_users = split.model_copy(update={"test": 0.0})

        def users(chunk: Chunk) -> Parts:
            return by_user(chunk.keys["user_id"], of_users)

        return Validation(files, users, f"{split.valid:.0%} of the users of the train file")
    last_train = round(_count_lines(files["train"]) * (1 - split.valid))

    def rows(chunk: Chunk) -> Parts:
        lines: npt.NDArray[np.int64] = chunk.line(np.arange(chunk.rows))
        return np.where(lines > last_train, VALID, TRAIN).astype(np.int8)

    return Validation(files, rows, f"last {split.valid:.0%} of the train file")


def _count_lines(file: Path) -> int:
    return sum(block.count(b"\n") for block in read_blocks(file))
