"""Files of text lines: read in blocks, unpacked on the way."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# Text is cut into blocks of about this many bytes: large enough for the parser to be at full speed, small enough
# that a block with its parsed columns stays well below 100 MB.
BLOCK_BYTES = 8 << 20
# Longest text between quotes that may hold line ends; beyond it, a quote is taken for a mistake.
_MOST_QUOTED_BYTES = 1 << 17
# No line of a log is that long: the file is not text in lines.
_LONGEST_LINE_BYTES = 64 << 20


def read_blocks(path: Path, block_bytes: int = BLOCK_BYTES, *, quotes: bool = True) -> Iterator[bytes]:
    """The bytes of a file, unpacked when it ends in `.gz`, cut after line ends (outside quotes, if these count).

    Raises:
        ValueError: if the file is empty, or its gzip stream is damaged or cut short, or it does not consist of lines.
    """
    rest = b""
    empty = True
    with _open(path) as file:
        while True:
            try:
                data = file.read(block_bytes)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path}: the gzip stream is damaged or cut short: {error}") from None
            if not data:
                break
            empty = False
            data = rest + data
            end = _last_line_end(data) if quotes else data.rfind(b"\n") + 1
            if len(data) - end > _MOST_QUOTED_BYTES:
                # No text between quotes is that long: a quote is not closed, or stands for inches.
                end = data.rfind(b"\n") + 1
            if end:
                yield data[:end]
            rest = data[end:]
            if len(rest) > _LONGEST_LINE_BYTES:
                raise ValueError(f"{path}: a line is longer than {_LONGEST_LINE_BYTES >> 20} MiB: not text in lines")
    if empty:
        raise ValueError(f"{path} is empty")
    if rest:
        yield rest


def _open(path: Path) -> IO[bytes]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _last_line_end(data: bytes) -> int:
    """Where the last whole line ends; a line end between quotes does not count."""
    end = data.rfind(b"\n") + 1
    if b'"' not in data:
        return end
    quotes = data.count(b'"', 0, end)
    while end and quotes % 2:
        before = data.rfind(b"\n", 0, end - 1) + 1
        quotes -= data.count(b'"', before, end)
        end = before
    return end


def first_line(path: Path) -> str:
    """The first line of a text file, without its line end.

    Raises:
        ValueError: if the file is empty or the line is not UTF-8.
    """
    with _open(path) as file:
        try:
            line = file.readline(1 << 20)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: the gzip stream is damaged or cut short: {error}") from None
    if not line:
        raise ValueError(f"{path} is empty")
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} line 1: not UTF-8 text") from None
