"""Many learned questions to a history, compressed to few summary tokens."""

# Shapes: B rows, S seeds, T output tokens, D width, R rank (number of Kronecker terms), L events.

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.layers.attention import MultiHeadAttention


class SumKronLinear(nn.Module):
    """Y_b = Σ_i Z_iᵀ X_b W_i: a linear map of S x D to T x D matrices with R (S T + D²) weights.

    It equals the full map with matrix Σ_i Z_iᵀ ⊗ W_iᵀ, which would have S·D·T·D weights.
    """

    def __init__(self, num_tokens: int, out_tokens: int, width: int, rank: int) -> None:
        super().__init__()
        self.mix_RTS = nn.Parameter(torch.randn(rank, out_tokens, num_tokens) * num_tokens**-0.5)
        self.weight_RDD = nn.Parameter(torch.randn(rank, width, width) * (rank * width) ** -0.5)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Shape (B, T, D). Tokens are mixed first: there are fewer of them afterwards."""
        rank, tokens, _ = self.mix_RTS.shape
        mixed = self.mix_RTS.flatten(0, 1) @ x_BSD
        flat = torch.unflatten(mixed, 1, (rank, tokens)).transpose(1, 2).flatten(2)
        return flat @ self.weight_RDD.flatten(0, 1)


class HierarchicalSeedPooling(nn.Module):
    """H = SumKron(MHA(norm(E), S, S)) with more learned seeds E than output tokens; depends on no padding.

    Seeds ask from the moment of the request, angle 0; with `turn_BLP` the keys of the events are rotated, so that a
    seed can tell recent events from old ones. Without, the order of events does not matter.

    Raises:
        ValueError: unless there are more seeds than tokens.

    Source: Kunlun, arXiv 2602.10016.
    """

    def __init__(self, width: int, num_heads: int, num_seeds: int, num_tokens: int, rank: int) -> None:
        super().__init__()
        if num_seeds <= num_tokens:
            raise ValueError(f"expected more seeds than summary tokens, got {num_seeds} seeds for {num_tokens} tokens")
        self.seed_SD = nn.Parameter(torch.randn(num_seeds, width))
        self.norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, num_heads)
        self.compress = SumKronLinear(num_seeds, num_tokens, width, rank)

    def forward(self, events_BLD: Tensor, mask_BL: Tensor | None = None, turn_BLP: Tensor | None = None) -> Tensor:
        """Shape (B, T, D). `turn_BLP`: see `fullrank.layers.attention.turns`."""
        seed_SD = self.norm(self.seed_SD)
        if turn_BLP is None:
            pooled_BSD = self.attention.pool(seed_SD, events_BLD, mask_BL)
        else:
            seed_BSD = seed_SD.expand(len(events_BLD), -1, -1)
            pooled_BSD = self.attention(seed_BSD, events_BLD, mask_BL, key_turn_BKP=turn_BLP)
        summary: Tensor = self.compress(pooled_BSD)
        return summary
