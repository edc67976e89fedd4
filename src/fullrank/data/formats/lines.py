"""Files of text lines: unpacked, decoded, and read in blocks of whole lines."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

# Text is cut into blocks of about this many bytes: large enough for the parser to be at full speed, small enough
# that a block with its parsed columns stays well below 100 MB.
BLOCK_BYTES = 8 << 20
# Longest text between quotes that may hold line ends; beyond it, a quote is taken for a mistake.
MOST_QUOTED_BYTES = 1 << 17
# No line of a log is that long: the file is not text in lines.
_LONGEST_LINE_BYTES = 64 << 20
_LONGEST_FIRST_LINE_BYTES = 4 << 20
# What a file begins with, whatever its name.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
}
_ENDINGS = {".gz": "gzip", ".bz2": "bzip2", ".zst": "zstd", ".xz": "xz", ".zip": "zip"}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD_BYTES = 4096
_DAMAGED = (EOFError, OSError, RuntimeError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
# Said where text in another encoding comes to light.
ENCODING_CURE = "if the file is in another encoding, pass --encoding, such as latin-1"


def bare_name(path: Path) -> str:
    """A file's name without the ending of its container, in lower case: `log.csv` of `Log.csv.GZ`."""
    name = path.name.lower()
    return name.removesuffix(next((ending for ending in _ENDINGS if name.endswith(ending)), ""))


def read_blocks(
    path: Path, block_bytes: int = BLOCK_BYTES, *, quote: bytes = b'"', encoding: str | None = None
) -> Iterator[bytes]:
    """The text of a file as UTF-8 without a byte order mark, cut after line ends (outside quotes, if these count).

    A file that is packed with gzip, bzip2, zstd, xz, or is a zip file of one file, is unpacked. Lines end in LF or
    CR LF: where the file has CR alone, LF stands for it.

    Args:
        quote: the character around texts that may hold line ends; empty if there is none.
        encoding: of the text. Default: what a byte order mark says, else UTF-8, which is not checked here.

    Raises:
        ValueError: if the file is empty, its stream is damaged or cut short, the text is not in the encoding, or it
            does not consist of lines.
    """
    rest = b""
    pieces = _texts(path, block_bytes, encoding)
    piece = next(pieces, None)
    if piece is None:
        raise ValueError(f"{path} is empty")
    while piece is not None:
        following = next(pieces, None)
        data = rest + piece if rest else piece
        if following is None:
            yield data
            return
        end = _last_line_end(data, quote) if quote else data.rfind(b"\n") + 1
        if len(data) - end > MOST_QUOTED_BYTES:
            # No text between quotes is that long: a quote is not closed, or stands for inches.
            end = data.rfind(b"\n") + 1
        block, rest = data[:end], data[end:]
        # While a block is worked on, nothing else of its size is held but the next piece.
        data = piece = b""
        if block:
            yield block
            del block
        if len(rest) > _LONGEST_LINE_BYTES:
            raise ValueError(f"{path}: a line is longer than {_LONGEST_LINE_BYTES >> 20} MiB: not text in lines")
        piece = following


def first_line(path: Path, encoding: str | None = None) -> str:
    """The first line of a text file, without its line end.

    Raises:
        ValueError: if the file is empty, the line is not UTF-8 (or in the encoding), or is longer than 4 MiB.
    """
    data, empty = b"", True
    for piece in _texts(path, 1 << 16, encoding):
        empty = False
        data += piece
        if b"\n" in piece:
            break
        if len(data) > _LONGEST_FIRST_LINE_BYTES:
            raise ValueError(f"{path} line 1 is longer than {_LONGEST_FIRST_LINE_BYTES >> 20} MiB: not text in lines")
    if empty:
        raise ValueError(f"{path} is empty")
    try:
        return data.partition(b"\n")[0].removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} line 1: not UTF-8 text; {ENCODING_CURE}") from None


def _texts(path: Path, block_bytes: int, encoding: str | None) -> Iterator[bytes]:
    """Pieces of a file as UTF-8, line ends CR alone made LF; no piece ends between CR and LF."""
    with ExitStack() as stack:
        file, kind = _open(path, stack)

        def read(size: int) -> bytes:
            try:
                return bytes(file.read(size))
            except _DAMAGED as error:
                raise ValueError(f"{path}: the {kind} stream is damaged or cut short: {_brief(error)}") from None

        data = read(max(block_bytes, _HEAD_BYTES))
        head = data[:_HEAD_BYTES]
        marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
        encoding = encoding or marked
        decoder: Any = None
        if encoding is None:
            if head.count(b"\0") * 10 > len(head):
                raise ValueError(
                    f"{path} is not text, or is UTF-16 without a byte order mark: pass --encoding utf-16-le or -be"
                )
        elif codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
            data = data.removeprefix(codecs.BOM_UTF8)
        else:
            decoder = codecs.getincrementaldecoder(encoding)()
        held = b""
        while data or decoder is not None or held:
            text = data
            if decoder is not None:
                try:
                    text = decoder.decode(data, final=not data).encode("utf-8")
                except UnicodeError as error:
                    raise ValueError(f"{path}: not {encoding} text ({_brief(error)}); see --encoding") from None
                decoder = decoder if data else None
            text = held + text if held else text
            held = b""
            following: bytes | None = None
            if data and text.endswith(b"\r"):
                # Whether LF follows decides what this is.
                following = read(block_bytes)
                if following or decoder is not None:
                    text, held = text[:-1], b"\r"
            # Line ends alone decide here, so that the usual text is handed on as it is.
            if b"\r" in text and text.count(b"\r") != text.count(b"\r\n"):
                text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            if text:
                yield text
            data = read(block_bytes) if following is None else following


def _open(path: Path, stack: ExitStack) -> tuple[IO[bytes], str]:
    """A file opened for reading, unpacked on the way, and what it is packed with."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    file = stack.enter_context(path.open("rb"))
    begins = file.read(6)
    file.seek(0)
    kind = next((kind for magic, kind in _MAGIC.items() if begins.startswith(magic)), _ENDINGS.get(path.suffix.lower()))
    if begins.startswith(b"PAR1"):
        raise ValueError(f"{path} is a Parquet file: use the format parquet")
    if kind is None or not begins:
        return file, "file"
    if kind == "gzip":
        unpacked: Any = gzip.GzipFile(fileobj=file)
        return stack.enter_context(unpacked), kind
    if kind == "bzip2":
        return stack.enter_context(bz2.open(file, "rb")), kind
    if kind == "xz":
        return stack.enter_context(lzma.open(file, "rb")), kind
    if kind == "zstd":
        return stack.enter_context(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")), kind
    return _only_member(path, file, stack), kind


def _only_member(path: Path, file: IO[bytes], stack: ExitStack) -> IO[bytes]:
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
        names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
        if len(names) == 1:
            return stack.enter_context(archive.open(names[0]))
    except _DAMAGED as error:
        raise ValueError(f"{path}: the zip file is damaged or locked: {_brief(error)}") from None
    raise ValueError(f"{path} is a zip file of {len(names)} files, expected one: unpack it")


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _last_line_end(data: bytes, quote: bytes) -> int:
    """Where the last whole line ends; a line end between quotes does not count."""
    end = data.rfind(b"\n") + 1
    if quote not in data:
        return end
    quotes = data.count(quote, 0, end)
    while end and quotes % 2:
        before = data.rfind(b"\n", 0, end - 1) + 1
        quotes -= data.count(quote, before, end)
        end = before
    return end
