"""Content vectors of items in a file: columns of numbers as they are, or text turned into numbers."""

# Shapes: N items, D width.

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import polars as pl
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fullrank.data import atomic
from fullrank.data.hashing import hash_series
from fullrank.extras import needs

TextModel = Literal["ngrams", "wordllama"]

DESCRIPTION, STATE = "content.json", "content.safetensors"
# Of character n-grams: their lengths, the places that they are hashed to, the width of the vectors.
_LENGTHS = (3, 4, 5)
_PLACES = 1 << 15
_WIDTH = 128


class NgramVectors:
    """Vectors of texts without a model: character n-grams, hashed, weighed by rarity, projected at random.

    A word is a row of letters and digits in lower case, with a mark at either end; its n-grams and the word itself
    count. Each of 2^15 places has a random vector; a text is the sum of those of its n-grams, 1 + log count times
    log((1 + N) / (1 + texts with it)) each, at length 1. Texts that share words and word stems are near one another;
    two words that mean the same are not.
    """

    def __init__(self, weight_P: Tensor) -> None:
        self.weight_P = weight_P
        self.vectors_PD = torch.randn(_PLACES, _WIDTH, generator=torch.Generator().manual_seed(0))

    @classmethod
    def fit(cls, texts: pl.Series) -> NgramVectors:
        """How rare the n-grams are among some texts."""
        grams = _ngrams(texts).unique(["text", "place"])
        seen_P = torch.from_numpy(np.bincount(grams["place"].to_numpy(), minlength=_PLACES))
        return cls(torch.log((1 + len(texts)) / (1 + seen_P.float())))

    def __call__(self, texts: pl.Series) -> Tensor:
        """Shape (N, D); NaN for a text without a word."""
        counts = _ngrams(texts).group_by("text", "place", maintain_order=True).len()
        text_M, place_M, count_M = (
            torch.from_numpy(counts[name].to_numpy().astype(np.int64)) for name in counts.columns
        )
        weight_M = (1 + count_M.double().log()).float() * self.weight_P[place_M]
        sums_ND = torch.zeros(len(texts), _WIDTH)
        for begin in range(0, len(text_M), 1 << 16):
            part = slice(begin, begin + (1 << 16))
            sums_ND.index_add_(0, text_M[part], self.vectors_PD[place_M[part]] * weight_M[part, None])
        return sums_ND.div_(sums_ND.norm(dim=1, keepdim=True))


def _ngrams(texts: pl.Series) -> pl.DataFrame:
    """Number of the text and place of each n-gram in it, as often as it is there."""
    frame = pl.DataFrame({"text": pl.int_range(len(texts), eager=True), "word": texts.cast(pl.String).fill_null("")})
    words = frame.with_columns(pl.col("word").str.to_lowercase().str.extract_all(r"[\p{L}\p{N}]+")).explode("word")
    words = words.drop_nulls().with_columns(pl.format("<{}>", "word").alias("word"))
    length = pl.col("word").str.len_chars()
    parts = [words]
    for size in _LENGTHS:
        long = words.filter(length > size).with_columns(pl.int_ranges(0, length - size + 1).alias("at")).explode("at")
        parts.append(long.select("text", pl.col("word").str.slice(pl.col("at"), size)))
    grams = pl.concat(parts)
    places = (hash_series(grams["word"]) % np.uint64(_PLACES)).astype(np.int64)
    return grams.select("text", place=pl.Series(places))


def wordllama_vectors(texts: pl.Series) -> Tensor:
    """Vectors of texts by WordLlama's table of 256 numbers a token, at length 1; NaN for an empty text.

    Raises:
        MissingExtra: if it is not installed.
    """
    with needs("text", "the text model wordllama"):
        import wordllama
        from wordllama import WordLlama
    # Its tokenizer is in the package, where it does not look by itself.
    model = WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    filled = texts.cast(pl.String).fill_null("")
    vectors_ND = torch.from_numpy(np.asarray(model.embed(filled.to_list()), dtype=np.float32))
    vectors_ND[torch.from_numpy((filled.str.strip_chars() == "").to_numpy().copy())] = torch.nan
    return vectors_ND.div_(vectors_ND.norm(dim=1, keepdim=True))


