"""Rotary encoding of place and time."""

# Shapes: B rows, L events, R rotary pairs.

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.layers.attention import positions_from_latest, rotary_frequencies

# ln(1 + age / scale) of the ages that matter lies between 0 and about 6: fewer, faster frequencies than for positions.
TIME_BASE = 100.0


class ROTE(nn.Module):
    """Angles for rotary attention from place and time: half of the pairs turn with the place counted back from the
    latest event, half with ln(1 + Δt / scale).

    Args:
        pairs: R of a head.
        time_scale: seconds that count as one.
        reference: Δt runs from the event to the `request`, or from the `previous` event to it.

    Deviation: sources differ on the Δt that is meant; `request` is our default. Ages below 0 (clock skew) count as 0,
    with a warning that says how many there are.
    """

    position_R: Tensor
    time_R: Tensor

    def __init__(
        self, pairs: int, *, time_scale: float = 86_400.0, reference: Literal["request", "previous"] = "request"
    ) -> None:
        super().__init__()
        self.time_scale, self.reference = time_scale, reference
        self.timed = pairs // 2
        self.register_buffer("position_R", rotary_frequencies(pairs), persistent=False)
        self.register_buffer("timed_position_R", rotary_frequencies(pairs - self.timed), persistent=False)
        self.register_buffer("time_R", rotary_frequencies(self.timed, TIME_BASE), persistent=False)

    def forward(self, mask_BL: Tensor, age_BL: Tensor | None) -> Tensor:
        """angle_BLR; without ages all pairs turn with the place."""
        place_BL1 = positions_from_latest(mask_BL)[:, :, None]
        if age_BL is None:
            return place_BL1 * self.position_R
        by_place = place_BL1 * self.get_buffer("timed_position_R")
        return torch.cat([by_place, self.log_time(mask_BL, age_BL)[:, :, None] * self.time_R], 2)

    def log_time(self, mask_BL: Tensor, age_BL: Tensor) -> Tensor:
        """ln(1 + Δt / scale), 0 in the padding."""
        skewed = (age_BL < 0) & mask_BL
        if not torch.compiler.is_compiling() and bool(skewed.any()):
            warnings.warn(f"{int(skewed.sum())} events are younger than their request: taken as age 0", stacklevel=2)
        age_BL = age_BL.clamp_min(0)
        if self.reference == "previous":
            gap_BL = (age_BL[:, :-1] - age_BL[:, 1:]).clamp_min(0)
            age_BL = F.pad(gap_BL, (1, 0))
        return torch.log1p(age_BL / self.time_scale).masked_fill(~mask_BL, 0.0)
