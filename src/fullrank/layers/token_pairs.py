"""Dot products of all pairs of tokens."""

# Shapes: B rows, M tokens, D width, P = M(M+1)/2 pairs.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TokenPairs(nn.Module):
    """⟨x_i, x_j⟩ of tokens i <= j, row by row of the upper triangle: (B, M, D) to (B, P).

    Attributes:
        out_features: P.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        row, column = torch.triu_indices(num_tokens, num_tokens)
        self.out_features = len(row)
        # Where each pair stands in the flat matrix, and where each cell of the matrix finds its pair.
        place_of_pair, pair_of_place = row * num_tokens + column, torch.empty(num_tokens, num_tokens, dtype=torch.int64)
        pair_of_place[row, column] = pair_of_place[column, row] = torch.arange(len(row))
        self.register_buffer("place_of_pair", place_of_pair, persistent=False)
        self.register_buffer("pair_of_place", pair_of_place.flatten(), persistent=False)
        # A token's product with itself moves at twice the rate.
        self.register_buffer("rate_P", 1.0 + (row == column), persistent=False)

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        pairs_BP: Tensor = _UpperTriangle.apply(  # type: ignore[no-untyped-call]
            tokens_BMD, self.get_buffer("place_of_pair"), self.get_buffer("pair_of_place"), self.get_buffer("rate_P")
        )
        return pairs_BP


class _UpperTriangle(torch.autograd.Function):
    """The triangle of X Xᵀ. The gradient of X is S X with one symmetric S: a gather and one product, where autograd
    would fill and scatter into a matrix and multiply twice.
    """

    @staticmethod
    def forward(ctx: Any, tokens_BMD: Tensor, place_of_pair: Tensor, pair_of_place: Tensor, rate_P: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_BMD, pair_of_place, rate_P)
        dots_BMM = torch.bmm(tokens_BMD, tokens_BMD.transpose(1, 2))
        return dots_BMM.flatten(1).index_select(1, place_of_pair)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        tokens_BMD, pair_of_place, rate_P = ctx.saved_tensors
        size = tokens_BMD.shape[1]
        gradient_BP = (gradients[0] * rate_P).to(tokens_BMD.dtype)
        symmetric_BMM = gradient_BP.index_select(1, pair_of_place).view(-1, size, size)
        return torch.bmm(symmetric_BMM, tokens_BMD), None, None, None
