"""Facts about the store of embeddings: what a server looks up is what training did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fullrank.serving.embedding_store import EmbeddingStore
from fullrank.transfer.embedding_log import DAY, SECOND, EmbeddingLog

NOW = 1_750_000_000 * SECOND


@pytest.fixture
def log(tmp_path: Path) -> EmbeddingLog:
    """With ties, late arrivals, and events that were written twice with other codes."""
    rng, log = np.random.default_rng(0), EmbeddingLog(tmp_path / "log", 6, prefix_dims=(4,), buckets=3)
    for _ in range(3):
        time = np.sort(NOW - rng.integers(0, 20, 200) * DAY)
        late = rng.integers(0, 3, 200) * DAY
        codes = rng.integers(0, 256, (200, 3), dtype=np.uint8)
        for version in ("v1", "v2"):
            key = rng.integers(0, 8, 200)
            log.append(key, rng.integers(0, 60, 200), time, codes, time + late, version, NOW - 30 * DAY)
    return log


def test_a_lookup_is_bit_equal_to_that_of_the_log(log: EmbeddingLog, tmp_path: Path) -> None:
    store = EmbeddingStore.of(tmp_path / "store", log, "v1")
    EmbeddingStore.of(tmp_path / "store", log, "v1")  # adds nothing
    rng = np.random.default_rng(1)
    keys, as_of, own = rng.integers(0, 10, 80), NOW - rng.integers(-2, 20, 80) * DAY, rng.integers(0, 60, 80)
    for limit, window, prefix in ((5, None, 4), (50, "6d", None), (0, None, None)):
        asked = {"exclude_event_ids": own, "fm_version": "v1", "prefix": prefix}
        mine, theirs = (where.lookup(keys, as_of, limit, window, **asked) for where in (store, log))
        for name in ("codes", "offsets", "age", "event_ids", "values"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
    assert theirs.lengths.sum() == 0 and mine.codes.shape == (0, 3)


def test_a_forgotten_user_has_no_history(log: EmbeddingLog, tmp_path: Path) -> None:
    store = EmbeddingStore.of(tmp_path / "store", log, "v2")
    before = store.lookup([3, 4], [NOW + DAY] * 2, 99, fm_version="v2").lengths
    assert store.forget(3) >= before[0] > 0 and store.forget(3) == 0
    assert store.lookup([3, 4], [NOW + DAY] * 2, 99, fm_version="v2").lengths.tolist() == [0, before[1]]


def test_what_is_no_such_store_is_refused(log: EmbeddingLog, tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, 6)
    with pytest.raises(ValueError, match="has codes of dim 6 in 4 bits, not of 8 in 4"):
        EmbeddingStore(tmp_path, 8)
    with pytest.raises(ValueError, match=r"codes have shape \(1, 4\)"):
        EmbeddingStore(tmp_path, 6).append([1], [1], [1], np.zeros((1, 4), np.uint8), [1], "v1")
    with pytest.raises(ValueError, match="prefix is 5"):
        EmbeddingStore(tmp_path, 6).lookup([1], [1], 1, fm_version="v1", prefix=5)
    for where in (EmbeddingStore(tmp_path, 6), log):
        with pytest.raises(ValueError, match="2 keys and 1 times, expected one of each"):
            where.lookup([1, 2], [1], 1, fm_version="v1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "embeddings.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="cannot be used as a store"):
        EmbeddingStore(tmp_path / "other", 6)
