"""The multi-layer perceptron of every ranker."""

# Shapes: B rows, I input width, O output width.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 even under autocast.

    Logits need it: bfloat16 has 8 significant bits, which would round distinct scores to ties.
    """

    def forward(self, x_BI: Tensor) -> Tensor:
        with torch.autocast(x_BI.device.type, enabled=False):
            return F.linear(x_BI.float(), self.weight, self.bias)


class MLP(nn.Module):
    """Linear, optional batch norm, activation, dropout, repeated; then a plain linear layer if `out_features` is given.

    Weights start Xavier-normal, biases at 0. The output layer always computes in float32; hidden layers follow
    autocast.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int | None = None,
        *,
        activation: str = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f'activation "{activation}" is unknown; choose one of {", ".join(ACTIVATIONS)}')
        layers: list[nn.Module] = []
        width = in_features
        for units in hidden:
            layers.append(nn.Linear(width, units))
            if batch_norm:
                layers.append(nn.BatchNorm1d(units))
            layers.append(ACTIVATIONS[activation]())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = units
        if out_features is not None:
            layers.append(Float32Linear(width, out_features))
            width = out_features
        self.out_features = width
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x_BI: Tensor) -> Tensor:
        output: Tensor = self.layers(x_BI)
        return output
