"""Attention within a window against attention over the whole history: forward and backward, time by length.

    python -m benchmarks.ranking.window_attention

One layer, 64 rows, width 64, 4 heads, window 32, no padding. The three variants take turns; medians are reported.
"masked" is how a window is done without chunks: full attention under a band mask.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.machine import table, write

ROWS, WIDTH, HEADS, WINDOW = 64, 64, 4, 32


def measure(length: int, repeats: int) -> list[dict[str, Any]]:
    import torch

    from fullrank.layers.attention import merge_heads, split_heads
    from fullrank.layers.sliding_window import SlidingWindowAttention

    torch.manual_seed(0)
    window = SlidingWindowAttention(WIDTH, HEADS, WINDOW)
    whole = SlidingWindowAttention(WIDTH, HEADS, length)
    whole.load_state_dict(window.state_dict())
    place_T = torch.arange(length)
    band_TT = (place_T[:, None] - place_T[None, :]).abs() <= WINDOW

    def masked(x_BTD: torch.Tensor) -> torch.Tensor:
        query, key, value = (split_heads(x, HEADS) for x in window.query_key_value(x_BTD).chunk(3, dim=2))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=band_TT)
        output: torch.Tensor = window.out(merge_heads(mixed))
        return output

    x_BTD = torch.randn(ROWS, length, WIDTH, requires_grad=True)
    with torch.no_grad():
        difference = float((window(x_BTD) - masked(x_BTD)).abs().max())
    variants = {"window": window, "full": whole, "masked": masked}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, variant in variants.items():
            begin = time.perf_counter()
            variant(x_BTD).sum().backward()
            if turn:
                times[name].append(time.perf_counter() - begin)
    full = statistics.median(times["full"])
    return [
        {"length": length, "variant": name, "ms": 1e3 * statistics.median(values),
         "of_full": statistics.median(values) / full,
         "largest_difference_to_masked": difference if name == "window" else None}
        for name, values in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    rows = [row for length in args.lengths for row in measure(length, args.repeats)]
    table(rows, list(rows[0]))
    settings = {"rows": ROWS, "width": WIDTH, "heads": HEADS, "window": WINDOW, **vars(args)}
    write("window_attention", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
