"""bfloat16: the upper 16 bits of a float32. Rounding to it in three ways, and float32 kept as two planes of 16 bits.

The format has float32's range and 8 significant bits: rounding to nearest changes a number by at most 2^-8 of it,
truncation by less than 2^-7.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# To the nearest with ties to even; towards zero; up or down at random, so that the mean is the number itself.
Rounding = Literal["rne", "trunc", "sr"]
# Upper 16 bits of the largest finite number.
_LARGEST = 0x7F7F


def to_bf16(x: Tensor, rounding: Rounding = "rne", generator: torch.Generator | None = None) -> Tensor:
    """float32 to bfloat16, of the same shape. NaN stays NaN, and infinity itself.

    Args:
        rounding: `rne` is PyTorch's own conversion, in which numbers from 3.3961775e38 on become infinite; `trunc` and
            `sr` keep finite numbers finite.
        generator: of the draws of `sr`; PyTorch's global one when omitted.

    Raises:
        ValueError: if `x` is not float32, or the rounding is unknown.
    """
    _check(x)
    if rounding == "rne":
        return x.to(torch.bfloat16)
    if rounding == "sr":
        return stochastic_round(x, generator)
    if rounding == "trunc":
        return _number((x.contiguous().view(torch.int32) >> 16), x)
    raise ValueError(f'rounding "{rounding}" is unknown; choose one of rne, trunc, sr')


def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 to one of the two neighbours in bfloat16, each with the probability that makes the mean x.

    A number that bfloat16 has never moves, and each entry has a draw of its own. Above the largest finite bfloat16
    there is no finite neighbour: such a number is rounded down.

    Args:
        generator: of the draws; PyTorch's global one when omitted.

    Raises:
        ValueError: if `x` is not float32.
    """
    _check(x)
    bits = x.contiguous().view(torch.int32)
    high = bits >> 16
    # 64 random bits are four draws.
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    draws = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    drawn = (bits + (draws.to(torch.int32) & 0xFFFF)) >> 16
    return _number(torch.where((high & 0x7FFF) < _LARGEST, drawn, high), x)


def split_fp32(x: Tensor, rounding: Literal["trunc", "nearest"] = "trunc") -> tuple[Tensor, Tensor]:
    """A float32 as two planes, bfloat16 and int16, that together are as large as it and hold all of its bits.

    Args:
        rounding: of the upper plane. `trunc` is the upper 16 bits. `nearest` adds half a unit first, so that the upper
            plane alone is a rounding without bias; ties go away from zero. The lower plane is the lower 16 bits in
            both, which `join_fp32` with the same rounding reads with or without a sign.

    A NaN whose upper bits alone are not one reads as infinity in the upper plane, or, with `nearest` and a payload of
    all ones, as zero: 2^24 - 2 NaNs of float32 are more than the pairs whose upper half is one. The NaN of an
    arithmetic operation stays NaN.

    Raises:
        ValueError: if `x` is not float32.
    """
    _check(x)
    bits = x.contiguous().view(torch.int32)
    high = (bits + 0x8000 if rounding == "nearest" else bits) >> 16
    return high.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_fp32(high: Tensor, low: Tensor, rounding: Literal["trunc", "nearest"] = "trunc") -> Tensor:
    """The float32 that `split_fp32` made two planes of, bit for bit."""
    upper, lower = high.contiguous().view(torch.int16).to(torch.int32) << 16, low.to(torch.int32)
    return (upper + (lower if rounding == "nearest" else lower & 0xFFFF)).view(torch.float32)


def has_units() -> bool:
    """Whether the processor has matrix or dot-product instructions for bfloat16."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _check(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"expected float32 to round to bfloat16, got {str(x.dtype).removeprefix('torch.')}")


def _number(high: Tensor, x: Tensor) -> Tensor:
    """Upper halves as bfloat16; NaN where x is, whose payload may have been in the lower half."""
    return high.to(torch.int16).view(torch.bfloat16).masked_fill_(x.isnan(), torch.nan)
