"""Partitions against brute force, their inverses and the published sizes."""

# Shapes: N ids, k partitions.

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from fullrank.embeddings import complementary_partitions, is_complementary
from fullrank.embeddings.partitions import (
    balanced_sizes,
    collisions_within,
    coprime_sizes,
    quotient_remainder_sizes,
    read_buckets,
)

# Rows of the 26 tables of Criteo's Kaggle log.
CRITEO = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
THRESHOLD = 200  # of the paper's code: smaller tables stay plain
ROWS = (1, 2, 3, 7, 64, 97, 1000, 9973, 100_000)


SCHEMES: list[tuple[Any, Any]] = [
    ("quotient_remainder", "remainder"),
    ("quotient_remainder", "quotient"),
    ("chinese_remainder", "remainder"),
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scheme, major", SCHEMES)
def test_no_two_ids_lie_in_the_same_parts(rows: int, scheme: Any, major: Any) -> None:
    for count in (2, 3, 5):
        sizes = (balanced_sizes if scheme == "quotient_remainder" else coprime_sizes)(rows, count)
        parts_NK = complementary_partitions(rows, sizes, scheme, major)(torch.arange(rows))
        assert pl.DataFrame(parts_NK.numpy()).n_unique() == rows
        assert bool((parts_NK >= 0).all()) and bool((parts_NK < torch.tensor(sizes)).all())


def test_balanced_sizes_are_the_smallest_about_the_root() -> None:
    for rows in ROWS:
        for count in (2, 3, 4):
            sizes = balanced_sizes(rows, count)
            assert math.prod(sizes) >= rows > math.prod((*sizes[:-1], sizes[-1] - 1))
            assert max(sizes) == next(root for root in range(1, rows + 1) if root**count >= rows)
    assert balanced_sizes(2**62, 2) == (2**31, 2**31)
    assert balanced_sizes(2**62 + 1, 2) == (2**31 + 1, 2**31)


def test_an_id_is_found_again_from_its_digits_and_from_its_remainders() -> None:
    for rows, sizes in ((97, (5, 4, 5)), (2**62, (2**20 + 7, 2**21 + 1, 2**22 + 3))):
        top = rows - 1
        ids = torch.tensor([0, 1, top // 3, top - 1, top])
        for _, major in SCHEMES[:2]:
            parts_NK = complementary_partitions(rows, sizes, major=major)(ids).tolist()
            step = -1 if major == "remainder" else 1  # the most significant digit first
            for number, parts in zip(ids.tolist(), parts_NK, strict=True):
                found = 0
                for part, size in zip(parts[::step], sizes[::step], strict=True):
                    found = found * size + part
                assert found == number
    sizes = coprime_sizes(2**62, 3)
    product = math.prod(sizes)
    ids = torch.tensor([0, 2**40, 4 * (2**24 + 1), 2**62 - 1])
    parts_NK = complementary_partitions(2**62, sizes, "chinese_remainder")(ids).tolist()
    for number, parts in zip(ids.tolist(), parts_NK, strict=True):
        others = [product // size for size in sizes]
        terms = (part * other * pow(other, -1, size) for part, other, size in zip(parts, others, sizes, strict=True))
        assert sum(terms) % product == number


def test_quotients_of_large_ids_are_exact() -> None:
    """A float32 quotient of 4 (2^24 + 1) by 4 is 2^24."""
    parts = complementary_partitions(2**41, (4, 2**39))(torch.tensor([4 * (2**24 + 1), 2**40, 2**40 + 3]))
    assert parts.tolist() == [[0, 2**24 + 1], [0, 2**38], [3, 2**38]]
    assert complementary_partitions(2**20, (4, 2**18))(torch.tensor([7], dtype=torch.int32)).tolist() == [[3, 1]]


def test_the_rows_of_the_published_tables() -> None:
    def rows_of(collisions: int) -> tuple[int, int, int]:
        """Of hashing, of the paper's two tables of ⌈n / c⌉ and c rows, and of ours, which has no row that no id has."""
        found = [0, 0, 0]
        for rows in CRITEO:
            large = -(-rows // collisions)
            sizes = (large, large + collisions, sum(quotient_remainder_sizes(rows, collisions)))
            found = [a + (b if rows > THRESHOLD else rows) for a, b in zip(found, sizes, strict=True)]
        return found[0], found[1], found[2]

    assert sum(CRITEO) == 33_762_577
    assert rows_of(4) == (8_440_806, 8_440_878, 8_440_878)
    assert rows_of(60) == (562_922, 564_002, 563_988)
    assert sum(CRITEO) / 564_002 == pytest.approx(59.86, abs=0.005)
    # Two tables of ⌈√n⌉ rows where they are fewer than n; the second need only have ⌈n / ⌈√n⌉⌉.
    assert sum(min(rows, 2 * (math.isqrt(rows - 1) + 1)) for rows in CRITEO) == 28_813
    assert sum(min(rows, sum(balanced_sizes(rows, 2))) for rows in CRITEO) == 28_800


def test_a_budget_over_all_tables_is_kept_with_the_fewest_collisions() -> None:
    def bytes_of(sizes: tuple[int, ...]) -> int:
        return 4 * 16 * sum(sizes)

    def total(collisions: int) -> int:
        split = (quotient_remainder_sizes(rows, min(collisions, math.isqrt(rows - 1) + 1)) for rows in CRITEO)
        return sum(min(bytes_of((rows,)), bytes_of(sizes)) for rows, sizes in zip(CRITEO, split, strict=True))

    for budget in (10**7, 10**8, bytes_of(CRITEO) - 1):
        collisions = collisions_within(budget, CRITEO, bytes_of)
        assert total(collisions) <= budget < total(collisions - 1)
    assert collisions_within(bytes_of(CRITEO), CRITEO, bytes_of) == 1
    with pytest.raises(ValueError, match="memory budget 1000 is below the least .* take, 18432"):
        collisions_within(1000, [144 * 144], bytes_of)


def test_custom_buckets_are_complementary_if_no_two_rows_are_equal() -> None:
    buckets = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1]])
    assert is_complementary(buckets)
    assert not is_complementary(torch.cat([buckets, buckets[2:3]]))
    assert not is_complementary(torch.arange(6)[:, None] % 3)  # the hashing trick


def test_wrong_partitions_and_ids_are_named() -> None:
    with pytest.raises(ValueError, match=r"sizes \[4, 5\] tell 20 ids apart, and the table has 21 rows"):
        complementary_partitions(21, (4, 5))
    with pytest.raises(ValueError, match="sizes 6 and 9 have the common divisor 3"):
        complementary_partitions(50, (5, 6, 9), "chinese_remainder")
    with pytest.raises(ValueError, match=r"sizes are \[0, 5\], expected numbers of at least 1"):
        complementary_partitions(0, (0, 5))
    parts_of = complementary_partitions(20, (4, 5))
    for bad in (-1, 20):
        with pytest.raises(IndexError, match=f"id {bad} is outside its table of 20 rows"):
            parts_of(torch.tensor([3, bad]))
    with pytest.raises(TypeError, match=r"ids are torch.float32, expected int64"):
        parts_of(torch.tensor([3.0]))
    assert parts_of(torch.tensor([], dtype=torch.int64)).shape == (0, 2)


def test_a_file_of_buckets(tmp_path: Path) -> None:
    path = tmp_path / "cars.parquet"
    pl.DataFrame({"make": [0, 0, 1], "year": pl.Series([3, 1, 1], dtype=pl.Int8)}).write_parquet(path)
    assert read_buckets(path).tolist() == [[0, 3], [0, 1], [1, 1]]
    pl.DataFrame({"make": [0, None]}).write_parquet(path)
    with pytest.raises(ValueError, match=r'cars.parquet: column "make" is Int64 with 1 nulls, expected integers'):
        read_buckets(path)
    pl.DataFrame({"make": ["Ford"]}).write_parquet(path)
    with pytest.raises(ValueError, match=r'cars.parquet: column "make" is String, expected integers'):
        read_buckets(path)
    path.write_text("make\n1\n")
    with pytest.raises(ValueError, match=r"cars.parquet: expected a Parquet file of buckets"):
        read_buckets(path)
    with pytest.raises(ValueError, match=r"none.parquet: expected a Parquet file of buckets"):
        read_buckets(tmp_path / "none.parquet")
