"""Explicit feature crosses of DCN-V2."""

# Shapes: B rows, I width of the flat input.

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrossNetwork(nn.Module):
    """x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l; L layers give polynomials of degree L + 1 in the input.

    Source: Wang et al., DCN V2: Improved Deep & Cross Network, WWW 2021, equation 1.
    """

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x0_BI: Tensor) -> Tensor:
        x_BI = x0_BI
        for layer in self.layers:
            x_BI = torch.addcmul(x_BI, x0_BI, layer(x_BI).to(x0_BI.dtype))
        return x_BI
