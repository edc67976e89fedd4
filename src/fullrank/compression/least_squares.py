"""Scale and bias fitted to codes, and codes to scale and bias, in turn."""

# Shapes: R rows, D width.

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.embeddings.packed import Packing

# Measured: after this many rounds hardly a row still changes.
ROUNDS = 10
CHUNK_NUMBERS = 1 << 18


def least_squares(
    weight_RD: Tensor, packing: Packing, low_R: Tensor, high_R: Tensor, starts: int = 0
) -> tuple[Tensor, Tensor]:
    """Scale and bias of each row that lose no more than those of a range, and mostly less, in the same bytes.

    With the codes q of a row fixed, s = cov(q, x) / var(q) and b = mean(x) - s mean(q) have the least squared error;
    with these rounded to what is stored, the codes are chosen anew. The best that was seen is kept.

    Args:
        starts: begin from as many ranges more, of a grid that clips up to 30 % of a row's range at either end.

    Returns:
        scale_R, bias_R, float32 of what is stored.
    """
    side = round(starts**0.5)
    shares = [(i * 0.3 / side, j * 0.3 / side) for i in range(side) for j in range(side)] if side else []
    found = []
    size = max(64, CHUNK_NUMBERS // packing.width)
    for rows_RD, begin_R, end_R in zip(
        torch.split(weight_RD, size), torch.split(low_R, size), torch.split(high_R, size), strict=True
    ):
        least_R, most_R = rows_RD.aminmax(dim=1)
        range_R = most_R - least_R
        ranges = [(begin_R, end_R), *((least_R + a * range_R, most_R - b * range_R) for a, b in shares)]
        best_R = torch.full_like(begin_R, torch.inf)
        best_scale_R, best_bias_R = torch.ones_like(begin_R), torch.zeros_like(begin_R)
        for start in ranges:
            scale_R, bias_R = packing.scale_and_bias(*start)
            for _ in range(ROUNDS):
                code_RD, loss_R = _codes(rows_RD, packing, scale_R, bias_R)
                better_R = loss_R < best_R
                if not bool(better_R.any()):
                    break
                best_R = torch.where(better_R, loss_R, best_R)
                best_scale_R = torch.where(better_R, scale_R, best_scale_R)
                best_bias_R = torch.where(better_R, bias_R, best_bias_R)
                scale_R, bias_R = _fit(rows_RD, packing, code_RD, scale_R, bias_R)
        found.append((best_scale_R, best_bias_R))
    return torch.cat([scale_R for scale_R, _ in found]), torch.cat([bias_R for _, bias_R in found])


def _codes(weight_RD: Tensor, packing: Packing, scale_R: Tensor, bias_R: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as float32, and the squared error of each row."""
    code_RD = (weight_RD - bias_R[:, None]).mul_(scale_R.reciprocal()[:, None]).round_().clamp_(0, packing.levels)
    error_RD = torch.addcmul(bias_R[:, None], code_RD, scale_R[:, None]).sub_(weight_RD)
    return code_RD, error_RD.square_().sum(1)


def _fit(
    weight_RD: Tensor, packing: Packing, code_RD: Tensor, scale_R: Tensor, bias_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Rounded least-squares scale and bias; those there are where all codes of a row are equal."""
    mean_R, middle_R = code_RD.mean(1), weight_RD.mean(1)
    code_RD = code_RD - mean_R[:, None]
    spread_R = code_RD.square().sum(1)
    fitted_R = (code_RD * weight_RD).sum(1) / spread_R
    stored_R = fitted_R.to(packing.scale_dtype).float()
    fits_R = (stored_R > 0) & stored_R.reciprocal().isfinite() & stored_R.isfinite()
    bias_of_fit_R = (middle_R - stored_R * mean_R).to(packing.scale_dtype).float()
    fits_R &= bias_of_fit_R.isfinite()
    return torch.where(fits_R, stored_R, scale_R), torch.where(fits_R, bias_of_fit_R, bias_R)
