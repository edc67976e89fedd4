"""Learning-to-rank text: `grade qid:id feature:value ... # comment` (SVMrank, LETOR, MSLR-WEB, Istella, Yahoo)."""

# Shapes: n rows of a block, p entries of all of them.

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import polars as pl

from fullrank.data.formats.base import split_files, training_file
from fullrank.data.formats.lines import read_blocks
from fullrank.data.raw import LINE_COLUMN, RawChunk, check_columns, raw_columns, rejected_table
from fullrank.schema import Categorical, Keys, Label, Numeric, Schema

_BLOCK_BYTES = 1 << 20
# So much of a file is looked at for the features that it has.
_SAMPLE_BYTES = 64 << 20
_MOST_FEATURES = 20_000
# Numbers of a chunk; rows with many features come fewer at a time.
_CHUNK_NUMBERS = 4 << 20
_ENTRY = re.compile(rb"[ \t](\d{1,9}):")
_GRADE = re.compile(rb"^([^\s#]+)[ \t]", re.MULTILINE)
_SHOWN = 200


class Letor:
    """A file, or a directory of `train.txt`, `vali.txt` or `valid.txt`, and `test.txt`.

    The grade is the label (a regression, unless all grades are 0 or 1), the query id is a feature of the user's side
    and the user key, so that metrics per user are metrics per query; `feature_<index>` are numbers, 0 where an entry
    is left out. Comments are not read.
    """

    name = "letor"

    def default_schema(self, path: Path) -> Schema:
        file = training_file(self, path)
        indices: set[int] = set()
        grades: set[bytes] = set()
        queries = False
        size = 0
        for block in read_blocks(file, _BLOCK_BYTES, quote=b""):
            text = re.sub(rb"#[^\n]*", b"", block)
            indices.update(map(int, _ENTRY.findall(text)))
            grades.update(_GRADE.findall(text))
            queries |= b"qid:" in text
            size += len(block)
            if size > _SAMPLE_BYTES or len(indices) > _MOST_FEATURES:
                break
        if not indices:
            raise ValueError(f'{file}: expected "grade qid:id feature:value ...", found no feature:value')
        if len(indices) > _MOST_FEATURES:
            raise ValueError(
                f"{file}: more than {_MOST_FEATURES:,} features; if they are ids, all of value 1, use the format libfm"
            )
        numbers = [Numeric(name=f"feature_{index}", role="item", transform="standard") for index in sorted(indices)]
        binary = grades <= {b"0", b"1", b"-1", b"+1", b"0.0", b"1.0"}
        label = Label(name="grade", kind="binary" if binary else "regression")
        if not queries:
            return Schema(features=tuple(numbers), labels=(label,))
        query = Categorical(name="qid", role="user")
        return Schema(features=(query, *numbers), labels=(label,), keys=Keys(user_id="qid"))

    def chunks(self, path: Path, schema: Schema, extra: Collection[str] = ()) -> Iterator[RawChunk]:
        wanted = list(dict.fromkeys([*raw_columns(schema), *extra]))
        indices = {
            name: int(name.removeprefix("feature_")) for name in wanted if re.fullmatch(r"feature_\d{1,9}", name)
        }
        check_columns(path, wanted, ["grade", "qid", *indices])
        line = 1
        for block in read_blocks(path, _BLOCK_BYTES, quote=b""):
            texts, rejected = _decoded(block, line)
            step = max(_CHUNK_NUMBERS // (len(indices) + 1), 1)
            lines = np.arange(line, line + len(texts))
            for first in range(0, len(texts), step):
                yield _rows(texts[first : first + step], lines[first : first + step], indices, wanted, rejected)
                rejected = []
            line += block.count(b"\n")

    def parts(self, path: Path) -> dict[str, Path] | None:
        if path.is_dir() and (path / "vali.txt").is_file() and (path / "train.txt").is_file():
            parts = {"train": path / "train.txt", "valid": path / "vali.txt", "test": path / "test.txt"}
            return {part: file for part, file in parts.items() if file.is_file()}
        return split_files(path, (".txt", ".letor", ".svm", ".libsvm", ".dat"))


def _decoded(block: bytes, line: int) -> tuple[pl.Series, list[tuple[int, str, str, str]]]:
    """Lines without their comments, and those that are no text."""
    rejected: list[tuple[int, str, str, str]] = []
    try:
        texts = block.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        texts = []
        for place, piece in enumerate(block.split(b"\n")):
            # What is wrong in a comment does no harm.
            body = piece.partition(b"#")[0]
            if body.isascii():
                texts.append(body.decode("ascii"))
            else:
                texts.append("")
                shown = piece[:_SHOWN].decode("utf-8", "backslashreplace")
                rejected.append((line + place, "", "not ASCII text", shown))
    return pl.Series(texts, dtype=pl.String).str.split_exact("#", 1).struct.field("field_0").str.strip_chars(), rejected


def _rows(
    texts: pl.Series,
    lines: np.ndarray[tuple[int], np.dtype[np.int64]],
    indices: dict[str, int],
    wanted: list[str],
    rejected: list[tuple[int, str, str, str]],
) -> RawChunk:
    rows = len(texts)
    tokens = texts.str.replace_all(r"\s+", " ").str.split(" ").to_frame("token").with_row_index("row").explode("token")
    tokens = tokens.with_columns(place=pl.int_range(pl.len()).over("row"))
    first = tokens["place"] == 0
    grades = tokens.filter(first)["token"]
    entries = tokens.filter(~first)
    pairs = entries["token"].str.splitn(":", 2).struct.unnest()
    is_query = pairs["field_0"] == "qid"
    queries = np.full(rows, None, dtype=object)
    queries[entries["row"].filter(is_query).to_numpy()] = pairs["field_1"].filter(is_query).to_list()
    row = entries["row"].filter(~is_query).to_numpy().astype(np.int64)
    index = pairs["field_0"].filter(~is_query).cast(pl.Int64, strict=False)
    value = pairs["field_1"].filter(~is_query).cast(pl.Float64, strict=False)
    wrong = (index.is_null() | ~value.is_finite().fill_null(False)).to_numpy()
    bad = np.zeros(rows, dtype=bool)
    if wrong.any():
        shown = entries["token"].filter(~is_query)
        for place in np.flatnonzero(wrong):
            if not bad[row[place]]:
                rejected.append((int(lines[row[place]]), "", "not an entry feature:value", shown[int(place)][:_SHOWN]))
            bad[row[place]] = True
    places = {index: column for column, index in enumerate(indices.values())}
    known = index.replace_strict(places, default=-1, return_dtype=pl.Int64).fill_null(-1).to_numpy()
    keep = (known >= 0) & ~wrong
    numbers = np.zeros((len(indices), rows))
    numbers[known[keep], row[keep]] = value.fill_null(0.0).to_numpy()[keep]
    columns: dict[str, pl.Series] = {name: pl.Series(numbers[column]) for column, name in enumerate(indices)}
    columns["grade"] = grades.replace({"-1": "0", "+1": "1"})
    columns["qid"] = pl.Series(queries.tolist(), dtype=pl.String)
    frame = pl.DataFrame({name: columns[name] for name in wanted})
    frame = frame.with_columns(pl.Series(LINE_COLUMN, lines))
    filled = (texts != "").to_numpy()
    return RawChunk(frame.filter(pl.Series(filled & ~bad)), rejected_table(rejected))
