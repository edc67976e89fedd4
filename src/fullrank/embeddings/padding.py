"""Rows of different lengths as one tensor."""

# Shapes: B rows, E tokens of all rows together, L longest row, C channels.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def longest_row(lengths_B: Tensor) -> int:
    """L, at least 1."""
    if torch.compiler.is_exporting():
        # A program does not branch on its input, as it would have to for a size of 0 or 1.
        longest = int(lengths_B.max())
        torch._check(longest >= 0)  # type: ignore[no-untyped-call]
        return longest + 2
    return max(1, int(lengths_B.max())) if lengths_B.numel() else 1


@dataclass(frozen=True)
class Padding:
    """Where the tokens of jagged rows lie in a padded tensor.

    Attributes:
        mask_BL: true where there is a token; L is at least 1.
        place_E: place of each token in the flattened (B, L).
    """

    mask_BL: Tensor
    place_E: Tensor

    @classmethod
    def of(cls, lengths_B: Tensor) -> Padding:
        longest = longest_row(lengths_B)
        mask_BL = torch.arange(longest, device=lengths_B.device) < lengths_B[:, None]
        return cls(mask_BL, mask_BL.view(-1).nonzero().squeeze(1))

    def pad(self, tokens_EC: Tensor) -> Tensor:
        """Shape (B, L, C), zero in the padding."""
        padded = tokens_EC.new_zeros(self.mask_BL.numel(), tokens_EC.shape[1])
        return torch.unflatten(padded.index_copy(0, self.place_E, tokens_EC), 0, self.mask_BL.shape)

    def unpad(self, tokens_BLC: Tensor) -> Tensor:
        """Shape (E, C)."""
        return tokens_BLC.flatten(0, 1).index_select(0, self.place_E)
