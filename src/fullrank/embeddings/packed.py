"""Rows stored as codes of a few bits with a scale and a bias: their bytes, and a buffer of them."""

# Shapes: R rows, D width, P bytes of a row, N looked-up ids.

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Bits = Literal[2, 4, 8]
ScaleType = Literal["fp16", "fp32"]
SCALE_TYPES: dict[ScaleType, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}


class Packing(NamedTuple):
    """How a row of D numbers lies in P bytes: ⌈D bits / 8⌉ of codes, the first one in the lowest bits, then the scale,
    then the bias, little endian. With fp16 and 2 or 4 bits these are the bytes of PyTorch's
    `embedding_bag_4bit_prepack` and FBGEMM's fused rows.
    """

    width: int
    bits: Bits = 4
    scale_type: ScaleType = "fp16"

    @property
    def code_bytes(self) -> int:
        return -(-self.width * self.bits // 8)

    @property
    def row_bytes(self) -> int:
        """P."""
        return self.code_bytes + 2 * self.scale_dtype.itemsize

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALE_TYPES[self.scale_type]

    def scale_and_bias(self, low_R: Tensor, high_R: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored for rows clipped to [low, high], as float32: the bias is low rounded, the scale the rest of
        the range over the levels, rounded; 1 where that would be 0 or has no inverse."""
        bias_R = low_R.to(self.scale_dtype).float()
        scale_R = (high_R - bias_R).div_(self.levels).to(self.scale_dtype).float()
        return scale_R.masked_fill_(scale_R.reciprocal() == torch.inf, 1.0), bias_R

    def encode(self, weight_RD: Tensor, scale_R: Tensor, bias_R: Tensor) -> Tensor:
        """Codes uint8 (R, D): clip(round((x - bias) / scale), 0, levels), halves to even."""
        code_RD = (weight_RD - bias_R[:, None]).mul_(scale_R.reciprocal()[:, None])
        return code_RD.round_().clamp_(0, self.levels).to(torch.uint8)

    def join(self, code_RD: Tensor, scale_R: Tensor, bias_R: Tensor) -> Tensor:
        """Packed rows, uint8 (R, P)."""
        numbers_RS = torch.stack([scale_R, bias_R], 1).to(self.scale_dtype).view(torch.uint8)
        return torch.cat([self.join_codes(code_RD), numbers_RS], 1)

    def join_codes(self, code_RD: Tensor) -> Tensor:
        """Codes in uint8 (R, code_bytes)."""
        each = 8 // self.bits
        if self.width % each:
            code_RD = nn.functional.pad(code_RD, (0, -self.width % each))
        joined_RC = code_RD[:, ::each].clone()
        for place in range(1, each):
            joined_RC |= code_RD[:, place::each] << (place * self.bits)
        return joined_RC

    def split_codes(self, joined_RC: Tensor) -> Tensor:
        """Codes uint8 (R, D) of `join_codes`."""
        each = 8 // self.bits
        if each == 1:
            return joined_RC
        pieces = [(joined_RC >> (place * self.bits)) & self.levels for place in range(each)]
        return torch.stack(pieces, 2).flatten(1)[:, : self.width]

    def split(self, packed_RP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 (R, D), scale and bias float32 (R,)."""
        scale_R, bias_R = self.numbers(packed_RP).float().unbind(1)
        return self.split_codes(packed_RP[:, : self.code_bytes]), scale_R, bias_R

    def numbers(self, packed_RP: Tensor) -> Tensor:
        """Scale and bias as they are stored, (R, 2)."""
        numbers_RS = packed_RP[:, self.code_bytes :].clone(memory_format=torch.contiguous_format)
        return numbers_RS.view(self.scale_dtype)

    def unpack(self, packed_RP: Tensor) -> Tensor:
        """Float32 (R, D): scale · code + bias."""
        code_RD, scale_R, bias_R = self.split(packed_RP)
        return code_RD.float().mul_(scale_R[:, None]).add_(bias_R[:, None])

    def look_up(self, packed_RP: Tensor, ids_N: Tensor) -> Tensor:
        """Float32 (N, D): the rows of some ids."""
        if not self._has_kernel(packed_RP):
            return self.unpack(packed_RP.index_select(0, ids_N))
        # Every id is a bag of its own: one pass, half the time of PyTorch's unpacking of selected rows.
        return self.pool(packed_RP, ids_N, torch.arange(len(ids_N), device=ids_N.device))

    def pool(self, packed_RP: Tensor, ids_N: Tensor, offsets_B: Tensor, weights_N: Tensor | None = None) -> Tensor:
        """Float32 (B, D): sums over bags that begin at the offsets, of the rows times their weights.

        With PyTorch's kernel for 4 bits; else the rows are unpacked first.
        """
        if not len(ids_N):
            return torch.zeros(len(offsets_B), self.width, device=packed_RP.device)
        if self._has_kernel(packed_RP):
            sums_BD: Tensor = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets(
                packed_RP, ids_N, offsets_B, per_sample_weights=weights_N
            )
            return sums_BD
        rows_ND = self.unpack(packed_RP.index_select(0, ids_N))
        places_N = torch.arange(len(ids_N), device=ids_N.device)
        return nn.functional.embedding_bag(places_N, rows_ND, offsets_B, mode="sum", per_sample_weights=weights_N)

    def _has_kernel(self, packed_RP: Tensor) -> bool:
        return self.bits == 4 and self.scale_type == "fp16" and self.width % 2 == 0 and not packed_RP.is_cuda


class PackedRows(nn.Module):
    """R rows of width D as `Packing` has them, which a look-up unpacks; they do not learn.

    The rows start as zeros: what they are comes from a state.
    """

    packed_RP: Tensor

    def __init__(self, rows: int, packing: Packing) -> None:
        super().__init__()
        self.packing = packing
        self.register_buffer("packed_RP", torch.zeros(rows, packing.row_bytes, dtype=torch.uint8), persistent=False)

    @property
    def stored(self) -> Tensor:
        """The rows as they lie in memory."""
        return self.packed_RP

    def state(self, rows: slice) -> Tensor:
        """What the state has of some rows: these bytes."""
        return self.packed_RP[rows]

    def load(self, rows: slice, value_RP: Tensor) -> None:
        """Put other bytes in the place of some rows."""
        self.packed_RP[rows].copy_(value_RP)

    def numbers(self) -> int:
        """How many numbers the rows stand for."""
        return len(self.packed_RP) * self.packing.width

    def rows(self, ids_N: Tensor) -> Tensor:
        """Vectors (N, D) of row ids."""
        return self.forward(ids_N)

    def forward(self, ids_N: Tensor) -> Tensor:
        """Vectors (N, D) of row ids."""
        return self.packing.look_up(self.packed_RP, ids_N)

    def misfit(self, stored_RP: Tensor) -> str | None:
        """What is wrong with rows that are to be loaded: None if nothing is."""
        if stored_RP.dtype != torch.uint8:
            return f"has {stored_RP.dtype}, expected packed rows of torch.uint8"
        numbers_R2 = self.packing.numbers(stored_RP)
        return None if bool(numbers_R2.isfinite().all()) else "has a NaN or infinite scale or bias"
