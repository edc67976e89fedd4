"""What a text file of separated fields looks like: separator, names, where the rows begin; guessed and checked."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fullrank.data.formats.lines import ENCODING_CURE, read_blocks
from fullrank.data.formats.options import ReadOptions

# In order of preference where several divide the sample alike; a space only where no other does.
SEPARATORS = (",", "\t", ";", "|", "\x01", "::", " ")
_SPOKEN = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar", "\x01": "control-A", " ": "space"}
# The first bytes and lines that guesses are made from and checked on.
_SAMPLE_BYTES = 1 << 18
_SAMPLE_LINES = 1000
# Share of the sample's lines that must have as many fields as the first.
_AGREEMENT = 0.9
_NAMELESS = "__nameless_"
_SEPARATOR_LINE = re.compile(r'"?sep=(.|\t)"?\s*', re.IGNORECASE)
_VALUE = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|\d{4}-\d\d-\d\d([T ].*)?|")
# No column is named so: a number with a fraction, or a time in seconds.
_MEASURED = re.compile(r"[-+]?\d+\.\d+|\d{9,}")
_TYPED = re.compile(r"[^:]+:(token|token_seq|float|float_seq)")


@dataclass(frozen=True)
class Layout:
    """How rows are laid out in a text file.

    Attributes:
        names: of every column, in order; those that have none in the file begin with `__nameless_`.
        separator: between fields.
        quote: character around texts that may hold separators and line ends; empty if there is none.
        skipped: lines before the first row.
        encoding: of the text; None: what a byte order mark says, else UTF-8.
        trimmed: spaces around separators do not belong to the values.
        comments: lines of another number of fields that begin with # are no rows.
        header: the line with the names looks like names; if not, `values` shows it.
        notes: what was guessed, for the user.
    """

    names: tuple[str, ...]
    separator: str
    quote: str = '"'
    skipped: int = 1
    encoding: str | None = None
    trimmed: bool = False
    comments: bool = False
    values: str = ""
    notes: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """The columns that have a name."""
        return tuple(name for name in self.names if not name.startswith(_NAMELESS))


def text_layout(path: Path, options: ReadOptions | None = None) -> Layout:
    """The layout of a text file whose first line holds names, unless the options say otherwise.

    Raises:
        ValueError: if the file is empty, its first lines are not UTF-8 (or in the encoding), they are JSON, or name a
            column twice.
    """
    options = options or ReadOptions()
    lines = _sample(path, options.encoding)
    quote = {None: '"', "none": ""}.get(options.quote, options.quote or "")
    separator, begin = options.separator, 0
    said = _SEPARATOR_LINE.fullmatch(lines[0])
    if said is not None and separator is None:
        separator, begin = said[1], 1
    comments: list[str] = []
    while begin < len(lines) and (not lines[begin].strip() or (options.header and lines[begin].startswith("#"))):
        comments += [lines[begin]] if lines[begin].strip() else []
        begin += 1
    if begin == len(lines):
        raise ValueError(f"{path} has comments or blank lines alone" if len(lines) > 1 else f"{path} is empty")
    if lines[begin].startswith("{") and separator is None and _is_json(lines[begin]):
        raise ValueError(f"{path} holds JSON lines: use the format jsonl")
    rows = lines[begin:]
    aligned = separator in (None, " ") and _aligned(rows, quote)
    if aligned:
        separator, rows = " ", [" ".join(row.split()) for row in rows]
    if separator is None:
        separator = _separator(rows, quote)
    where = f"{path} line {begin + 1}"
    first = _fields(where, rows[0], separator, quote)
    notes = [f"separator {_SPOKEN.get(separator, separator)}, {len(first)} columns"]
    skipped, values = begin + 1, ""
    if not options.header:
        names = list(options.columns) or [f"column_{place}" for place in range(1, len(first) + 1)]
        if len(names) != len(first):
            raise ValueError(f"{where}: {len(first)} fields, and --columns has {len(names)} names")
        skipped, first = begin, names
    elif options.columns:
        if len(options.columns) != len(first):
            raise ValueError(f"{where}: {len(first)} names, and --columns has {len(options.columns)}")
        first = list(options.columns)
    else:
        above = _fields(where, comments[-1].lstrip("# "), separator, quote) if comments else []
        below = [line.split(separator) for line in rows[1:100]]
        if len(above) == len(first) and not _are_values(above, []) and _are_values(first, below, surely=False):
            first, skipped = above, begin
            notes.append("the names are those of the comment line above the rows")
        elif _are_values(first, below):
            values = rows[0][:60]
    names, more = _names(path, begin + 1, first, rows[1:], separator, quote)
    trimmed = aligned or (separator not in "\t \x01" and _spaced(rows, separator))
    if aligned:
        notes.append("columns are aligned with spaces")
    elif trimmed:
        notes.append("spaces around separators are left out")
    return Layout(
        names=tuple(names),
        separator=separator,
        quote=quote,
        skipped=skipped,
        encoding=options.encoding,
        trimmed=trimmed,
        comments=bool(comments),
        values=values,
        notes=(*notes, *more),
    )


def check_header(path: Path, layout: Layout) -> None:
    """That the names are names.

    Raises:
        ValueError: if they look like the values of a row, there is only one, or they carry types.
    """
    if layout.values:
        raise ValueError(
            f'{path} line {layout.skipped}: "{layout.values}" are values, not names: is the header line missing? '
            "Name the columns with --no-header --columns NAME,NAME,..."
        )
    if len(layout.names) == 1 and re.search(r"\W", layout.names[0]):
        raise ValueError(
            f'{path} line {layout.skipped}: no separator found in "{layout.names[0][:60]}": pass '
            "--separator (a comma, tab, semicolon, bar, ::, control-A or spaces would have been seen)"
        )
    if len(layout.names) > 1 and all(_TYPED.fullmatch(name) for name in layout.names):
        raise ValueError(f"{path} line {layout.skipped}: the names carry types (RecBole): use the format recbole")


def without_header(first: Layout, other: Layout) -> Layout:
    """The layout of a further file of the same log: that of the first file where it has no names of its own."""
    if other.values and len(other.names) == len(first.names) and set(other.names) != set(first.names):
        return replace(first, skipped=other.skipped - 1)
    return other


def split_line(text: str, separator: str, quote: str) -> list[str]:
    """Fields of one line; a quote that is not closed in it closes at its end."""
    if quote and quote in text and len(separator) == 1:
        return next(csv.reader([text], delimiter=separator, quotechar=quote, skipinitialspace=separator != " "), [])
    return text.split(separator)


def _sample(path: Path, encoding: str | None) -> list[str]:
    """The first whole lines, two at least where there are two."""
    data = b""
    for block in read_blocks(path, _SAMPLE_BYTES, quote=b"", encoding=encoding):
        data += block
        if len(data) >= _SAMPLE_BYTES or data.count(b"\n") > _SAMPLE_LINES:
            break
    pieces = data.split(b"\n", _SAMPLE_LINES + 1)[: _SAMPLE_LINES + 1]
    try:
        lines = [pieces[0].decode("utf-8")]
    except UnicodeDecodeError:
        raise ValueError(f"{path} line 1: not UTF-8 text; {ENCODING_CURE}") from None
    lines += [piece.decode("utf-8", "replace") for piece in pieces[1:]]
    lines = [line.removesuffix("\r") for line in lines]
    return lines[:-1] if len(lines) > 1 and not lines[-1] else lines


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _width(line: str, separator: str, quote: str) -> int:
    if quote and quote in line and len(separator) == 1:
        try:
            return len(split_line(line, separator, quote))
        except csv.Error:
            pass
    return line.count(separator) + 1


def _separator(lines: Sequence[str], quote: str) -> str:
    """The separator that gives most lines as many fields as the first; of several, the one with most fields."""
    rows = [line for line in lines if line.strip()]
    best, most = "", 1
    for separator in SEPARATORS:
        if separator not in rows[0]:
            continue
        widths = [_width(line, separator, quote) for line in rows]
        wide = Counter(widths[1:]).most_common(1)[0][0] if len(widths) > 1 else widths[0]
        agree = sum(width == wide for width in widths[1:])
        # A name may be missing, or a separator stand at the end of each row.
        fits = agree >= _AGREEMENT * (len(widths) - 1) and abs(wide - widths[0]) <= 1 and min(wide, widths[0]) > 1
        # R names its rows, and the header, in quotes, does not count the names.
        named = wide == widths[0] + 1 and bool(quote) and rows[0].startswith(quote)
        if separator == " " and (best or len(rows) < 2 or not (wide == widths[0] or named)):
            continue
        if fits and widths[0] > most:
            best, most = separator, widths[0]
    # Where no separator divides the lines evenly, the first line decides.
    return best or max(SEPARATORS[:-1], key=lambda each: rows[0].count(each))


def _aligned(lines: Sequence[str], quote: str) -> bool:
    """Whether runs of spaces divide all lines into as many words, and no other separator stands in the first."""
    rows = [line for line in lines if line.strip()]
    if not any("  " in row for row in rows) or any(separator in rows[0] for separator in SEPARATORS[:-1]):
        return False
    words = {len(row.split()) for row in rows}
    return len(rows) > 1 and len(words) == 1 and words != {1} and not (quote and any(quote in row for row in rows))


def _fields(where: str, line: str, separator: str, quote: str) -> list[str]:
    try:
        return [field.strip() for field in split_line(line, separator, quote)]
    except csv.Error:
        raise ValueError(
            f"{where}: a field is longer than {csv.field_size_limit():,} characters: a quote that is not closed, or "
            "not text in separated fields"
        ) from None


def _are_values(fields: Sequence[str], rows: Sequence[Sequence[str]], *, surely: bool = True) -> bool:
    """Whether a line that should hold names holds values.

    Args:
        rows: fields of the lines below it.
        surely: a number among texts, as in the rows below, is not enough: columns may be named 2019 and 2020.
    """
    filled = [field for field in fields if field]
    if not filled or (all(re.fullmatch(r"\d{1,6}", field) for field in filled) and _counted(filled)):
        return False
    if all(_VALUE.fullmatch(field) for field in fields):
        return True
    rows = [row for row in rows if len(row) == len(fields)]
    if not rows:
        return False
    numbers = texts = measured = False
    for place, field in enumerate(fields):
        if field and _VALUE.fullmatch(field):
            below = all(_VALUE.fullmatch(row[place].strip()) for row in rows)
            numbers |= below
            measured |= below and _MEASURED.fullmatch(field) is not None
        elif field:
            texts |= any(row[place].strip() == field for row in rows)
    return numbers and (not surely or texts or measured)


def _counted(fields: Sequence[str]) -> bool:
    """Whether fields are 0, 1, 2, ... or 1, 2, 3, ...: the names of columns that have none."""
    numbers = [int(field) for field in fields]
    return len(numbers) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))) and numbers[0] in (0, 1)


def _names(
    path: Path, line: int, first: list[str], rows: Sequence[str], separator: str, quote: str
) -> tuple[list[str], list[str]]:
    """Names of all columns, those without one under names of their own; and what to say of them."""
    for name, count in Counter(name for name in first if name).items():
        if count > 1:
            raise ValueError(f'{path} line {line}: the column "{name}" appears twice (is the header line missing?)')
    if any("\0" in name for name in first):
        raise ValueError(f"{path} line {line}: a name holds a NUL character: not text")
    notes: list[str] = []
    sample = [split_line(row, separator, "" if len(row) > 100_000 else quote) for row in rows[:100] if row.strip()]
    widths = {len(fields) for fields in sample}
    if widths == {len(first) + 1} and all(not fields[-1].strip() for fields in sample):
        first = [*first, ""]
    elif widths == {len(first) + 1} and len(sample) > 2 and len({fields[0] for fields in sample}) == len(sample):
        first = ["", *first]
        notes.append("the rows have a name each, which the header does not count")
    elif widths == {len(first) - 1} and not first[-1]:
        first = first[:-1]
    names: list[str] = []
    for place, name in enumerate(first, start=1):
        names.append(name or f"{_NAMELESS}{place}")
        if not name:
            notes.append(f"column {place} has no name and is left out")
    return names, notes


def _spaced(rows: Sequence[str], separator: str) -> bool:
    """Whether a space follows (nearly) every separator."""
    separators = sum(row.count(separator) for row in rows)
    return separators > 0 and sum(row.count(separator + " ") for row in rows) >= _AGREEMENT * separators
