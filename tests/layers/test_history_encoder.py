"""Histories as few tokens: what padding, order and emptiness may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fullrank.embeddings.semantic_id import attention_stats
from fullrank.layers.history_encoder import HistoryEncoder

MASK = torch.tensor([[True] * 4 + [False] * 2, [True] * 6, [False] * 6])


def encoder(kind: Any) -> HistoryEncoder:
    torch.manual_seed(0)
    return HistoryEncoder(kind, 8, num_seeds=5, max_len=6).double()


def events() -> Tensor:
    return torch.randn(3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["bypass", "transformer", "pma"])
def test_what_stands_in_padding_changes_nothing(kind: str) -> None:
    model, x = encoder(kind), events()
    other = torch.where(MASK[:, :, None], x, torch.full_like(x, 1e6))
    found = model(x, MASK)
    assert torch.equal(found, model(other, MASK)) and bool(found.isfinite().all())
    assert found.shape == (3, 5 if kind == "pma" else 6, 8)
    if kind == "pma":
        nothing = model(-model.position_LD[None, :1], MASK[1:2, :1])  # one event that is zero with its position
        torch.testing.assert_close(found[2], nothing[0])
    else:
        assert not bool(found[~MASK].any())
    found.sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("kind", ["transformer", "pma"])
def test_events_that_change_places_together_with_their_positions_change_nothing(kind: str) -> None:
    model, x = encoder(kind), events()[1:2]
    before = model(x, MASK[1:2])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        model.position_LD.copy_(model.position_LD[order].clone())
    after = model(x[:, order], MASK[1:2])
    torch.testing.assert_close(after, before if kind == "pma" else before[:, order])
    assert not torch.allclose(model(x, MASK[1:2]), before if kind == "pma" else before[:, order])


def test_the_transformer_is_its_equations() -> None:
    model, x = encoder("transformer"), events()[1:2]
    placed = x + model.position_LD
    normed = model.norms[0](placed)
    assert model.query is not None
    score = model.query(normed) @ model.key(normed).mT / 8**0.5
    first = torch.softmax(score, 2) @ model.value(normed) + placed
    torch.testing.assert_close(model(x, MASK[1:2]), model.mlp(model.norms[1](first)) + first)


def test_attention_can_be_looked_at() -> None:
    model, x = encoder("transformer"), events()[:2]
    attention = model.attention(x, MASK[:2])
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 6, dtype=torch.float64))
    assert attention_stats(attention, MASK[:2])["padding"] == 0
    assert encoder("pma").attention(x, MASK[:2]).shape == (2, 5, 6)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match='expected one of bypass, transformer, pma, got "rnn"'):
        encoder("rnn")
    with pytest.raises(ValueError, match="a history has 7 events, expected at most 6"):
        encoder("pma")(torch.zeros(1, 7, 8).double(), torch.ones(1, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="a bypass has no attention"):
        encoder("bypass").attention(events(), MASK)
