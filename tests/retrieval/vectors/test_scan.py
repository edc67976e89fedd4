"""Facts about scoring all rows by groups."""

from __future__ import annotations

import pytest
import torch

from fullrank.retrieval.vectors.scan import GROUPS_FROM, Scan


@pytest.fixture(scope="module")
def vectors() -> torch.Tensor:
    """A count that no block and no group divides, and norms that differ by more than a factor of ten."""
    generator = torch.Generator().manual_seed(0)
    count = GROUPS_FROM + 16_384 + 7
    return torch.randn(count, 12, generator=generator) * torch.randn(count, 1, generator=generator).exp()


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_groups_find_what_a_sort_of_all_scores_finds(vectors: torch.Tensor, bfloat16: bool, share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(9, 12, generator=generator)
    allowed = None if share == 1 else torch.rand(len(vectors), generator=generator) < share
    scores, places = Scan(vectors, bfloat16=bfloat16)(queries, 50, allowed)
    every = queries @ vectors.T
    if allowed is not None:
        every[:, ~allowed] = -torch.inf
    expected = every.sort(dim=1, descending=True)
    assert torch.equal(places, expected.indices[:, :50])
    assert torch.allclose(scores, expected.values[:, :50], rtol=1e-5)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_what_bfloat16_cannot_tell_apart_is_told_apart(bfloat16: bool) -> None:
    """All vectors are equal in bfloat16, and all scores but a few are equal in float32: the smaller place wins."""
    vectors = torch.ones(GROUPS_FROM + 100, 4)
    vectors[torch.tensor([31, 20_050]), 0] += 1e-4
    vectors[77, 1] += 2e-4
    _, places = Scan(vectors, bfloat16=bfloat16)(torch.ones(3, 4), 6)
    assert places.tolist() == [[77, 31, 20_050, 0, 1, 2]] * 3


def test_most_queries_are_done_by_the_first_product(vectors: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the bound would be too wide to be of use."""
    left: list[int] = []
    whole = Scan._whole
    monkeypatch.setattr(Scan, "_whole", lambda self, q, *rest: left.append(len(q)) or whole(self, q, *rest))
    queries = torch.randn(40, 12, generator=torch.Generator().manual_seed(2))
    Scan(vectors, bfloat16=True)(queries, 50)
    assert sum(left) <= 4
