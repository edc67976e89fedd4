"""Self-attention within a window of neighbours, in time and memory linear in the length."""

# Shapes: B rows, T tokens, D width, H heads, E width of a head, W window, C chunks of W tokens, R rotary pairs.

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.layers.attention import attend, merge_heads, require_heads, rotate, split_heads


def sliding_window(
    query_BHTE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor, window: int, mask_BT: Tensor | None = None
) -> Tensor:
    """softmax attention of each token over the real tokens at most `window` places away; zero where there is none.

    Tokens are cut into chunks of W; each chunk sees itself and its two neighbours, so no T x T matrix exists.

    Returns:
        Shape (B, H, T, E).
    """
    rows, heads, length, width = query_BHTE.shape
    if window >= length - 1:
        return attend(query_BHTE, key_BHTE, value_BHTE, mask_BT)
    size = max(1, window)
    chunks = -(-length // size)
    tail = chunks * size - length

    def own(x: Tensor) -> Tensor:
        """(B·C, H, W, E): each chunk's tokens."""
        parts = F.pad(x, (0, 0, 0, tail)).view(rows, heads, chunks, size, width)
        return parts.transpose(1, 2).reshape(rows * chunks, heads, size, width)

    def near(x: Tensor) -> Tensor:
        """(B·C, H, 3W, E): the tokens of each chunk and of its neighbours."""
        parts = F.pad(x, (0, 0, size, size + tail)).unfold(2, 3 * size, size)
        return parts.permute(0, 2, 1, 4, 3).reshape(rows * chunks, heads, 3 * size, width)

    device = query_BHTE.device
    real_BT = torch.ones(rows, length, dtype=torch.bool, device=device) if mask_BT is None else mask_BT
    real_BCK = F.pad(real_BT, (size, size + tail)).unfold(1, 3 * size, size)
    place_K = torch.arange(3 * size, device=device)
    band_WK = (place_K[None, :] - size - place_K[:size, None]).abs() <= window
    seen = band_WK & real_BCK[:, :, None, :]
    some = seen.any(3, keepdim=True)
    bias = (seen | ~some).view(rows * chunks, 1, size, 3 * size)
    mixed = F.scaled_dot_product_attention(own(query_BHTE), near(key_BHTE), near(value_BHTE), attn_mask=bias)
    mixed = mixed.masked_fill(~some.view(rows * chunks, 1, size, 1), 0.0)
    mixed = mixed.view(rows, chunks, heads, size, width).transpose(1, 2)
    return mixed.reshape(rows, heads, chunks * size, width)[:, :, :length]


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

    def forward(self, tokens_BTD: Tensor, mask_BT: Tensor | None = None, angle_BTR: Tensor | None = None) -> Tensor:
        """Shape (B, T, D)."""
        query, key, value = (split_heads(x, self.num_heads) for x in self.query_key_value(tokens_BTD).chunk(3, dim=2))
        if angle_BTR is not None:
            query, key = rotate(query, angle_BTR), rotate(key, angle_BTR)
        mixed: Tensor = self.out(merge_heads(sliding_window(query, key, value, self.window, mask_BT)))
        return mixed
