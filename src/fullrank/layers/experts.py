"""Gates over experts."""

# Shapes: B rows, I input width, E experts, H width of an expert's output.

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.layers.mlp import Float32Linear


class ExpertMixture(nn.Module):
    """Σ_k softmax(W x)_k f_k: the gate's weights sum to 1 in every row."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.gate = Float32Linear(width, num_experts, bias=False)
        nn.init.xavier_normal_(self.gate.weight)

    def weights(self, x_BI: Tensor) -> Tensor:
        """Shape (B, E), rows summing to 1."""
        return torch.softmax(self.gate(x_BI), dim=1)

    def forward(self, x_BI: Tensor, outputs_BEH: Tensor) -> Tensor:
        return torch.bmm(self.weights(x_BI)[:, None], outputs_BEH).squeeze(1)
