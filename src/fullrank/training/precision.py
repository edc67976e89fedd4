"""Which number format the matrix products of this machine are fastest in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "bfloat16_emulated"]
# A step in bfloat16 also converts its weights and activations: the products must be this much faster to pay for it.
WORTHWHILE = 1.5


def fastest_precision(device: torch.device) -> Precision:
    """The format in which a training step is likely faster.

    An accelerator says whether it has bfloat16 units. Processors are measured (0.1 s): some compute bfloat16 four times
    as fast as float32, others at half the speed, and what they announce does not tell which.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    gain = gemm_gflops(torch.bfloat16, 0.05) / gemm_gflops(torch.float32, 0.05)
    return "bfloat16" if gain >= WORTHWHILE else "float32"


def gemm_gflops(dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Best product of the size of a ranker's hidden layer within `seconds` on the processor, in GFLOP/s."""
    a, b = torch.randn(4096, 256).to(dtype), torch.randn(256, 256).to(dtype)
    return 2 * 4096 * 256 * 256 / best_time(lambda: torch.mm(a, b), seconds) / 1e9


def best_time(action: Callable[[], object], seconds: float = 0.4) -> float:
    """Seconds of the fastest of the runs of `action` that fit in `seconds`, after one to warm up."""
    action()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - begin)
    return best
