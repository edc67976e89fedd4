"""A history as few tokens: as it is, through a Transformer layer, or asked by learned seeds."""

# Shapes: B histories, L events, S seeds, D width.

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["bypass", "transformer", "pma"]


class HistoryEncoder(nn.Module):
    """Bypass X W; Transformer X' + MLP(LN X') with X' = X + Attn(LN X); PMA, which has seeds S in the place of queries.

    Attn is softmax((X W_Q)(X W_K)ᵀ / √D) X W_V, one head, over real events; learned embeddings of position are added
    before it. For a history without events the Transformer gives zeros, and PMA what its seeds say of one event of
    zeros.

    Args:
        dim: D.
        num_seeds: S, for `pma`.
        max_len: most events.

    Raises:
        ValueError: if there is no such kind.

    Source: arXiv 2504.02137, section 5.3.
    """

    # Deviation: the paper's "+ X" has no meaning where there are S seeds and L events; here it is "+ S".

    def __init__(self, kind: Kind, dim: int, num_seeds: int = 32, max_len: int = 100) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f'history encoder: expected one of {", ".join(get_args(Kind))}, got "{kind}"')
        self.kind, self.max_len = kind, max_len
        self.value = nn.Linear(dim, dim, bias=False)
        if kind == "bypass":
            return
        self.position_LD = nn.Parameter(torch.randn(max_len, dim) * 0.02)
        self.query = nn.Linear(dim, dim, bias=False) if kind == "transformer" else None
        self.seed_SD = nn.Parameter(torch.randn(num_seeds, dim) * dim**-0.5) if kind == "pma" else None
        self.key = nn.Linear(dim, dim, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, events_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Shape (B, L, D), zero where there is no event; (B, S, D) with seeds.

        Args:
            mask_BL: which events are real.

        Raises:
            ValueError: if there are more than `max_len` events.
        """
        if self.kind == "bypass":
            found: Tensor = self.value(events_BLD) * mask_BL[:, :, None]
            return found
        attention_BTL, carried, value_BLD = self._attend(events_BLD, mask_BL)
        mixed = carried + attention_BTL @ value_BLD
        mixed = torch.add(mixed, self.mlp(self.norms[1](mixed)))
        return mixed if self.seed_SD is not None else torch.where(mask_BL[:, :, None], mixed, 0.0)

    def attention(self, events_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Where each event, or seed, looks: distributions over events, (B, L, L) or (B, S, L).

        Raises:
            ValueError: if this encoder has no attention.
        """
        if self.kind == "bypass":
            raise ValueError("a bypass has no attention")
        return self._attend(events_BLD, mask_BL)[0]

    def _attend(self, events_BLD: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, length, width = events_BLD.shape
        if length > self.max_len:
            raise ValueError(f"a history has {length} events, expected at most {self.max_len}")
        real_BL1 = mask_BL[:, :, None]
        placed_BLD = torch.where(real_BL1, events_BLD + self.position_LD[:length], 0.0)
        normed_BLD = torch.where(real_BL1, self.norms[0](placed_BLD), 0.0)
        if self.seed_SD is None:
            assert self.query is not None
            query_BTD, carried = self.query(normed_BLD), placed_BLD
        else:
            query_BTD = carried = self.seed_SD.expand(rows, -1, -1)
        score_BTL = query_BTD @ self.key(normed_BLD).transpose(1, 2) * width**-0.5
        # Padding is zeros: where nothing is real, a softmax over it is one over events of zeros, and not NaN.
        open_BL = mask_BL | ~mask_BL.any(1, keepdim=True)
        attention_BTL = torch.softmax(score_BTL.masked_fill(~open_BL[:, None, :], -torch.inf), 2)
        return attention_BTL, carried, self.value(normed_BLD)
