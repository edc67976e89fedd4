"""Multi-head attention over tokens, safe for rows in which no token is real."""

# Shapes: B rows, Q queries, K keys, D width, H heads, E width of a head, R = E/2 rotary pairs of a head, P = D/2 of
# all heads.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attend(query_BHQE: Tensor, key_BHKE: Tensor, value_BHKE: Tensor, mask_BK: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √E) v over the keys that `mask_BK` marks as real; zero in rows that have none.

    Returns:
        Shape (B, H, Q, E).
    """
    if mask_BK is None:
        return F.scaled_dot_product_attention(query_BHQE, key_BHKE, value_BHKE)
    known_B = mask_BK.any(1)
    # A softmax over nothing is NaN, and so is its gradient: rows without keys attend to padding and are zeroed after.
    open_BK = mask_BK | ~known_B[:, None]
    mixed_BHQE = F.scaled_dot_product_attention(query_BHQE, key_BHKE, value_BHKE, attn_mask=open_BK[:, None, None, :])
    return mixed_BHQE.masked_fill(~known_B[:, None, None, None], 0.0)


def turns(angle_BTR: Tensor, num_heads: int) -> Tensor:
    """What `rotate` multiplies with: exp(i·angle) of each pair, the same for every head; complex, (B, T, P).

    Made once for all layers, at full width: a product that broadcasts over heads has inner loops of R numbers.
    """
    angle_BTP = angle_BTR.repeat(1, 1, num_heads)
    return torch.polar(torch.ones_like(angle_BTP), angle_BTP)


def rotate(x_BTD: Tensor, turn_BTP: Tensor) -> Tensor:
    """Rotary encoding: pair p, (x_2p, x_2p+1), taken as a complex number and turned by `turn_BTP[..., p]`.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, Neurocomputing 2024.
    """
    # There are no half-precision complex numbers to speak of.
    exact_BTD = x_BTD if x_BTD.dtype == turn_BTP.real.dtype else x_BTD.to(turn_BTP.real.dtype)
    turned_BTP = torch.view_as_complex(torch.unflatten(exact_BTD, 2, (-1, 2))) * turn_BTP
    return torch.view_as_real(turned_BTP).flatten(2).to(x_BTD.dtype)


def rotary_frequencies(pairs: int, base: float = 10_000.0) -> Tensor:
    """base^(-r/R) for r in 0..R-1: radians that one step of position turns pair r by."""
    return base ** -(torch.arange(pairs) / max(1, pairs))


def positions_from_latest(mask_BL: Tensor) -> Tensor:
    """Index of each real event counted back from the latest (0), float32; padding never shifts it."""
    return (mask_BL.sum(1, keepdim=True) - mask_BL.cumsum(1)).clamp_min(0).float()


class MultiHeadAttention(nn.Module):
    """Queries attend to keys, whose own tokens are the values.

    Args:
        width: D of queries, keys and output.
        num_heads: must divide `width`.

    Raises:
        ValueError: if `num_heads` does not divide `width`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        require_heads(width, num_heads)
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        for weight in (self.query.weight, *self.key_value.weight.chunk(2), self.out.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        query_BQD: Tensor,
        key_BKD: Tensor,
        mask_BK: Tensor | None = None,
        *,
        query_turn_BQP: Tensor | None = None,
        key_turn_BKP: Tensor | None = None,
    ) -> Tensor:
        """Shape (B, Q, D). `turns` of the positions rotate queries and keys before they meet."""
        query_BQD = self.query(query_BQD)
        key_BKD, value_BKD = self.key_value(key_BKD).chunk(2, dim=2)
        if query_turn_BQP is not None:
            query_BQD = rotate(query_BQD, query_turn_BQP)
        if key_turn_BKP is not None:
            key_BKD = rotate(key_BKD, key_turn_BKP)
        query, key, value = (split_heads(part, self.num_heads) for part in (query_BQD, key_BKD, value_BKD))
        mixed: Tensor = self.out(merge_heads(attend(query, key, value, mask_BK)))
        return mixed

    def pool(self, query_QD: Tensor, key_BKD: Tensor, mask_BK: Tensor | None = None) -> Tensor:
        """`forward` for queries that all rows share, shape (B, Q, D).

        q_h kᵀ = x (W_kᵀ q_h) and Σ p v = (Σ p x) W_vᵀ: with the queries folded into the weights, no keys and no values
        are made; what touches every token is one matrix product and one weighted sum.
        """
        width, heads = key_BKD.shape[2], self.num_heads
        query_HQE = torch.unflatten(self.query(query_QD), 1, (heads, -1)).transpose(0, 1) * (width // heads) ** -0.5
        key_HED, value_HED = self.key_value.weight.view(2, heads, -1, width)
        # M = H·Q, head after head.
        score_BKM = F.linear(key_BKD, torch.bmm(query_HQE, key_HED.to(query_HQE.dtype)).flatten(0, 1))
        if mask_BK is not None:
            # Rows without keys attend to padding and are zeroed after: a softmax over nothing is NaN.
            known_B1 = mask_BK.any(1, keepdim=True)
            score_BKM = score_BKM.masked_fill((~mask_BK & known_B1)[:, :, None], -torch.inf)
        pooled_BMD = torch.bmm(torch.softmax(score_BKM, 1).transpose(1, 2).to(key_BKD.dtype), key_BKD)
        pooled_HND = torch.unflatten(pooled_BMD, 1, (heads, -1)).transpose(0, 1).flatten(1, 2)
        mixed_HNE = torch.bmm(pooled_HND, value_HED.transpose(1, 2).to(pooled_HND.dtype))
        mixed_BQD = torch.unflatten(mixed_HNE, 1, (len(key_BKD), -1)).permute(1, 2, 0, 3).flatten(2)
        if mask_BK is not None:
            mixed_BQD = mixed_BQD.masked_fill(~known_B1[:, :, None], 0.0)
        out: Tensor = self.out(mixed_BQD)
        return out


def require_heads(width: int, num_heads: int) -> None:
    """Raises:
    ValueError: if `num_heads` is below 1 or does not divide `width`.
    """
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide the width of the tokens, got {num_heads} heads for width {width}")


def split_heads(x_BTD: Tensor, num_heads: int) -> Tensor:
    """(B, T, D) to (B, H, T, D/H)."""
    return torch.unflatten(x_BTD, 2, (num_heads, -1)).transpose(1, 2)


def merge_heads(x_BHTE: Tensor) -> Tensor:
    """(B, H, T, E) to (B, T, H·E)."""
    return x_BHTE.transpose(1, 2).flatten(2)


class PoolingByMultiheadAttention(nn.Module):
    """Learned queries that summarise a history in a fixed number of tokens; zero for an empty history.

    Source: Lee et al., Set Transformer, ICML 2019.
    """

    def __init__(self, width: int, num_queries: int, num_heads: int) -> None:
        super().__init__()
        self.query_QD = nn.Parameter(torch.empty(num_queries, width))
        nn.init.xavier_uniform_(self.query_QD)
        self.attention = MultiHeadAttention(width, num_heads)

    def forward(self, tokens_BKD: Tensor, mask_BK: Tensor | None = None) -> Tensor:
        """Shape (B, Q, D)."""
        pooled = self.attention.pool(self.query_QD, tokens_BKD, mask_BK)
        if mask_BK is None:
            return pooled
        return pooled.masked_fill(~mask_BK.any(1)[:, None, None], 0.0)
