"""Rows and their ranges to bytes, by FBGEMM where it is installed."""

# Shapes: R rows, D width, P bytes of a row.

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.embeddings.packed import Packing

# Below as many numbers FBGEMM would not be back yet from its import.
WORTH_FBGEMM = 1 << 24
CHUNK_NUMBERS = 1 << 20


def pack_ranges(weight_RD: Tensor, packing: Packing, low_R: Tensor, high_R: Tensor) -> Tensor:
    """Packed rows uint8 (R, P); FBGEMM's bytes and ours are the same."""
    whole = packing.width % (16 // packing.bits) == 0  # FBGEMM asks for an even number of bytes
    if packing.bits < 8 and packing.scale_type == "fp16" and whole and weight_RD.numel() >= WORTH_FBGEMM:
        pack = fbgemm_pack()
        if pack is not None:
            return pack(weight_RD.contiguous(), packing.bits, torch.stack([low_R, high_R], 1))
    return pack_here(weight_RD, packing, low_R, high_R)


def pack_here(weight_RD: Tensor, packing: Packing, low_R: Tensor, high_R: Tensor) -> Tensor:
    """The same by PyTorch."""
    pieces = []
    size = max(64, CHUNK_NUMBERS // packing.width)
    for rows_RD, begin_R, end_R in zip(
        torch.split(weight_RD, size), torch.split(low_R, size), torch.split(high_R, size), strict=True
    ):
        scale_R, bias_R = packing.scale_and_bias(begin_R, end_R)
        pieces.append(packing.join(packing.encode(rows_RD, scale_R, bias_R), scale_R, bias_R))
    return torch.cat(pieces)


@functools.cache
def fbgemm_pack() -> Callable[[Tensor, int, Tensor], Tensor] | None:
    """FBGEMM's operator that packs rows into given ranges, if it can be imported."""
    try:
        import fbgemm_gpu  # noqa: F401
    except (ImportError, OSError):  # a CUDA build of FBGEMM on a CPU machine raises OSError
        return None
    operator: Callable[[Tensor, int, Tensor], Tensor] = (
        torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalfWithRowwiseMinMax
    )
    return operator
