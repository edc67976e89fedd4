"""Complementary partitions: ids lie in one part of each, and no two ids in the same part of all."""

# Shapes: N ids, R rows of a table, k partitions.

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import polars as pl
import torch
from torch import Tensor

Scheme = Literal["quotient_remainder", "chinese_remainder"]
Major = Literal["remainder", "quotient"]


def complementary_partitions(
    rows: int, sizes: Sequence[int], scheme: Scheme = "quotient_remainder", major: Major = "remainder"
) -> Callable[[Tensor], Tensor]:
    """k partitions of the ids 0 to rows - 1.

    Args:
        sizes: number of parts of each partition.
        scheme: `quotient_remainder` takes the digits of an id in the mixed radix `sizes`, `chinese_remainder` its
            remainders by each of them.
        major: of the digits, whether the first partition has the least significant (`remainder`) or the most
            significant one (`quotient`).

    Returns:
        A function from integer ids of shape (N,) to int64 parts of shape (N, k). It raises a TypeError if the ids are
        no integers, an IndexError if one is outside the table.

    Raises:
        ValueError: if two ids would share all their parts.
    """
    check_sizes(rows, sizes, scheme)

    def parts_of(ids_N: Tensor) -> Tensor:
        check_ids(ids_N, rows, "partitions")
        found = residues(ids_N, sizes) if scheme == "chinese_remainder" else digits(ids_N, sizes, major)
        return torch.stack(found, 1).long()

    return parts_of


def digits(ids_N: Tensor, sizes: Sequence[int], major: Major) -> list[Tensor]:
    """Digits of ids in a mixed radix, in the order of `sizes`; only integers, so exact to the largest id."""
    found, rest_N = [], ids_N
    for size in sizes if major == "remainder" else reversed(sizes):
        found.append(rest_N % size)
        rest_N = rest_N.div(size, rounding_mode="floor")
    return found if major == "remainder" else found[::-1]


def residues(ids_N: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Remainders of ids by each size."""
    return [ids_N % size for size in sizes]


def is_complementary(buckets_RK: Tensor) -> bool:
    """Whether no two rows of parts are equal."""
    return colliding(buckets_RK) is None


def colliding(buckets_RK: Tensor) -> tuple[int, int] | None:
    """The first two ids that lie in the same parts of all partitions, if any do."""
    _, group_R = torch.unique(buckets_RK, dim=0, return_inverse=True)
    sorted_R, order_R = torch.sort(group_R, stable=True)
    again = (sorted_R[1:] == sorted_R[:-1]).nonzero()
    if not again.numel():
        return None
    first = again[order_R[again + 1].argmin()].item()
    return int(order_R[int(first)]), int(order_R[int(first) + 1])


def check_sizes(rows: int, sizes: Sequence[int], scheme: Scheme) -> None:
    """Raise a ValueError if partitions of these sizes are not complementary on ids 0 to rows - 1."""
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes are {list(sizes)}, expected numbers of at least 1")
    if math.prod(sizes) < rows:
        raise ValueError(f"sizes {list(sizes)} tell {math.prod(sizes)} ids apart, and the table has {rows} rows")
    if scheme == "chinese_remainder":
        for one, other in itertools.combinations(sizes, 2):
            if math.gcd(one, other) > 1:
                raise ValueError(f"sizes {one} and {other} have the common divisor {math.gcd(one, other)}")


def check_ids(ids_N: Tensor, rows: int, what: str) -> None:
    """Raise a TypeError if ids are no integers, an IndexError if one is not in 0 to rows - 1."""
    check_integers(ids_N, what)
    if ids_N.numel():
        low, high = (int(end) for end in torch.aminmax(ids_N))
        if low < 0 or high >= rows:
            raise IndexError(f"{what}: id {low if low < 0 else high} is outside its table of {rows} rows")


def check_integers(ids: Tensor, what: str) -> None:
    """Raise a TypeError if ids are no integers."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{what}: ids are {ids.dtype}, expected int64")


def quotient_remainder_sizes(rows: int, collisions: int) -> tuple[int, int]:
    """⌈rows / collisions⌉ parts that `collisions` ids share, and as many as tell those apart."""
    large = -(-rows // collisions)
    return large, -(-rows // large)


def balanced_sizes(rows: int, count: int) -> tuple[int, ...]:
    """About equal sizes, each the smallest that lets the product reach `rows`."""
    sizes: list[int] = []
    for left in range(count, 0, -1):
        sizes.append(_root(rows, left))
        rows = -(-rows // sizes[-1])
    return tuple(sizes)


def coprime_sizes(rows: int, count: int) -> tuple[int, ...]:
    """The first numbers from the `count`-th root of `rows` on that have no divisor in common."""
    sizes: list[int] = []
    size = max(2, _root(rows, count))
    while len(sizes) < count:
        if all(math.gcd(size, other) == 1 for other in sizes):
            sizes.append(size)
        size += 1
    return tuple(sizes)


def _root(number: int, degree: int) -> int:
    """The smallest integer whose power reaches a number."""
    root: int = max(1, round(number ** (1 / degree)))
    while root**degree < number:
        root += 1
    while root > 1 and (root - 1) ** degree >= number:
        root -= 1
    return root


def collisions_within(budget: int, tables: Sequence[int], cost: Callable[[tuple[int, ...]], int]) -> int:
    """The fewest collisions at which quotient-remainder tables fit a budget together.

    A table whose parts would take no less than its rows counts as plain, and no table has more collisions than the
    square root of its rows, where it is smallest.

    Args:
        budget: such as bytes.
        tables: rows of each table.
        cost: of one table with parts of some sizes, or with one part of all its rows, in the unit of the budget. With
            rows of D float32 numbers: `lambda sizes: 4 * D * sum(sizes)`.

    Raises:
        ValueError: if the smallest tables are above the budget.
    """

    def total(collisions: int) -> int:
        split = (quotient_remainder_sizes(rows, min(collisions, _root(rows, 2))) for rows in tables)
        return sum(min(cost((rows,)), cost(sizes)) for rows, sizes in zip(tables, split, strict=True))

    low, high = 0, max(_root(rows, 2) for rows in tables)  # low does not fit, high does
    if total(high) > budget:
        raise ValueError(f"memory budget {budget} is below the least that quotients and remainders take, {total(high)}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if total(middle) <= budget else (middle, high)
    return high


def read_buckets(path: Path) -> Tensor:
    """Partitions of a Parquet file: a column of integers for each, whose row i is the part of id i; shape (R, k).

    Raises:
        ValueError: if the file cannot be read, has no row or another column than of integers.
    """
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"{path}: expected a Parquet file of buckets ({str(error).splitlines()[0]})") from None
    for name, values in zip(frame.columns, frame, strict=True):
        if not values.dtype.is_integer() or values.null_count():
            nulls = f" with {values.null_count()} nulls" if values.null_count() else ""
            raise ValueError(f'{path}: column "{name}" is {values.dtype}{nulls}, expected integers')
    if not frame.height:
        raise ValueError(f"{path}: expected a row for each id, got none")
    return torch.from_numpy(frame.cast(pl.Int64).to_numpy(order="c").copy())
