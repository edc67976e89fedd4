from __future__ import annotations

import pytest
import torch
from torch import nn

from fullrank.layers.mlp import MLP


def test_mlp_is_the_composition_of_its_layers() -> None:
    torch.manual_seed(0)
    mlp = MLP(5, [7, 3], 2, batch_norm=True).double().train()
    x_BI = torch.randn(11, 5, dtype=torch.float64)
    value = x_BI
    linears = [layer for layer in mlp.layers if isinstance(layer, nn.Linear)]
    for layer in linears[:-1]:
        value = value @ layer.weight.T + layer.bias
        value = (value - value.mean(0)) / (value.var(0, unbiased=False) + 1e-5).sqrt()
        value = value.clamp_min(0)
    expected = value.float() @ linears[-1].weight.T.float() + linears[-1].bias.float()
    linears[-1].float()
    torch.testing.assert_close(mlp(x_BI), expected, rtol=1e-5, atol=1e-5)


def test_logits_keep_float32_resolution_under_autocast() -> None:
    torch.manual_seed(0)
    mlp = MLP(8, [16], 1)
    x_BI = torch.randn(4096, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = mlp(x_BI)
    assert logits.dtype == torch.float32
    # a bfloat16 output layer would leave a few hundred distinct values
    assert logits.unique().numel() > 3000


def test_dropout_is_off_in_evaluation() -> None:
    mlp = MLP(4, [8], 1, dropout=0.9).eval()
    x_BI = torch.randn(3, 4)
    assert torch.equal(mlp(x_BI), mlp(x_BI))


def test_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match='activation "swush" is unknown'):
        MLP(4, [8], activation="swush")
