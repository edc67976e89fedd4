from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fullrank.embeddings.segments import segment_sum, spread

LENGTHS = torch.tensor([0, 3, 1, 0, 6, 0])


def loop(values: Tensor, weights: Tensor | None, mean: bool) -> Tensor:
    rows = []
    scaled = values if weights is None else values * weights[:, None]
    for row in scaled.split(LENGTHS.tolist()):
        total = row.sum(0)
        rows.append(total / len(row) if mean and len(row) else total)
    return torch.stack(rows)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_gradients_equal_a_loop_over_rows(dtype: torch.dtype, weighted: bool, mean: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(10, 3, dtype=dtype, requires_grad=True)
    weights = torch.randn(10, dtype=dtype, requires_grad=True) if weighted else None
    ours, theirs = segment_sum(values, LENGTHS, weights_E=weights, mean=mean), loop(values, weights, mean)
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn(6, 3, dtype=dtype)
    inputs = [values] if weights is None else [values, weights]
    for a, b in zip(
        torch.autograd.grad(ours, inputs, gradient), torch.autograd.grad(theirs, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_half_precision_sums_too() -> None:
    values = torch.randn(10, 3).bfloat16()
    torch.testing.assert_close(segment_sum(values, LENGTHS), loop(values, None, False))


def test_rows_without_any_value_are_zero() -> None:
    values = torch.zeros(0, 4, requires_grad=True)
    pooled = segment_sum(values, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(pooled, torch.zeros(3, 4))
    pooled.sum().backward()
    assert values.grad is not None and values.grad.shape == (0, 4)


def test_spreading_is_the_transpose_of_summing() -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    values = torch.randn(10, 3, dtype=torch.float64)
    wide = spread(rows, LENGTHS, 10)
    assert torch.equal(wide, torch.cat([row.expand(n, 3) for row, n in zip(rows, LENGTHS.tolist(), strict=True)]))
    torch.testing.assert_close((wide * values).sum(), (rows * segment_sum(values, LENGTHS)).sum())
    (gradient,) = torch.autograd.grad((wide * values).sum(), rows)
    torch.testing.assert_close(gradient, segment_sum(values, LENGTHS))
