"""Looking ahead changes when work is done, not what comes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from fullrank.data.lookahead import mapped, prefetched


def test_results_come_in_the_order_of_the_items_whichever_is_done_first() -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number * number

    assert list(mapped(slow_first, range(20))) == [number * number for number in range(20)]
    assert list(prefetched(range(1, 20))) == list(range(1, 20))
    assert list(mapped(slow_first, [])) == list(prefetched([])) == []


def test_an_error_comes_where_its_item_would() -> None:
    def fail_at_five(number: int) -> int:
        if number == 5:
            raise ValueError("five")
        return number

    for results in (mapped(fail_at_five, range(10)), prefetched(map(fail_at_five, range(1, 10)))):
        seen = []
        with pytest.raises(ValueError, match="five"):
            for number in results:
                seen.append(number)
        assert seen[-1] == 4


def test_only_a_few_items_are_taken_ahead_of_their_use() -> None:
    taken, threads = 0, threading.active_count()

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(1, 1000):
            taken += 1
            yield number

    for results in (mapped(abs, items()), prefetched(items())):
        taken = 0
        assert next(results) == 1
        time.sleep(0.05)
        assert taken <= 8
        results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads
