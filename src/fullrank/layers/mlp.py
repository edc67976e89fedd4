"""The multi-layer perceptron of every ranker."""

# Shapes: B rows, I input width, O output width.

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.layers.dice import Dice

# By name, from a width; in place where the input is needed by no gradient.
ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda width: nn.ReLU(inplace=True),
    "sigmoid": lambda width: nn.Sigmoid(),
    "tanh": lambda width: nn.Tanh(),
    "dice": Dice,
}


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 even under autocast.

    Logits need it: bfloat16 has 8 significant bits, which would round distinct scores to ties.
    """

    def forward(self, x_BI: Tensor) -> Tensor:
        with torch.autocast(x_BI.device.type, enabled=False):
            return F.linear(x_BI.float(), self.weight, self.bias)


class OutputLayer(Float32Linear):
    """The linear layer that ends in logits. Biases start at 0, weights Xavier-normal, or at 0 above a normalisation.

    Embeddings start tiny, and a normalisation below multiplies their first gradients by the inverse of that size. With
    random output weights those gradients are noise, and Adam's second moment remembers them for the rest of an epoch;
    with zero weights they begin when the layer has learnt a direction. Without a normalisation zero weights above tiny
    inputs would be a saddle point.
    """

    def __init__(self, in_features: int, out_features: int, *, normalized: bool) -> None:
        super().__init__(in_features, out_features)
        if normalized:
            nn.init.zeros_(self.weight)
        else:
            nn.init.xavier_normal_(self.weight)
        nn.init.zeros_(self.bias)


class MLP(nn.Module):
    """Linear, optional batch norm, activation, dropout, repeated; then an `OutputLayer` if `out_features` is given.

    Weights of hidden layers start Xavier-normal, biases at 0. The output layer always computes in float32; hidden
    layers follow autocast.

    Args:
        normalized: the input has been normalised on its way, so the `OutputLayer` is above a normalisation.
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
        normalized: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f'activation "{activation}" is unknown; choose one of {", ".join(ACTIVATIONS)}')
        layers: list[nn.Module] = []
        width = in_features
        normalized = normalized or (batch_norm and len(hidden) > 0)
        for units in hidden:
            linear = nn.Linear(width, units)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if batch_norm:
                layers.append(nn.BatchNorm1d(units))
            layers.append(ACTIVATIONS[activation](units))
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = units
        if out_features is not None:
            layers.append(OutputLayer(width, out_features, normalized=normalized))
            width = out_features
        self.out_features = width
        self.layers = nn.Sequential(*layers)

    @property
    def output_bias(self) -> Tensor:
        """The bias of the output layer, shape (out_features,)."""
        last = self.layers[-1]
        assert isinstance(last, OutputLayer)
        return last.bias

    def forward(self, x_BI: Tensor) -> Tensor:
        output: Tensor = self.layers(x_BI)
        return output
