"""Facts about the log of embeddings: what a lookup of the past may and may not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fullrank.transfer.codec import code_bytes
from fullrank.transfer.embedding_log import ALL_VERSIONS, DAY, SECOND, EmbeddingLog, LeakageError
from fullrank.transfer.lookup import EVENTS_AT_ONCE

DIM, NOW = 6, 1_750_000_000 * SECOND
VERSIONS = {"v1": NOW - 40 * DAY, "v2": NOW - 39 * DAY}


class Events(NamedTuple):
    key: np.ndarray
    event: np.ndarray
    time: np.ndarray
    available: np.ndarray
    code: np.ndarray
    version: np.ndarray

    def take(self, rows: np.ndarray) -> Events:
        return Events(*(column[rows] for column in self))


def random_events(rng: np.random.Generator, rows: int, keys: int = 7) -> Events:
    """With ties, late arrivals, several versions and events that were written twice."""
    time = NOW - rng.integers(0, 40, rows) * DAY // 2
    available = time + rng.integers(0, 3, rows) * DAY * rng.integers(0, 2, rows)
    code = rng.integers(0, 256, (rows, code_bytes(DIM, 4)), dtype=np.uint8)
    version = np.array(list(VERSIONS))[rng.integers(0, 2, rows)]
    events = Events(rng.integers(0, keys, rows), rng.integers(0, rows // 2, rows), time, available, code, version)
    again = rng.integers(0, rows, rows // 5)
    twice = events.take(again)._replace(code=code[again[::-1]], available=available[again] + rng.integers(0, 2) * DAY)
    return Events(*(np.concatenate(pair) for pair in zip(events, twice, strict=True)))


def write(log: EmbeddingLog, events: Events, batches: int, rng: np.random.Generator) -> None:
    for rows in np.array_split(rng.permutation(len(events.key)), batches):
        for name, cutoff in VERSIONS.items():
            part = rows[events.version[rows] == name]
            part = events.take(part[np.argsort(events.time[part], kind="stable")])
            log.append(part.key, part.event, part.time, part.code, part.available, name, cutoff)


def oracle(events: Events, key: int, as_of: int, limit: int, window: int | None, own: int, version: str) -> list[Any]:
    """The definition, one row after another."""
    rows = [
        (int(t), int(e), str(v), int(a), c.tobytes())
        for k, e, t, a, c, v in zip(*events, strict=True)
        if k == key and (version == ALL_VERSIONS or v == version)
    ]
    first: dict[Any, Any] = {}
    for t, e, v, a, c in sorted(rows, key=lambda row: (row[3], row[4])):
        first.setdefault((t, e, v), (a, c))
    seen = [
        (t, e, v, c)
        for (t, e, v), (a, c) in sorted(first.items())
        if t < as_of and (window is None or t >= as_of - window) and a <= as_of and e != own
    ]
    return seen[max(0, len(seen) - limit) :]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_lookup_is_what_a_loop_over_all_rows_finds(tmp_path: Path, seed: int, cache_bytes: int) -> None:
    rng = np.random.default_rng(seed)
    events = random_events(rng, 300)
    log = EmbeddingLog(tmp_path / "log", DIM, buckets=3, cache_bytes=cache_bytes)
    write(log, events, 4, rng)
    queries = 60
    key, as_of = rng.integers(0, 9, queries), NOW - rng.integers(-2, 40, queries) * DAY // 2
    own = rng.integers(0, 150, queries)
    for limit, window, version in [(3, None, "v1"), (40, "5d", "v2"), (2, "9d", ALL_VERSIONS), (0, None, "v1")]:
        found = log.lookup(key, as_of, limit, window, exclude_event_ids=own, fm_version=version)
        assert found.lengths.sum() or limit == 0
        for query in range(queries):
            at = slice(found.offsets[query], found.offsets[query + 1])
            span = None if window is None else int(window[:-1]) * DAY
            expected = oracle(events, key[query], as_of[query], limit, span, own[query], version)
            shown = [
                (as_of[query] - age, event, found.known_versions[v], code.tobytes())
                for age, event, v, code in zip(
                    found.age[at], found.event_ids[at], found.versions[at], found.codes[at], strict=True
                )
            ]
            assert shown == expected


def test_long_histories_are_searched_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where most of what is near is not to be counted, so that a query looks further back."""
    monkeypatch.setattr("fullrank.transfer.lookup.EVENTS_AT_ONCE", 64)
    assert EVENTS_AT_ONCE > 64
    rows = 500
    time = NOW - np.arange(rows)[::-1] * SECOND
    # Of the last 400 events only the first had arrived.
    available = np.where(np.arange(rows) > 100, NOW + DAY, time)
    codes = np.zeros((rows, 3), np.uint8)
    log = EmbeddingLog(tmp_path, DIM)
    log.append(np.ones(rows, int), np.arange(rows), time, codes, available, "v1", VERSIONS["v1"])
    found = log.lookup(np.array([1, 2, 1]), np.full(3, NOW + 1), 20, fm_version="v1")
    assert found.lengths.tolist() == [20, 0, 20]
    assert found.event_ids[:20].tolist() == list(range(81, 101)) == found.event_ids[20:].tolist()


