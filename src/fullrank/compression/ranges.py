"""Ranges that rows are clipped to before they become codes: one function per method, each to low_R and high_R."""

# Shapes: R rows, D width.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.compression.errors import exact_loss
from fullrank.compression.greedy import greedy
from fullrank.compression.histogram import histogram_approximate, histogram_brute
from fullrank.embeddings.packed import Bits, Packing

# Rows at once: they and their errors stay in a core's cache.
CHUNK_NUMBERS = 1 << 18
# Clipping that loses least of a Gaussian variable, in standard deviations, by bits: Banner et al. 2019.
GAUSSIAN_CLIP: dict[Bits, float] = {2: 1.7106, 4: 2.5591, 8: 3.9240}
# Each step of a golden-section search leaves 0.618 of the interval; 24 leave a hundred-thousandth.
GOLDEN_STEPS = 24


@dataclass(frozen=True)
class Search:
    """Settings of the searches that have some.

    Attributes:
        nbins: steps that the range of a row is divided in.
        ratio: of a greedy search, the share of the range that may be clipped.
    """

    nbins: int = 200
    ratio: float = 0.16


Range = tuple[Tensor, Tensor]


def minmax(weight_RD: Tensor, packing: Packing, search: Search) -> Range:
    """The whole range of each row."""
    low_R, high_R = weight_RD.aminmax(dim=1)
    return low_R, high_R


def symmetric(weight_RD: Tensor, packing: Packing, search: Search) -> Range:
    """As far as the largest magnitude on both sides of 0."""
    high_R = weight_RD.abs().amax(1)
    return -high_R, high_R


def golden_section(weight_RD: Tensor, packing: Packing, search: Search) -> Range:
    """Equally far on both sides of 0, up to the magnitude that a golden-section search finds to cost least."""
    found = []
    for rows_RD in torch.split(weight_RD, max(64, CHUNK_NUMBERS // packing.width)):
        loss = exact_loss(rows_RD.T.contiguous(), packing)
        high_R = rows_RD.abs().amax(1)
        begin_R, end_R = torch.zeros_like(high_R), high_R
        share = (5**0.5 - 1) / 2
        for _ in range(GOLDEN_STEPS):
            first_R, second_R = end_R - share * (end_R - begin_R), begin_R + share * (end_R - begin_R)
            left_R = loss(-first_R, first_R) < loss(-second_R, second_R)
            begin_R, end_R = torch.where(left_R, begin_R, first_R), torch.where(left_R, second_R, end_R)
        middle_R = (begin_R + end_R) / 2
        found.append(torch.where(loss(-middle_R, middle_R) < loss(-high_R, high_R), middle_R, high_R))
    high_R = torch.cat(found)
    return -high_R, high_R


def aciq(weight_RD: Tensor, packing: Packing, search: Search) -> Range:
    """As many standard deviations around the mean as are best if a row is Gaussian."""
    mean_R = weight_RD.mean(1)
    reach_R = GAUSSIAN_CLIP[packing.bits] * weight_RD.std(1, correction=0)
    return mean_R - reach_R, mean_R + reach_R


def table_wise(weight_RD: Tensor, packing: Packing, search: Search) -> Range:
    """One range for all rows: that of the table."""
    low, high = weight_RD.aminmax()
    return low.expand(len(weight_RD)), high.expand(len(weight_RD))


def greedy_range(weight_RD: Tensor, packing: Packing, search: Search) -> Range:
    """See `fullrank.compression.greedy`."""
    return greedy(weight_RD, packing, search.nbins, search.ratio)


def histogram_approximate_range(weight_RD: Tensor, packing: Packing, search: Search) -> Range:
    """See `fullrank.compression.histogram`."""
    return histogram_approximate(weight_RD, packing, search.nbins)


def histogram_brute_range(weight_RD: Tensor, packing: Packing, search: Search) -> Range:
    """See `fullrank.compression.histogram`."""
    return histogram_brute(weight_RD, packing, search.nbins)


RANGES: dict[str, Callable[[Tensor, Packing, Search], Range]] = {
    "minmax": minmax,
    "symmetric": symmetric,
    "golden_section": golden_section,
    "aciq": aciq,
    "histogram_approximate": histogram_approximate_range,
    "histogram_brute": histogram_brute_range,
    "table": table_wise,
    "greedy": greedy_range,
}
