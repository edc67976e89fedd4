"""Transformer encoder over histories of different lengths."""

# Shapes: B rows, E tokens of all rows together, L longest row, C width.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fullrank.embeddings.padding import Padding, longest_row
from fullrank.layers.attention import attend, merge_heads, require_heads, split_heads

# Rows of a batch from which it pays to sort them by length, and into how many groups.
GROUPED_ROWS, GROUPS = 256, 4


@dataclass(frozen=True)
class LengthGroups:
    """Tokens in groups of rows of similar length, so that short rows are not padded to the longest one.

    Attributes:
        order_E: place, in the order that was given, of each token in the order of groups.
        place_E: the inverse of `order_E`.
        counts: tokens of each group.
        paddings: how the tokens of each group are padded.
    """

    order_E: Tensor
    place_E: Tensor
    counts: list[int]
    paddings: list[Padding]

    @classmethod
    def of(cls, lengths_B: Tensor, row_E: Tensor, slot_E: Tensor, *, groups: int | None = None) -> LengthGroups:
        """Args:
        lengths_B: tokens of each row.
        row_E: row of each token, in any order.
        slot_E: place of each token in its row, from 0.
        groups: default by the number of rows.
        """
        if groups is None:
            # An exported program does not branch on its input.
            several = not torch.compiler.is_exporting() and len(lengths_B) >= GROUPED_ROWS
            groups = GROUPS if several else 1
        by_length_B = lengths_B.argsort(stable=True)
        rank_B = torch.empty_like(by_length_B)
        rank_B[by_length_B] = torch.arange(len(rank_B), device=rank_B.device)
        size = -(-len(rank_B) // groups) if len(rank_B) else 1
        group_E = rank_B.index_select(0, row_E) // size
        order_E = group_E.argsort(stable=True)
        place_E = torch.empty_like(order_E)
        place_E[order_E] = torch.arange(len(order_E), device=order_E.device)
        counts = [len(order_E)] if groups == 1 else torch.bincount(group_E, minlength=groups).tolist()
        paddings = []
        tokens = torch.split(order_E, counts)
        for group, members_E in enumerate(tokens):
            length_G = lengths_B.index_select(0, by_length_B[group * size : (group + 1) * size])
            longest = longest_row(length_G)
            mask_GL = torch.arange(longest, device=length_G.device) < length_G[:, None]
            rank_E = rank_B.index_select(0, row_E.index_select(0, members_E)) - group * size
            paddings.append(Padding(mask_GL, rank_E * longest + slot_E.index_select(0, members_E)))
        return cls(order_E, place_E, counts, paddings)


class EncoderLayer(nn.Module):
    """y = LN(x + MHA(x)), LN(y + W₂ act(W₁ y)), each sum's second term under dropout.

    Everything but the attention itself works on the tokens there are, not on padding.

    Args:
        width: C.
        feed_forward: width of the inner layer.
        activation: act, element-wise.

    Raises:
        ValueError: if `num_heads` does not divide `width`.

    Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3 (normalisation after the sum).
    """

    def __init__(
        self, width: int, num_heads: int, feed_forward: int, activation: nn.Module, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        require_heads(width, num_heads)
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, feed_forward)
        self.activation = activation
        self.outer = nn.Linear(feed_forward, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for weight in (*self.query_key_value.weight.chunk(3), self.out.weight, self.inner.weight, self.outer.weight):
            nn.init.xavier_uniform_(weight)
        for layer in (self.query_key_value, self.out, self.inner, self.outer):
            nn.init.zeros_(layer.bias)

    def forward(self, tokens_EC: Tensor, groups: LengthGroups) -> Tensor:
        """Shape (E, C); tokens in the order of `groups`."""
        mixed = []
        for part, padding in zip(
            torch.split(self.query_key_value(tokens_EC), groups.counts), groups.paddings, strict=True
        ):
            query, key, value = (split_heads(x, self.num_heads) for x in padding.pad(part).chunk(3, dim=2))
            mixed.append(padding.unpad(merge_heads(attend(query, key, value, padding.mask_BL))))
        mixed_EC = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        tokens_EC = self.attention_norm(tokens_EC + self.dropout(self.out(mixed_EC)))
        inner = self.outer(self.activation(self.inner(tokens_EC)))
        output: Tensor = self.norm(tokens_EC + self.dropout(inner))
        return output
