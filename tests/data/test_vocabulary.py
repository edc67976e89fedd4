"""Vocabularies: counting values in bounded memory, and finding them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from fullrank.data.hashing import hash_series
from fullrank.data.vocabulary import ValueCounts, Vocabulary
from fullrank.schema import FIRST_VOCABULARY_ID, MISSING_ID, OUT_OF_VOCABULARY_ID


def test_counts_that_go_through_files_give_the_same_vocabularies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    in_memory, in_files = ValueCounts(tmp_path / "a"), ValueCounts(tmp_path / "b", most_values=500)
    for _ in range(40):
        for table, size in (("few", 20), ("many", 3000), ("more", 10_000)):
            values = pl.Series((rng.zipf(1.2, 300) % size).astype(str))
            for counts in (in_memory, in_files):
                counts.add(table, values, np.ones(300, dtype=np.int64))
    assert any((tmp_path / "b").iterdir())
    for table in ("few", "many", "more"):
        expected, found = in_memory.vocabulary(table, 2), in_files.vocabulary(table, 2)
        assert found.values.equals(expected.values)
        assert found.counts.equals(expected.counts)
    assert not any((tmp_path / "b").iterdir())


def test_each_value_is_found_and_no_other() -> None:
    for size in (0, 1, 2, 3, 100, 70_000):
        texts = pl.Series([f"{number:x}" for number in range(size)], dtype=pl.String)
        vocabulary = Vocabulary(texts, pl.Series(np.ones(size, dtype=np.int64)))
        others = pl.Series([f"no {number}" for number in range(70_000)])
        asked = pl.concat([others, texts, pl.Series([None], dtype=pl.String)])
        expected = [OUT_OF_VOCABULARY_ID] * 70_000 + [FIRST_VOCABULARY_ID + place for place in range(size)]
        assert vocabulary.ids(asked).tolist() == [*expected, MISSING_ID]
        assert [vocabulary.id_of(text) for text in asked[-200:].to_list()] == vocabulary.ids(asked[-200:]).tolist()


def test_hashes_that_begin_alike_are_told_apart() -> None:
    # All values of one beginning: the search must walk over all of them.
    texts = pl.Series([str(number) for number in range(200_000)])
    alike = texts.filter(pl.Series(hash_series(texts) >> np.uint64(56) == 77))
    vocabulary = Vocabulary(alike, pl.Series(np.ones(len(alike), dtype=np.int64)))
    assert len(alike) > 600
    assert vocabulary.ids(alike).tolist() == list(range(FIRST_VOCABULARY_ID, FIRST_VOCABULARY_ID + len(alike)))
