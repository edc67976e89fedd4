from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fullrank.layers.attention import (
    MultiHeadAttention,
    PoolingByMultiheadAttention,
    attend,
    positions_from_latest,
    rotary_frequencies,
    rotate,
    turns,
)


def test_attention_equals_pytorchs_layer() -> None:
    torch.manual_seed(0)
    ours = MultiHeadAttention(12, 3).double()
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    query, key = torch.randn(4, 5, 12).double(), torch.randn(4, 7, 12).double()
    mask = torch.rand(4, 7) < 0.6
    mask[:, 0] = True
    expected, _ = theirs(query, key, key, key_padding_mask=~mask)
    torch.testing.assert_close(ours(query, key, mask), expected)


def test_rows_without_keys_give_zero_and_finite_gradients() -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(3, 2, 4, 5, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    mixed = attend(query, key, key, mask)
    assert bool((mixed[1] == 0).all()) and bool((mixed[0] != 0).all())
    mixed.square().sum().backward()
    assert query.grad is not None and key.grad is not None
    assert bool(query.grad.isfinite().all()) and bool((key.grad[1] == 0).all())


def test_padding_is_never_seen() -> None:
    torch.manual_seed(0)
    pool = PoolingByMultiheadAttention(8, 2, 4)
    tokens = torch.randn(3, 6, 8)
    mask = torch.arange(6) < torch.tensor([[6], [3], [0]])
    other = torch.where(mask[:, :, None], tokens, torch.randn(3, 6, 8))
    torch.testing.assert_close(pool(tokens, mask), pool(other, mask), rtol=0, atol=1e-6)
    assert bool((pool(tokens, mask)[2] == 0).all())
    order = torch.randperm(6)
    torch.testing.assert_close(pool(tokens, mask), pool(tokens[:, order], mask[:, order]))


@pytest.mark.parametrize("masked", [False, True])
def test_queries_that_rows_share_give_what_each_row_would_get(masked: bool) -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(12, 3).double()
    query, tokens = torch.randn(5, 12).double(), torch.randn(4, 7, 12).double().requires_grad_()
    mask = torch.arange(7) < torch.tensor([[7], [3], [0], [1]]) if masked else None
    weight = torch.randn(4, 5, 12).double()

    def outcome(output: Tensor) -> list[Tensor]:
        return [output, *torch.autograd.grad((output * weight).sum(), [tokens, *attention.parameters()])]

    shared = outcome(attention.pool(query, tokens, mask))
    torch.testing.assert_close(shared, outcome(attention(query.expand(4, -1, -1), tokens, mask)))


def test_a_rotated_product_depends_on_the_difference_of_positions_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 16).double(), torch.randn(1, 1, 16).double()
    frequencies = rotary_frequencies(4).double()

    def product(at: float, of: float) -> float:
        turned = [rotate(x, turns((place * frequencies)[None, None], 2)) for x, place in ((query, at), (key, of))]
        return float((turned[0] * turned[1]).sum())

    assert product(5, 2) == pytest.approx(product(13, 10), abs=1e-12)
    assert product(5, 2) != pytest.approx(product(5, 3), abs=1e-3)
    torch.testing.assert_close(rotate(query, turns(torch.full((1, 1, 4), 2 * math.pi, dtype=torch.float64), 2)), query)


def test_positions_count_back_from_the_latest_event() -> None:
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    positions = positions_from_latest(mask)
    assert positions[mask].tolist() == [2, 1, 0, 0]


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="got 5 heads for width 12"):
        MultiHeadAttention(12, 5)
