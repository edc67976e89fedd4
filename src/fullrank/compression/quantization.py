"""One table as codes: the call, and what it returns."""

# Shapes: R rows, D width, P bytes of a row, N looked-up ids, B bags.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fullrank.compression.codebooks import CodebookTable, row_codebooks, two_tier_codebooks
from fullrank.compression.greedy import greedy
from fullrank.compression.least_squares import least_squares
from fullrank.compression.packing import pack_ranges
from fullrank.compression.ranges import RANGES, Search
from fullrank.embeddings.packed import SCALE_TYPES, Bits, Packing, ScaleType

Method = Literal[
    "minmax",
    "symmetric",
    "golden_section",
    "aciq",
    "histogram_approximate",
    "histogram_brute",
    "table",
    "greedy",
    "least_squares",
    "row_codebook",
    "two_tier_codebook",
]
# Methods that choose one scale and bias a row, and so a form that is served.
RANGE_METHODS = (*RANGES, "least_squares")


@dataclass(frozen=True)
class QuantizedTable:
    """Rows of codes with a scale and a bias each.

    Attributes:
        packed: uint8 (R, P), see `Packing`.
    """

    packed: Tensor
    packing: Packing

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def dequantize(self, ids_N: Tensor | None = None) -> Tensor:
        """Float32 rows (N, D) of some ids, or of all."""
        return self.packing.unpack(self.packed if ids_N is None else self.packed.index_select(0, ids_N))

    def normalized_l2(self, weight_RD: Tensor) -> float:
        """Norm of the error over the norm of the weights; 0 for weights of norm 0 that are met."""
        return normalized_l2(weight_RD, self.dequantize())

    def pool(
        self, ids_N: Tensor, offsets_B: Tensor, weights_N: Tensor | None = None, *, mode: Literal["sum", "mean"] = "sum"
    ) -> Tensor:
        """Float32 (B, D): sum or mean over bags of ids that begin at the offsets, of the rows times their weights."""
        sums_BD = self.packing.pool(self.packed, ids_N, offsets_B, weights_N)
        if mode == "sum":
            return sums_BD
        lengths_B = torch.diff(offsets_B, append=offsets_B.new_tensor([len(ids_N)]))
        return sums_BD / lengths_B.clamp_min(1)[:, None]

    def to_tbe(self, alignment: int = 1) -> Tensor:
        """The bytes of FBGEMM's table-batched kernels: scale, bias, codes, zeros up to a multiple of the alignment."""
        codes = self.packing.code_bytes
        moved = torch.cat([self.packed[:, codes:], self.packed[:, :codes]], 1)
        return torch.nn.functional.pad(moved, (0, -moved.shape[1] % alignment))


def quantize_table(
    weight_RD: Tensor,
    bits: Bits = 4,
    method: Method = "greedy",
    *,
    nbins: int = 200,
    ratio: float = 0.16,
    scale_dtype: ScaleType = "fp16",
    starts: int = 0,
    name: str = "table",
) -> QuantizedTable | CodebookTable:
    """A trained table in fewer bits; the weights stay as they are.

    Args:
        weight_RD: float32, or any floating type that float32 holds.
        method: how each row's range is found: `minmax`, `symmetric`, `golden_section`, `aciq`, `histogram_approximate`,
            `histogram_brute`, `greedy`, or `least_squares`, which refines greedy; `table` for one range; or a codebook
            of 2**bits values for each row, `row_codebook`, or for each group of rows, `two_tier_codebook`.
        nbins: steps that a range is divided in by greedy and the histograms.
        ratio: share of the range that greedy may clip.
        starts: further ranges that `least_squares` begins from.
        name: of the table, for messages.

    Raises:
        ValueError: if an argument is outside its range, or the table is empty, not of floating type, or has a number
            that is not finite or beyond the scale's type; names table and row.
    """
    if bits not in get_args(Bits):
        raise ValueError(f"bits is {bits!r}, expected 2, 4 or 8")
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}, expected one of {', '.join(get_args(Method))}")
    if scale_dtype not in SCALE_TYPES:
        raise ValueError(f"scale_dtype is {scale_dtype!r}, expected one of {', '.join(SCALE_TYPES)}")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio is {ratio}, expected a share between 0 and 1")
    if nbins < 2:
        raise ValueError(f"nbins is {nbins}, expected at least 2")
    weight_RD = _checked(weight_RD, scale_dtype, name)
    if method == "row_codebook":
        return row_codebooks(weight_RD, bits)
    if method == "two_tier_codebook":
        return two_tier_codebooks(weight_RD, bits)
    packing = Packing(weight_RD.shape[1], bits, scale_dtype)
    if method == "least_squares":
        low_R, high_R = greedy(weight_RD, packing, nbins, ratio)
        scale_R, bias_R = least_squares(weight_RD, packing, low_R, high_R, starts)
        return QuantizedTable(packing.join(packing.encode(weight_RD, scale_R, bias_R), scale_R, bias_R), packing)
    low_R, high_R = RANGES[method](weight_RD, packing, Search(nbins, ratio))
    return QuantizedTable(pack_ranges(weight_RD, packing, low_R, high_R), packing)


def normalized_l2(weight_RD: Tensor, found_RD: Tensor) -> float:
    """Norm of the difference over the norm of the weights; 0 where both are 0."""
    error = float(torch.linalg.vector_norm(found_RD - weight_RD))
    return error / float(torch.linalg.vector_norm(weight_RD)) if error else 0.0


def _checked(weight_RD: Tensor, scale_type: ScaleType, name: str) -> Tensor:
    if weight_RD.ndim != 2 or not weight_RD.numel():
        raise ValueError(f"{name}: expected rows and columns, got shape {tuple(weight_RD.shape)}")
    if not weight_RD.is_floating_point():
        raise ValueError(f"{name}: expected floating-point numbers, got {weight_RD.dtype}")
    weight_RD = weight_RD.detach().float()
    low_R, high_R = weight_RD.aminmax(dim=1)
    far_R = torch.maximum(-low_R, high_R)
    if not bool(torch.isfinite(far_R).all()):
        row = int((~torch.isfinite(far_R)).nonzero()[0])
        raise ValueError(f"{name}: row {row} has a NaN or infinite number")
    largest = torch.finfo(SCALE_TYPES[scale_type]).max
    if float(far_R.max()) > largest:
        raise ValueError(
            f"{name}: row {int(far_R.argmax())} has {float(far_R.max()):.6g}, beyond the {largest:.6g} of fp16: "
            'quantise with scale_dtype="fp32"'
        )
    return weight_RD
