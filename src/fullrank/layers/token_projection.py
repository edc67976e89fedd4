"""Linear maps to tokens: from tokens, as learned mixtures over their axis, or from a flat vector."""

# Shapes: B rows, N input tokens, O output tokens, D width, I width of a flat input.

from __future__ import annotations

import torch
from torch import Tensor, nn


def project_tokens(tokens_BND: Tensor, weight_ON: Tensor) -> Tensor:
    """Shape (B, O, D): W X in every row. The gradient of W is one product, never a matrix per row."""
    return torch.einsum("on,bnd->bod", weight_ON, tokens_BND)


class TokenProjection(nn.Module):
    """W X with a learned W of shape (O, N), no bias; W starts from N(0, 1/N), which keeps the scale of the tokens.

    Raises:
        ValueError: if a number of tokens is below 1.
    """

    def __init__(self, num_tokens: int, out_tokens: int) -> None:
        super().__init__()
        if num_tokens < 1 or out_tokens < 1:
            raise ValueError(f"a token projection needs at least 1 token on both sides, got {num_tokens}, {out_tokens}")
        self.weight_ON = nn.Parameter(torch.randn(out_tokens, num_tokens) * num_tokens**-0.5)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return project_tokens(tokens_BND, self.weight_ON)


class FlatToTokens(nn.Module):
    """A linear layer whose output is read as tokens: (B, I) to (B, O, D)."""

    def __init__(self, in_features: int, out_tokens: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(in_features, out_tokens * width)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BI: Tensor) -> Tensor:
        flat: Tensor = self.linear(x_BI)
        return flat.view(len(flat), -1, self.width)
