"""A 64-bit hash of text that is the same on every machine, in every process and release."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from fullrank.data.spelling import as_text, is_plain, text_bytes
from fullrank.schema import FIRST_VOCABULARY_ID, MISSING_ID, RAW_IDS

Hashes = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
# Odd constants: 2^64 over the golden ratio, and the two multipliers of MurmurHash3's finaliser.
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xFF51AFD7ED558CCD
_MIX_2 = 0xC4CEB9FE1A85EC53
_KEEP = np.array([(1 << (8 * size)) - 1 for size in range(8)] + [_MASK], dtype=np.uint64)


def hash_text(text: str) -> int:
    """Hash of one text: the same number as `hash_series` gives, without the cost of setting up arrays.

    The UTF-8 bytes are read as little-endian 64-bit words, the last padded with zeros; each word is xor-ed into the
    state, multiplied by an odd constant and folded; MurmurHash3's finaliser ends it. The state starts from the length.
    """
    data = text.encode("utf-8")
    state = (len(data) * _GOLDEN) & _MASK
    for start in range(0, len(data), 8):
        state = ((state ^ int.from_bytes(data[start : start + 8], "little")) * _MIX_1) & _MASK
        state ^= state >> 32
    state ^= state >> 33
    state = (state * _MIX_2) & _MASK
    return state ^ (state >> 29)


def hash_series(values: pl.Series) -> Hashes:
    """Hash of each text of a String column; what stands at nulls has no meaning."""
    text, offsets = text_bytes(values)
    if len(values) == 0:
        return np.zeros(0, dtype=np.uint64)
    data = np.concatenate([text, np.zeros(8, dtype=np.uint8)])
    # One unaligned little-endian word at every byte.
    words = np.ndarray(shape=(len(data) - 7,), dtype="<u8", buffer=data.data, strides=(1,))
    starts = offsets[:-1]
    lengths = np.diff(offsets)
    with np.errstate(over="ignore"):
        # The empty text starts from 0 and stays there.
        state = _absorb(lengths.astype(np.uint64) * np.uint64(_GOLDEN), words[starts], lengths)
        done, rows = 8, np.flatnonzero(lengths > 8)
        while len(rows):
            state[rows] = _absorb(state[rows], words[starts[rows] + done], lengths[rows] - done)
            done += 8
            rows = rows[lengths[rows] > done]
        state ^= state >> np.uint64(33)
        state *= np.uint64(_MIX_2)
        return state ^ (state >> np.uint64(29))


def _absorb(state: Hashes, words: Hashes, bytes_left: npt.NDArray[np.int64]) -> Hashes:
    """Mix in one word of each text, of which the bytes beyond the text's end do not count."""
    state = (state ^ (words & _KEEP[np.minimum(bytes_left, 8)])) * np.uint64(_MIX_1)
    return state ^ (state >> np.uint64(32))


def splitmix(numbers: Hashes) -> Hashes:
    """SplitMix64: a random-looking 64-bit number for each integer."""
    with np.errstate(over="ignore"):
        state = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def splitmix_one(number: int) -> int:
    """The same of one number, without the cost of setting up arrays."""
    state = ((number + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def stable_hash(values: pl.Series) -> pl.Series:
    """64-bit hash (UInt64) of each value's text; null stays null. Equal on every machine, version and process.

    The text is the one that `spelling` gives, so that 42, 42.0, "42", "42.0" and " 42" agree.
    """
    text = as_text(values)
    hashes = pl.Series(values.name, hash_series(text), dtype=pl.UInt64)
    return hashes.zip_with(text.is_not_null(), pl.Series([None], dtype=pl.UInt64)) if text.null_count() else hashes


def stable_hash_one(text: str) -> int | None:
    """The same of one text, mostly without the cost of setting up arrays."""
    if is_plain(text):
        return hash_text(text)
    hashed: int | None = stable_hash(pl.Series([text]))[0]
    return hashed


def raw_ids(values: pl.Series) -> npt.NDArray[np.int64]:
    """Ids of texts under the encoding `raw`, which tells all values apart without having seen them.

    A whole number from 0 to 2^62 - 3, written without leading zeros, is itself plus the reserved ids; any other text is
    62 bits of its hash, so that two of a billion share an id with probability 0.1; null is missing.
    """
    room = RAW_IDS - FIRST_VOCABULARY_ID
    if len(values) <= 4:
        return np.array([MISSING_ID if v is None else _raw_id(v, room) for v in values.to_list()], dtype=np.int64)
    whole = values.cast(pl.Int64, strict=False)
    is_whole = (whole.is_between(0, room - 1) & (whole.cast(pl.String) == values)).fill_null(False).to_numpy()
    hashed = (hash_series(values) % np.uint64(room)).astype(np.int64)
    ids: npt.NDArray[np.int64] = np.where(is_whole, whole.fill_null(0).to_numpy(), hashed) + FIRST_VOCABULARY_ID
    if values.null_count():
        ids[values.is_null().to_numpy()] = MISSING_ID
    return ids


def _raw_id(text: str, room: int) -> int:
    is_whole = text.isascii() and text.isdigit() and len(text) < 20 and str(int(text)) == text and int(text) < room
    return FIRST_VOCABULARY_ID + (int(text) if is_whole else hash_text(text) % room)
