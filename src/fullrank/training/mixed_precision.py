"""Matrix products of a training step in bfloat16: on the machine's units, or in float32 that is rounded alike."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fullrank.bfloat16 import Rounding, has_units, to_bf16
from fullrank.training.precision import Precision

PRODUCTS: frozenset[Any] = frozenset({
    F.linear, F.scaled_dot_product_attention, torch.einsum,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.mv,
    Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm, Tensor.mv,
    Tensor.__matmul__, Tensor.__rmatmul__,
})  # fmt: skip


@contextmanager
def products_in(precision: Precision, device: torch.device, rounding: Rounding = "rne") -> Iterator[None]:
    """The forward pass of a step in `precision`.

    In bfloat16 a matrix product takes its factors and bias rounded, adds up in float32, and gives a rounded result, in
    the forward and in the backward pass. Norms and softmax take and give bfloat16 between products, and compute in
    float32, statistics and scales included; what says so itself, such as the layer of the logits, is float32
    throughout. Weights, their gradients and optimiser state are float32 tensors. The loss needs no scaling: the range
    is that of float32.

    `bfloat16_emulated` rounds float32 tensors before and after each product, on any machine, and nothing else. A
    product that starts in the backward pass of a custom autograd function follows its inputs, as it does on the units.

    Args:
        rounding: of the emulation; the units round to nearest.
    """
    mode = _Emulation(rounding) if precision == "bfloat16_emulated" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision != "float32"), mode:
        yield


class _Emulation(TorchFunctionMode):
    """Where autocast is on, matrix products of rounded numbers in float32, the result rounded."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding = rounding

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS:
            return func(*args, **kwargs)
        device = next((value.device.type for value in args if isinstance(value, Tensor)), "cpu")
        if not torch.is_autocast_enabled(device):
            return func(*args, **kwargs)
        args, kwargs = tree_map(self._rounded, (args, kwargs))
        with torch.autocast(device, enabled=False):
            return self._rounded(func(*args, **kwargs))

    def _rounded(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            return _Round.apply(value, self.rounding)  # type: ignore[no-untyped-call]
        return value


class _Round(torch.autograd.Function):
    """Numbers that bfloat16 has, in float32; so the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding) -> Tensor:
        ctx.rounding = rounding
        return to_bf16(x, rounding).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return to_bf16(gradients[0], ctx.rounding).float(), None


@functools.cache
def warn_without_units(device: torch.device) -> None:
    """Warn, once in a process, if bfloat16 was asked of a processor that has no instructions for it."""
    if device.type == "cpu" and not has_units():
        warnings.warn(
            "precision bfloat16: this processor has no bfloat16 instructions, so that steps are likely slower than in "
            "float32; auto takes the faster, bfloat16_emulated has the same numerics",
            stacklevel=3,
        )
