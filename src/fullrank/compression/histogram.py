"""Ranges chosen by a histogram of each row instead of its numbers."""

# Shapes: R rows, D width, H bins, P pairs of a first and a last bin.

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.embeddings.packed import Packing

# Numbers of a table of losses that are held at once.
CHUNK_NUMBERS = 1 << 24


def histogram_approximate(weight_RD: Tensor, packing: Packing, nbins: int = 200) -> tuple[Tensor, Tensor]:
    """From all bins, one bin less at whichever end costs less, to the last one; the best range on the way."""
    pair_error_PH, pair_HH = _errors(packing, nbins)
    found = []
    for rows_RD in torch.split(weight_RD, max(1, CHUNK_NUMBERS // nbins)):
        count_RH = _histograms(rows_RD, nbins)
        first_R = torch.zeros(len(rows_RD), dtype=torch.int64)
        last_R = torch.full_like(first_R, nbins - 1)

        def loss(first_R: Tensor, last_R: Tensor, count_RH: Tensor = count_RH) -> Tensor:
            return (pair_error_PH[pair_HH[first_R, last_R]] * count_RH).sum(1)

        best_R, best_first_R, best_last_R = loss(first_R, last_R), first_R, last_R
        for _ in range(nbins - 1):
            left_R, right_R = loss(first_R + 1, last_R), loss(first_R, last_R - 1)
            to_left_R = left_R < right_R
            first_R, last_R = first_R + to_left_R.long(), last_R - (~to_left_R).long()
            now_R = torch.minimum(left_R, right_R)
            better_R = now_R < best_R
            best_R = torch.where(better_R, now_R, best_R)
            best_first_R = torch.where(better_R, first_R, best_first_R)
            best_last_R = torch.where(better_R, last_R, best_last_R)
        found.append(_range(rows_RD, best_first_R, best_last_R, nbins))
    return torch.cat([low_R for low_R, _ in found]), torch.cat([high_R for _, high_R in found])


def histogram_brute(weight_RD: Tensor, packing: Packing, nbins: int = 200) -> tuple[Tensor, Tensor]:
    """The best of all ranges from one bin to another: nbins² / 2 of them, one matrix product for all rows."""
    pair_error_PH, pair_HH = _errors(packing, nbins)
    first_P, last_P = (pair_HH >= 0).nonzero(as_tuple=True)  # in the order of the pairs
    found = []
    for rows_RD in torch.split(weight_RD, max(1, CHUNK_NUMBERS // len(first_P))):
        best_R = (_histograms(rows_RD, nbins) @ pair_error_PH.T).argmin(1)
        found.append(_range(rows_RD, first_P[best_R], last_P[best_R], nbins))
    return torch.cat([low_R for low_R, _ in found]), torch.cat([high_R for _, high_R in found])


def _errors(packing: Packing, nbins: int) -> tuple[Tensor, Tensor]:
    """Squared error of the middle of each bin when a row is clipped to a pair of bins, in units of a bin, (P, H); and
    the place of each pair, (H, H), -1 where the last bin is before the first."""
    first_P, last_P = torch.triu_indices(nbins, nbins)
    pair_HH = torch.full((nbins, nbins), -1)
    pair_HH[first_P, last_P] = torch.arange(len(first_P))
    scale_P = (last_P + 1 - first_P) / packing.levels
    middle_H = torch.arange(nbins) + 0.5
    place_PH = (middle_H - first_P[:, None]) / scale_P[:, None]
    error_PH = (place_PH - place_PH.round().clamp_(0, packing.levels)).mul_(scale_P[:, None]).square_()
    return error_PH, pair_HH


def _histograms(weight_RD: Tensor, nbins: int) -> Tensor:
    low_R, high_R = weight_RD.aminmax(dim=1)
    width_R = ((high_R - low_R) / nbins).clamp_min_(torch.finfo(torch.float32).tiny)
    bin_RD = (weight_RD - low_R[:, None]).div_(width_R[:, None]).long().clamp_(0, nbins - 1)
    return torch.zeros(len(weight_RD), nbins).scatter_add_(1, bin_RD, torch.ones_like(weight_RD))


def _range(weight_RD: Tensor, first_R: Tensor, last_R: Tensor, nbins: int) -> tuple[Tensor, Tensor]:
    low_R, high_R = weight_RD.aminmax(dim=1)
    width_R = (high_R - low_R) / nbins
    return low_R + first_R * width_R, torch.where(last_R == nbins - 1, high_R, low_R + (last_R + 1) * width_R)
