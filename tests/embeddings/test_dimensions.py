"""The popularity rule against published arithmetic, its budget, and what follows from its formula."""

# Shapes: K blocks.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fullrank.embeddings.dimensions import equal_count_blocks, mixed_dimensions, num_parameters

SIZES = [1000, 4, 10**7, 100, 10, 3 * 10**5]
# Ids of the 26 categories of the Criteo display advertising challenge (Kaggle), 33,762,577 in all.
CRITEO = [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10]
CRITEO += [5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]


@pytest.mark.parametrize(
    ("temperature", "integers", "powers"),
    [
        (0.1, [9, 16, 4, 12, 15, 5], [8, 16, 4, 16, 16, 4]),
        (0.2, [5, 16, 1, 8, 13, 2], None),
        (0.3, [3, 16, 1, 6, 12, 1], None),
        (1.0, [1, 16, 1, 1, 6, 1], None),
        (0, [16] * 6, [16] * 6),
    ],
)
def test_the_rule_gives_known_widths(temperature: float, integers: list[int], powers: list[int] | None) -> None:
    assert mixed_dimensions(SIZES, 16, temperature=temperature) == integers
    if powers is not None:
        assert mixed_dimensions(SIZES, 16, temperature=temperature, round_to="pow2") == powers


@pytest.mark.parametrize(("temperature", "millions"), [(0, 540.20), (0.1, 135.62), (0.2, 34.43), (0.3, 33.79)])
def test_criteo_becomes_sixteen_times_smaller(temperature: float, millions: float) -> None:
    assert sum(CRITEO) == 33_762_577
    dims = mixed_dimensions(CRITEO, 16, temperature=temperature, round_to="pow2")
    assert num_parameters(CRITEO, dims, 16) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("round_to", ["int", "pow2", 8])
@pytest.mark.parametrize("base_dim", [1, 10, 12, 16])
def test_no_block_is_wider_than_the_table_and_the_most_popular_one_is_as_wide(base_dim: int, round_to: Any) -> None:
    popularity = list(np.random.default_rng(0).exponential(size=20) ** 4)
    for temperature in (0, 0.2, 0.7, 1):

        def dims_of(popularity: list[float], temperature: float = temperature) -> list[int]:
            sizes = [10] * len(popularity)
            return mixed_dimensions(sizes, base_dim, popularity=popularity, temperature=temperature, round_to=round_to)

        dims = dims_of(popularity)
        assert dims[int(np.argmax(popularity))] == max(dims) == base_dim and min(dims) >= 1
        order = np.argsort(popularity)
        assert np.all(np.diff(np.array(dims)[order]) >= 0)
        assert dims_of([popularity[i] for i in order]) == [dims[i] for i in order]
        assert dims_of([8 * p for p in popularity]) == dims  # popularity has no unit


def test_a_block_that_nobody_asked_for_has_width_1() -> None:
    assert mixed_dimensions([5, 5], 8, popularity=[3, 0]) == [8, 1]


@pytest.mark.parametrize("round_to", ["int", "pow2", 8])
def test_a_budget_is_kept_and_the_next_widths_would_break_it(round_to: Any) -> None:
    least = num_parameters(CRITEO, mixed_dimensions(CRITEO, 16, temperature=1, round_to=round_to), 16)
    for budget in (least, least + 1, 40_000_000, 2 * 10**8, 540_201_231, 540_201_232, 10**9):
        if budget < least:  # half the width at least, where widths are multiples of 8
            continue
        dims = mixed_dimensions(CRITEO, 16, budget=budget, round_to=round_to)
        assert num_parameters(CRITEO, dims, 16) <= budget
        ladder = {tuple(mixed_dimensions(CRITEO, 16, temperature=t / 1000, round_to=round_to)) for t in range(1001)}
        wider = [rung for rung in ladder if sum(rung) > sum(dims)]
        assert (budget >= 540_201_232) == (not wider)
        if wider:
            assert num_parameters(CRITEO, min(wider, key=sum), 16) > budget
    assert mixed_dimensions(CRITEO, 16, budget=10**9, round_to=round_to) == [16] * 26


def test_projections_are_part_of_the_budget() -> None:
    assert num_parameters([100, 10], [2, 4], 4) == 100 * 2 + 2 * 4 + 10 * 4
    sizes, base = [4, 1000], 64
    dims = mixed_dimensions(sizes, base, budget=10_000)
    assert sum(n * d for n, d in zip(sizes, dims, strict=True)) < num_parameters(sizes, dims, base) <= 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 1.5}, "expected a temperature from 0 to 1, got 1.5"),
        ({"temperature": -0.1}, "expected a temperature from 0 to 1"),
        ({"temperature": float("nan")}, "expected a temperature from 0 to 1"),
        ({"temperature": 0.3, "budget": 100}, "give one of them"),
        ({"popularity": [1.0]}, "there are 2 blocks and the popularity of 1"),
        ({"popularity": [0, 0]}, "not all of them 0"),
        ({"popularity": [1, -1]}, "popularities >= 0"),
        ({"popularity": [1, float("nan")]}, "popularities >= 0"),
        ({"base_dim": 0}, "expected base_dim >= 1, got 0"),
        ({"cardinalities": []}, "expected cardinalities >= 1"),
        ({"cardinalities": [3, 0]}, "expected cardinalities >= 1"),
        ({"round_to": 0}, "expected round_to >= 1"),
        ({"budget": 50}, "a budget of 50 numbers is too small: at temperature 1 there are 140"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    arguments = {"cardinalities": [4, 100], "base_dim": 8, **arguments}
    with pytest.raises(ValueError, match=message):
        mixed_dimensions(**arguments)


def test_blocks_of_equal_counts() -> None:
    counts = (1000 / np.arange(1, 2001)).astype(int)
    sizes = equal_count_blocks(counts, 4)
    ends = np.cumsum(sizes)
    sums = [int(counts[end - size : end].sum()) for size, end in zip(sizes, ends, strict=True)]
    assert sum(sizes) == 2000 and sizes == sorted(sizes)
    assert all(abs(total - counts.sum() / 4) <= counts[0] for total in sums)
    assert equal_count_blocks([9, 1, 0, 0], 2) == [1, 3]
    assert equal_count_blocks([0, 100, 1, 1], 4) == [2, 2]  # one id has three quarters
    assert equal_count_blocks([5], 4) == [1]
    with pytest.raises(ValueError, match="no id was ever counted"):
        equal_count_blocks([0, 0], 2)