class Content:
    """Which columns of a file of items are their content, and how they become vectors.

    Args:
        vector: one column of lists of numbers, or columns of one number each.
        text: columns of text, read as one.
        text_model: what makes vectors of text.

    Raises:
        ValueError: unless there are either vectors or text.
    """

    def __init__(self, vector: Sequence[str] = (), text: Sequence[str] = (), text_model: TextModel = "ngrams") -> None:
        if bool(vector) == bool(text):
            raise ValueError("expected either columns of numbers or columns of text as content")
        if text_model not in get_args(TextModel):
            raise ValueError(f'text model: expected one of {", ".join(get_args(TextModel))}, got "{text_model}"')
        self.vector, self.text, self.text_model = tuple(vector), tuple(text), text_model
        self._ngrams: NgramVectors | None = None

    def fit(self, frame: pl.DataFrame) -> Content:
        """Learn from items what vectors of text need to know of them."""
        if self.text and self.text_model == "ngrams":
            self._ngrams = NgramVectors.fit(self._texts(frame))
        return self

    def __call__(self, frame: pl.DataFrame) -> Tensor:
        """Content vectors, float32 of shape (N, D); all NaN for an item without content.

        Raises:
            ValueError: if a column is missing, is not of numbers, or has lists of different lengths.
        """
        if not self.text:
            return self._numbers(frame)
        texts = self._texts(frame)
        if self.text_model == "wordllama":
            return wordllama_vectors(texts)
        assert self._ngrams is not None
        return self._ngrams(texts)

    def _texts(self, frame: pl.DataFrame) -> pl.Series:
        _require(frame, self.text)
        return frame.select(
            pl.concat_str(pl.col(self.text).cast(pl.String), separator=" ", ignore_nulls=True)
        ).to_series()

    def _numbers(self, frame: pl.DataFrame) -> Tensor:
        _require(frame, self.vector)
        columns = [frame[name] for name in self.vector]
        first = columns[0]
        if len(columns) == 1 and first.dtype.is_nested():
            lengths = first.drop_nulls().list.len() if isinstance(first.dtype, pl.List) else None
            if lengths is not None and lengths.n_unique() > 1:
                low, high = lengths.to_numpy().min(), lengths.to_numpy().max()
                raise ValueError(f'column "{first.name}" has lists of {low} to {high} numbers, expected one length')
            width = len(first.drop_nulls()[0]) if first.null_count() < len(first) else 0
            lists = first.cast(pl.List(pl.Float32), strict=False).list.to_array(width) if width else None
            if lists is None:
                raise ValueError(f'column "{first.name}" has no vector')
            rows = np.full((len(first), width), np.nan, dtype=np.float32)
            rows[lists.is_not_null().to_numpy()] = lists.drop_nulls().to_numpy()
            return torch.from_numpy(rows)
        for column in columns:
            if not column.dtype.is_numeric():
                raise ValueError(f'column "{column.name}" is {column.dtype}, expected numbers or lists of numbers')
        rows = np.stack([column.cast(pl.Float32).fill_null(math.nan).to_numpy() for column in columns], 1)
        return torch.from_numpy(rows)

    def save(self, directory: Path) -> None:
        """Write `content.json`, and `content.safetensors` if something was learnt."""
        if self._ngrams is not None:
            atomic.write_bytes(directory / STATE, to_safetensors({"weight": self._ngrams.weight_P}))
        said = {"vector": self.vector, "text": self.text, "text_model": self.text_model}
        atomic.write_text(directory / DESCRIPTION, json.dumps(said, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Content:
        """Read what `save` wrote.

        Raises:
            ValueError: if it is missing or damaged.
        """
        place = Path(directory) / DESCRIPTION
        try:
            content = cls(**json.loads(place.read_text(encoding="utf-8")))
            if content.text and content.text_model == "ngrams":
                content._ngrams = NgramVectors(from_safetensors((Path(directory) / STATE).read_bytes())["weight"])
        except FileNotFoundError as error:
            raise ValueError(f"{directory} holds no codes: {Path(error.filename).name} is missing") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{place} is damaged: {error}") from None
        return content


def _require(frame: pl.DataFrame, columns: Sequence[str]) -> None:
    for name in columns:
        if name not in frame.columns:
            raise ValueError(f'there is no column "{name}"; the items have {", ".join(frame.columns)}')


def read_items(path: Path) -> pl.DataFrame:
    """Items of a Parquet or CSV file.

    A column of text in brackets, [0.1, 0.2], or of numbers with blanks between them, in a CSV file is one of lists.

    Raises:
        ValueError: if it is missing, or is neither.
    """
    try:
        if path.suffix in (".parquet", ".pq"):
            return pl.read_parquet(path)
        return pl.read_csv(io.BytesIO(path.read_bytes()), infer_schema_length=10_000)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None


def as_lists(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """The items with a column of text as lists of numbers, if its texts are that.

    Raises:
        ValueError: if one is not; names the row.
    """
    if column not in frame.columns or frame[column].dtype != pl.String:
        return frame
    parts = frame[column].str.strip_chars(" []").str.extract_all(r"[^\s,;]+")
    numbers = parts.list.eval(pl.element().cast(pl.Float32, strict=False))
    wrong = (numbers.list.eval(pl.element().is_null()).list.any() | (parts.list.len() == 0)).fill_null(False)
    if wrong.any():
        row = int(wrong.arg_true()[0])
        raise ValueError(f'column "{column}" has "{str(frame[column][row])[:40]}" in row {row + 1}, expected numbers')
    return frame.with_columns(numbers.alias(column))
