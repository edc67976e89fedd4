from __future__ import annotations

import pytest
import torch

from fullrank.layers.token_pairs import TokenPairs
from fullrank.layers.token_projection import FlatToTokens, TokenProjection


@pytest.mark.parametrize("tokens", [1, 4])
def test_first_and_second_derivatives_equal_finite_differences(tokens: int) -> None:
    torch.manual_seed(0)
    pairs = TokenPairs(tokens).double()
    x = torch.randn(2, tokens, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pairs, (x,))
    assert torch.autograd.gradgradcheck(pairs, (x,))


def test_pairs_are_the_upper_triangle_of_the_gram_matrix_row_by_row() -> None:
    x = torch.randn(3, 5, 4)
    gram = x @ x.transpose(1, 2)
    row, column = torch.triu_indices(5, 5)
    torch.testing.assert_close(TokenPairs(5)(x), gram[:, row, column])


def test_gradients_equal_autograds_in_bfloat16_too() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 5, 4, requires_grad=True)
    weight = torch.randn(3, 15)
    with torch.autocast("cpu", torch.bfloat16):
        ours = (TokenPairs(5)(x).float() * weight).sum()
    row, column = torch.triu_indices(5, 5)
    plain = ((x @ x.transpose(1, 2))[:, row, column] * weight).sum()
    found, expected = (torch.autograd.grad(loss, x)[0] for loss in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


def test_projections_are_their_matrices() -> None:
    x = torch.randn(2, 5, 3)
    tokens = TokenProjection(5, 4)
    torch.testing.assert_close(tokens(x), torch.stack([tokens.weight_ON @ row for row in x]))
    flat = FlatToTokens(15, 4, 3)
    torch.testing.assert_close(flat(x.flatten(1)).flatten(1), flat.linear(x.flatten(1)))
    with pytest.raises(ValueError, match="needs at least 1 token on both sides, got 0, 2"):
        TokenProjection(0, 2)
