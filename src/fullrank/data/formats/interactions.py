"""Lists of interactions: one line for each user, `user item item ...`, as implicit-feedback benchmarks publish them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import polars as pl

from fullrank.data.formats.base import split_files, training_file
from fullrank.data.formats.lines import first_line, read_blocks
from fullrank.data.hashing import hash_series
from fullrank.data.raw import LINE_COLUMN, RawChunk, check_columns, raw_columns, rejected_table
from fullrank.data.spelling import as_text
from fullrank.data.splits import PARTS, SplitSpec, by_hash
from fullrank.schema import MISSING_MARKERS, Categorical, Keys, Label, Schema

_COLUMNS = ("user_id", "item_id", "label", "split")
# About 10^5 items.
_BLOCK_BYTES = 1 << 19
_SHOWN = 200


class Interactions:
    """A file, or a directory of `train.txt`, `test.txt` and, if there is one, `valid.txt`; a line is a user and this
    user's items, separated by blanks or commas. A user may have several lines, and a line no item.

    Each item gives a row with label 1: nothing says what was shown and left. Of a single file, a tenth of the pairs is
    validation and a tenth test, drawn by a hash of user and item; files of parts are taken as they are.
    """

    name = "interactions"
    split_column = "split"

    def default_schema(self, path: Path) -> Schema:
        file = training_file(self, path)
        if len(_cut(pl.Series([first_line(file)]))[0]) < 2:
            raise ValueError(f'{file} line 1: expected "user item item ..."')
        ids = (Categorical(name="user_id", role="user"), Categorical(name="item_id", role="item"))
        return Schema(features=ids, labels=(Label(name="label"),), keys=Keys(user_id="user_id", item_id="item_id"))

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        wanted = list(dict.fromkeys([*raw_columns(schema), *extra]))
        check_columns(path, wanted, _COLUMNS)
        line = 1
        for block in read_blocks(path, _BLOCK_BYTES, quote=b""):
            texts = pl.Series([part.decode("utf-8", "replace") for part in block.split(b"\n")], dtype=pl.String)
            lines = pl.Series(LINE_COLUMN, range(line, line + len(texts)), dtype=pl.Int64)
            line += block.count(b"\n")
            damaged = texts.str.contains("\ufffd", literal=True)
            shown = zip(lines.filter(damaged), texts.filter(damaged).str.slice(0, _SHOWN), strict=True)
            rejected = rejected_table([(number, "", "not UTF-8", text) for number, text in shown])
            tokens = _cut(texts)
            frame = pl.DataFrame({"user_id": tokens.list.first(), "item_id": tokens.list.slice(1), LINE_COLUMN: lines})
            frame = frame.filter(~damaged).explode("item_id").drop_nulls("item_id")
            pairs = frame.select(as_text(frame[name], MISSING_MARKERS) for name in ("user_id", "item_id"))
            hashes = hash_series(pairs.select(pl.concat_str(pl.all().fill_null(""), separator=" ")).to_series())
            yield RawChunk(
                frame.with_columns(
                    *pairs,
                    label=pl.lit(1, pl.Int8),
                    split=pl.Series(np.array(PARTS)[by_hash(hashes, SplitSpec())], dtype=pl.String),
                ).select(*wanted, LINE_COLUMN),
                rejected,
            )

    def parts(self, path: Path) -> dict[str, Path] | None:
        return split_files(path, (".txt", ".csv", ".tsv", ".dat"))


def _cut(texts: pl.Series) -> pl.Series:
    return texts.str.strip_chars(" \t\r,;").str.replace_all(r"[\s,;]+", " ").str.split(" ")
