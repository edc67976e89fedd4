"""What a sample shows of one column: what its values are, without regard to the other columns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import polars as pl

from fullrank.data.spelling import as_text
from fullrank.data.values import as_numbers, is_value

LABEL_NAMES = (
    "label", "click", "clicked", "is_click", "isclick", "is_clicked", "clk", "y", "target", "conversion", "purchase",
    "rating",
)  # fmt: skip
# How columns name two classes; the first is the 1.
_CLASSES = (
    ("yes", "no"), ("y", "n"), ("t", "f"), ("true", "false"), ("1", "-1"), ("pos", "neg"), ("positive", "negative"),
    ("click", "no_click"), ("clicked", "not_clicked"), ("+", "-"), ("+1", "-1"),
)  # fmt: skip
CLASS_NAMES = (*LABEL_NAMES, "class", "income", "response", "outcome", "converted", "purchased")
# Column types that some files write behind a name, as in `item_id:token`.
_TYPED = ("token", "float", "token_seq", "float_seq")
_SEPARATORS = ("^", "|", ";")
HISTORY_WORDS = ("history", "hist", "sequence", "seq")
# An integer column with more distinct values than this, not named like an id, is taken for a quantity.
_MOST_CODES = 1000
# So many bad values do not change what a column is: they are the importer's to reject.
BAD_SHARE = 0.01


@dataclass(frozen=True)
class Facts:
    """What a sample shows of a column.

    Attributes:
        dtype: as stored; of text, what the text holds.
        distinct: number of different values.
        missing, bad: shares of rows without a value, and of rows that are no number in a column of numbers.
        repeated: share of the values that stood in an earlier row.
        top: the most frequent value.
        is_readable: whether each row has a value or a list of them; nothing else is known of other columns.
        is_list, separator, numbers_in_list: lists, what joins them in a text, and whether their elements are numbers.
        is_number, is_integer, lowest: numbers, whether all are whole, and the lowest.
        is_quantity: numbers whose size means something, as that of a code does not.
        all_distinct: no value recurs, in more than a hundred rows.
        is_binary: 0 and 1, or two texts of which `positive` means 1 and `negative` 0.
    """

    dtype: str
    distinct: int
    missing: float
    top: str
    is_readable: bool = True
    is_list: bool = False
    separator: str | None = None
    is_number: bool = False
    is_integer: bool = False
    is_quantity: bool = False
    all_distinct: bool = False
    lowest: float = 0.0
    is_binary: bool = False
    numbers_in_list: bool = False
    bad: float = 0.0
    repeated: float = 0.0
    positive: str = ""
    negative: str = ""


def facts_of(column: pl.Series, missing: Collection[str]) -> Facts:
    """Look at a column; `missing` are the texts that stand for no value."""
    rows = max(len(column), 1)
    dtype = str(column.dtype)
    nested = isinstance(column.dtype, (pl.List, pl.Array))
    elements = column.explode().drop_nulls() if nested else column
    if not is_value(elements.dtype):
        return Facts(dtype=dtype, distinct=0, missing=column.null_count() / rows, top="", is_readable=False)
    if nested:
        top = str(column.drop_nulls().head(1).to_list()[0])[:60] if column.null_count() < len(column) else ""
        return Facts(
            dtype=dtype, distinct=elements.n_unique(), missing=column.null_count() / rows, top=top, is_list=True,
            numbers_in_list=elements.dtype.is_float(),
        )  # fmt: skip
    text = as_text(column.cast(pl.String) if column.dtype.is_temporal() else column, missing)
    typed = _typed(column.name)
    present = text.drop_nulls()
    counts = present.value_counts(sort=True).head(1)
    distinct = present.n_unique()
    numbers, wrong, infinite = as_numbers(present)
    bad = wrong | infinite
    is_number = len(present) > 0 and bad.mean() <= BAD_SHARE and not column.dtype.is_temporal()
    is_number &= not typed.endswith("seq")
    numbers = numbers[~bad]
    is_integer = bool(is_number and (numbers == numbers.round()).all())
    lowest = float(numbers.min()) if is_number else 0.0
    named_id = bare_name(column.name).endswith(("id", "code", "_no")) or column.dtype == pl.Boolean or typed == "token"
    separator = None if is_number or typed == "token" else _separator(present, bare_name(column.name), typed)
    zeros_and_ones = is_number and ((numbers != 0) & (numbers != 1)).sum() + bad.sum() <= BAD_SHARE * len(present)
    positive, negative = ("", "") if zeros_and_ones or distinct != 2 else _classes(present, bare_name(column.name))
    if column.dtype == pl.String:
        kind = "integer" if is_integer else "number" if is_number else "list" if separator else "text"
        dtype = kind if len(present) else "empty"
    return Facts(
        dtype=dtype,
        distinct=distinct,
        missing=(rows - len(present)) / rows if len(column) else 0.0,
        top="" if not counts.height else str(counts.row(0)[0])[:60],
        is_list=separator is not None,
        separator=separator,
        is_number=is_number,
        is_integer=is_integer,
        is_quantity=is_number and not named_id and (not is_integer or distinct > _MOST_CODES or typed == "float"),
        all_distinct=distinct == len(present) and len(present) > 100,
        lowest=lowest,
        is_binary=bool(zeros_and_ones) or bool(positive),
        bad=float(bad.sum()) / rows if is_number else 0.0,
        repeated=1.0 - distinct / max(len(present), 1),
        positive=positive,
        negative=negative,
    )


def bare_name(name: str) -> str:
    """A name in small letters, without the type that some files write behind it."""
    bare, _, kind = name.lower().rpartition(":")
    return bare if kind in _TYPED else name.lower()


def _typed(name: str) -> str:
    kind = name.lower().rpartition(":")[2]
    return kind if kind in _TYPED and ":" in name else ""


def _separator(present: pl.Series, bare: str, typed: str) -> str | None:
    """The character that joins lists: it stands in at least a tenth of the texts, and cutting there finds elements that
    stand in other texts too. Commas and blanks stand in ordinary text as well: they join only what looks like ids.
    Square brackets hold lists in any case."""
    if typed.endswith("seq"):
        return " "
    if len(present) and present.str.contains(r"(?s)^\[.*\]$").mean() > 1 - BAD_SHARE:  # type: ignore[operator]
        return "," if present.str.contains(",", literal=True).any() else " "
    texts = present.unique(maintain_order=True)
    for separator in (*_SEPARATORS, ",", " "):
        if present.str.contains(separator, literal=True).sum() < max(len(present) // 10, 1):
            continue
        joined = texts.filter(texts.str.contains(separator, literal=True))
        pieces = texts.str.split(separator).explode().str.strip_chars()
        if pieces.n_unique() == len(pieces):
            continue
        integers = pieces.str.contains(r"^[0-9]+$").mean() == 1.0
        if separator == ",":
            spaced = bool(joined.str.contains(", ", literal=True).any())
            decimal = integers and bool((joined.str.count_matches(",") == 1).all()) and not spaced
            # `Apple, Inc.` and `Zara, Inc.` are names.
            names = spaced and 3 * pieces.n_unique() > len(pieces)
            if decimal or not (integers or (pieces.str.contains(r"^[^\s]+$").all() and not names)):
                continue
        if separator == " " and not integers and not any(word in bare for word in HISTORY_WORDS):
            continue
        return separator
    return None


def _classes(present: pl.Series, bare: str) -> tuple[str, str]:
    """Which of the two texts of a column means 1 and which 0; two empty texts if they are no classes.

    Pairs such as yes and no are known; in a column named like a label `>50K` is the 1 beside `<=50K`, what begins with
    a minus is the 0, and else the rarer one is the 1.
    """
    counts = present.value_counts(sort=True)
    frequent, rare = (str(value) for value in counts[present.name].to_list())
    for one, zero in _CLASSES:
        for yes, no in ((frequent, rare), (rare, frequent)):
            if (yes.lower(), no.lower()) == (one, zero):
                return yes, no
    if bare not in CLASS_NAMES or as_numbers(present)[1].mean() <= BAD_SHARE:
        return "", ""
    for yes, no in ((frequent, rare), (rare, frequent)):
        if (yes[0] == ">" and no[0] == "<") or (no[0] == "-" and yes[0] != "-"):
            return yes, no
    return rare, frequent