def test_what_happens_at_or_after_a_time_changes_nothing(tmp_path: Path) -> None:
    """Nor the order in which the log was written, nor what is appended later."""
    rng = np.random.default_rng(3)
    events = random_events(rng, 200)
    as_of, keys = NOW - 8 * DAY, np.arange(7)
    future = (events.time >= as_of) | (events.available > as_of)
    changed = events._replace(
        code=np.where(future[:, None], events.code ^ 255, events.code),
        event=np.where(future, events.event + 1000, events.event),
        key=np.where(future, (events.key + 1) % 7, events.key),
    )
    sequences = []
    for number, log_of in enumerate((events, changed, events.take(np.flatnonzero(~future)))):
        log = EmbeddingLog(tmp_path / str(number), DIM, buckets=2)
        write(log, log_of, number + 1, np.random.default_rng(number))
        found = log.lookup(keys, np.full(7, as_of), 9, "20d", fm_version="v1")
        sequences.append((found.codes.tobytes(), found.age.tolist(), found.offsets.tolist()))
    assert found.lengths.sum() > 20
    assert sequences[0] == sequences[1] == sequences[2]
    late = events.take(np.flatnonzero(future))
    write(log, late, 1, rng)
    again = EmbeddingLog(tmp_path / "2").lookup(keys, np.full(7, as_of), 9, "20d", fm_version="v1")
    assert (again.codes.tobytes(), again.age.tolist(), again.offsets.tolist()) == sequences[0]


def test_a_code_takes_half_a_byte_for_each_number(tmp_path: Path) -> None:
    rows, dim = 20_000, 32
    log = EmbeddingLog(tmp_path, dim)
    codes = np.random.default_rng(0).integers(0, 256, (rows, 16), dtype=np.uint8)
    log.append(np.arange(rows) % 50, np.arange(rows), NOW + np.arange(rows), codes, NOW + np.arange(rows), "v1", NOW)
    fixed = 4 * 8 * rows
    assert rows * dim // 2 < log.nbytes < rows * dim // 2 + fixed
    assert EmbeddingLog(tmp_path, dim).code_bytes == 16


def test_padding_is_told_from_a_code_of_zeros(tmp_path: Path) -> None:
    log = EmbeddingLog(tmp_path, DIM)
    codes = np.arange(9, dtype=np.uint8).reshape(3, 3)
    times = [NOW, NOW + 1, NOW + 2]
    log.append([1, 1, 1], [5, 6, 7], times, codes, times, "v1", NOW)
    codes_QLC, age_QL = log.lookup([1, 2], [NOW + 3, NOW + 3], 5, fm_version="v1").padded(2)
    assert codes_QLC[0].tolist() == codes[1:].tolist() and not codes_QLC[1].any()
    assert age_QL[0] == pytest.approx([2e-6, 1e-6]) and np.isnan(age_QL[1]).all()


GOOD: dict[str, Any] = {
    "keys": [1, 2],
    "event_ids": [1, 2],
    "event_times": [NOW, NOW + 1],
    "codes": np.zeros((2, 3), np.uint8),
    "available_at": [NOW, NOW + 1],
    "fm_version": "v1",
    "fm_train_cutoff": NOW,
}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"event_times": [NOW + 1, NOW], "available_at": [NOW + 9] * 2}, ValueError, "row 1 is before that of row 0"),
        ({"event_times": [NOW, float("nan")]}, ValueError, "event_times have 1 NaN"),
        ({"codes": np.zeros((2, 4), np.uint8)}, ValueError, r"expected uint8 of shape \(n, 3\)"),
        ({"available_at": [NOW, NOW]}, ValueError, "row 1 is available at"),
        ({"fm_train_cutoff": NOW + 1}, LeakageError, "row 0 happened at"),
        ({"keys": [1]}, ValueError, "1 keys, 2 event ids"),
        ({"keys": [1.5, 2.0]}, ValueError, "expected whole numbers"),
        ({"fm_version": "*"}, ValueError, "no name of a version"),
    ],
)
def test_what_must_not_be_written_is_refused_whole(
    tmp_path: Path, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    log = EmbeddingLog(tmp_path / "log", DIM)
    with pytest.raises(error, match=message):
        log.append(**{**GOOD, **wrong})
    assert len(log) == 0 and not (tmp_path / "log").exists()


def test_what_cannot_be_looked_up_is_said(tmp_path: Path) -> None:
    log = EmbeddingLog(tmp_path, DIM, prefix_dims=(2, 4))
    log.append(**GOOD)
    with pytest.raises(ValueError, match='version "v1" has the cut-off'):
        log.append(**{**GOOD, "fm_train_cutoff": NOW - 1})
    with pytest.raises(KeyError, match='no version "v7" in .*; there are v1'):
        log.lookup([1], [NOW], 3, fm_version="v7")
    with pytest.raises(ValueError, match="max_len is -1"):
        log.lookup([1], [NOW], -1, fm_version="v1")
    with pytest.raises(ValueError, match="prefix is 3, expected one of 2, 4, 6"):
        log.lookup([1], [NOW], 1, fm_version="v1", prefix=3)
    with pytest.raises(ValueError, match='window is "month"'):
        log.lookup([1], [NOW], 1, "month", fm_version="v1")
    with pytest.raises(ValueError, match="has codes of dim 6 in 4 bits, not of 8 in 4"):
        EmbeddingLog(tmp_path, 8)
    (tmp_path / "log.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(ValueError, match="no log of embeddings of format 1"):
        EmbeddingLog(tmp_path)
    with pytest.raises(ValueError, match="no log yet"):
        EmbeddingLog(tmp_path / "other")
