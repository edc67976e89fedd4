"""Self-attention within a window of neighbours, in time and memory linear in the length."""

# Shapes: B rows, T tokens, D width, H heads, E width of a head, C chunks of S tokens, K = S + 2 window keys of a chunk,
# P rotary pairs of all heads.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.layers.attention import attend, merge_heads, require_heads, rotate, split_heads


def sliding_window(
    query_BHTE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor, window: int, mask_BT: Tensor | None = None
) -> Tensor:
    """softmax attention of each token over the real tokens at most `window` places away; zero where there is none.

    Tokens are cut into chunks of a window; each chunk sees itself and its two neighbours, so no T x T matrix exists
    unless it is smaller than those.

    Returns:
        Shape (B, H, T, E).
    """
    rows, heads, length, width = query_BHTE.shape
    if torch.compiler.is_exporting():  # a program that does not branch on its input
        return _banded(query_BHTE, key_BHTE, value_BHTE, window, mask_BT)
    if window >= length - 1:
        return attend(query_BHTE, key_BHTE, value_BHTE, mask_BT)
    size = max(1, window)
    if length <= size + 2 * window:  # a chunk would have as many keys
        return _banded(query_BHTE, key_BHTE, value_BHTE, window, mask_BT)
    chunks = -(-length // size)
    tail = chunks * size - length
    keys = size + 2 * window

    def own(x_BHTE: Tensor) -> Tensor:
        """(B·C, H, S, E): each chunk's tokens. Time stays before heads in memory, as projections leave it."""
        x_BTHE = F.pad(x_BHTE.transpose(1, 2), (0, 0, 0, 0, 0, tail))
        return x_BTHE.reshape(rows * chunks, size, heads, width).transpose(1, 2)

    def near(x_BHTE: Tensor) -> Tensor:
        """(B·C, H, K, E): the tokens of each chunk and those around it."""
        x_BTHE = F.pad(x_BHTE.transpose(1, 2), (0, 0, 0, 0, size, size + tail))
        x_BCSHE = x_BTHE.reshape(rows, chunks + 2, size, heads, width)
        parts = [x_BCSHE[:, :-2, size - window :], x_BCSHE[:, 1:-1], x_BCSHE[:, 2:, :window]]
        return torch.cat(parts, 2).view(rows * chunks, keys, heads, width).transpose(1, 2)

    device = query_BHTE.device
    real_BT = torch.ones(1, length, dtype=torch.bool, device=device) if mask_BT is None else mask_BT
    real_BCK = F.pad(real_BT, (window, window + tail)).unfold(1, keys, size)
    place_K = torch.arange(keys, device=device)
    band_SK = (place_K[None, :] - window - place_K[:size, None]).abs() <= window
    seen_BCSK = band_SK & real_BCK[:, :, None, :]
    none_BCS1 = ~seen_BCSK.any(3, keepdim=True)
    # Tokens that see nothing attend to everything and are zeroed afterwards: a softmax over nothing is NaN.
    bias_BCSK = query_BHTE.new_zeros(seen_BCSK.shape).masked_fill(~(seen_BCSK | none_BCS1), -torch.inf)
    bias = bias_BCSK.expand(rows, -1, -1, -1).reshape(rows * chunks, 1, size, keys)
    mixed = F.scaled_dot_product_attention(own(query_BHTE), near(key_BHTE), near(value_BHTE), attn_mask=bias)
    mixed = mixed.transpose(1, 2).reshape(rows, chunks * size, heads, width)[:, :length].transpose(1, 2)
    if mask_BT is None:
        return mixed
    none_BT = none_BCS1.view(rows, chunks * size)[:, :length]
    return mixed.masked_fill(none_BT[:, None, :, None], 0.0)


def _banded(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, window: int, mask_BT: Tensor | None) -> Tensor:
    """The same by a mask on all pairs of tokens."""
    place_T = torch.arange(q_BHTE.shape[2], device=q_BHTE.device)
    band_TT = (place_T[:, None] - place_T[None, :]).abs() <= window
    if mask_BT is None:
        return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=band_TT)
    seen_BTT = band_TT & mask_BT[:, None, :]
    none_BT1 = ~seen_BTT.any(2, keepdim=True)
    mixed = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=(seen_BTT | none_BT1)[:, None])
    return mixed.masked_fill(none_BT1[:, None], 0.0)


class SlidingWindowAttention(nn.Module):
    """Multi-head self-attention over the tokens at most `window` places away.

    Raises:
        ValueError: if `num_heads` does not divide `width` or the window is negative.
    """

    def __init__(self, width: int, num_heads: int, window: int) -> None:
        super().__init__()
        require_heads(width, num_heads)
        if window < 0:
            raise ValueError(f"expected a window of at least 0, got {window}")
        self.num_heads, self.window = num_heads, window
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        for weight in (*self.query_key_value.weight.chunk(3), self.out.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens_BTD: Tensor, mask_BT: Tensor | None = None, turn_BTP: Tensor | None = None) -> Tensor:
        """Shape (B, T, D). `turn_BTP` rotates queries and keys, see `fullrank.layers.attention.turns`."""
        parts = list(self.query_key_value(tokens_BTD).chunk(3, dim=2))
        if turn_BTP is not None:
            parts[:2] = [rotate(part, turn_BTP) for part in parts[:2]]
        query, key, value = (split_heads(part, self.num_heads) for part in parts)
        mixed: Tensor = self.out(merge_heads(sliding_window(query, key, value, self.window, mask_BT)))
        return mixed
