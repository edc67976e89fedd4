"""Norms of the errors of rows by the range they are clipped to: compiled where Numba is installed and it pays, else by
PyTorch."""

# Shapes: R rows, D width. Rows lie in columns, (D, R): what belongs to one row is then spread over long vectors.

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fullrank.embeddings.packed import Packing

# Below as many numbers Numba would not be back yet from its import.
WORTH_NUMBA = 1 << 24
# Rows that a compiled loop takes side by side: their sums stay in registers and the nearest cache.
SIDE_BY_SIDE = 64

Loss = Callable[[Tensor, Tensor], Tensor]
Array = NDArray[np.float32]


def exact_loss(x_DR: Tensor, packing: Packing) -> Loss:
    """Norm of the error of each row by the range it is clipped to, in the order in which PyTorch computes it."""
    error_DR = torch.empty_like(x_DR)

    def loss(low_R: Tensor, high_R: Tensor) -> Tensor:
        scale_R, bias_R = packing.scale_and_bias(low_R, high_R)
        torch.sub(x_DR, bias_R, out=error_DR)
        error_DR.mul_(scale_R.reciprocal()).round_().clamp_(0, packing.levels).mul_(scale_R).add_(bias_R)
        torch.sub(x_DR, error_DR, out=error_DR)
        error_DR.square_()
        sum_R = error_DR[0].clone()
        for error_R in error_DR[1:]:
            sum_R.add_(error_R)
        return sum_R.sqrt_()

    return loss


def compiled_loss(x_DR: Tensor, packing: Packing) -> Loss:
    """The same to the last bit in one pass; needs Numba."""
    sums = compiled_sums()
    assert sums is not None
    x, levels = x_DR.numpy(), np.float32(packing.levels)

    def loss(low_R: Tensor, high_R: Tensor) -> Tensor:
        scale_R, bias_R = packing.scale_and_bias(low_R, high_R)
        sum_R = torch.empty_like(scale_R)
        sums(x, scale_R.numpy(), scale_R.reciprocal().numpy(), bias_R.numpy(), levels, sum_R.numpy())
        return sum_R.sqrt_()

    return loss


@functools.cache
def compiled_sums() -> Callable[..., None] | None:
    """`_sums` as machine code, if Numba can be imported."""
    try:
        import numba

        compiled: Callable[..., None] = numba.njit(cache=True, error_model="numpy")(_sums)
    except (ImportError, RuntimeError):  # Numba raises RuntimeError where it can write its cache nowhere
        return None
    return compiled


def _sums(x: Array, scale: Array, inverse: Array, bias: Array, levels: Any, sums: Array) -> None:
    """Into `sums` (R,): of each row, the squares of its errors, added one after another in float32."""
    zero = np.float32(0)
    for begin in range(0, x.shape[1], SIDE_BY_SIDE):
        part = slice(begin, min(begin + SIDE_BY_SIDE, x.shape[1]))
        scales, inverses, biases, total = scale[part], inverse[part], bias[part], sums[part]
        total[:] = zero
        for d in range(x.shape[0]):
            numbers = x[d, part]
            for r in range(len(total)):
                code = min(max(np.rint((numbers[r] - biases[r]) * inverses[r]), zero), levels)
                error = numbers[r] - (code * scales[r] + biases[r])
                total[r] += error * error
