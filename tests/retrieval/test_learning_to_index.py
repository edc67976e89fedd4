"""Facts about nodes that are learnt by attention."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fullrank.embeddings.semantic_id.quantizer import assigned
from fullrank.retrieval.hierarchy.learning_to_index import LearningToIndex, Mode


def clustered(items: int = 2000, dim: int = 8, clusters: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(clusters, dim, generator=generator)
    return centres[torch.arange(items) % clusters] + torch.randn(items, dim, generator=generator)


def index_of(*num_nodes: int, mode: Mode = "joint", dim: int = 8, **config: object) -> LearningToIndex:
    torch.manual_seed(0)
    return LearningToIndex(dim, LearningToIndex.Config(num_nodes=num_nodes, **config), mode=mode)


def with_alpha(index: LearningToIndex, alpha: float) -> LearningToIndex:
    index.alpha_2N.fill_(alpha)
    return index


def test_sharp_attention_is_the_nearest_codeword_and_flat_attention_the_mean_one() -> None:
    items = clustered(100)
    sharp = with_alpha(index_of(16), 1e7)(items)
    book = index_of(16).codebooks[0]
    assert torch.allclose(sharp.nodes[0], book[assigned(items, book)[1]], atol=1e-5)
    flat = with_alpha(index_of(16), 1e-9)(items)
    assert torch.allclose(flat.nodes[0], book.mean(0).expand(100, -1), atol=1e-5)


@pytest.mark.parametrize("mode", ["joint", "em"])
def test_what_levels_take_and_what_they_leave_is_the_item(mode: Mode) -> None:
    items = clustered(100).double()
    index = index_of(16, 8, 4, mode=mode).double()
    out = index(items)
    taken = out.residuals[0] - out.residuals[-1]
    assert torch.allclose(taken + out.residuals[-1], items, rtol=0, atol=1e-12)
    words = [soft @ book for soft, book in zip(out.soft, index.codebooks, strict=True)]
    assert torch.allclose(torch.stack(words).sum(0), taken, rtol=0, atol=1e-12)
    for level in range(3):
        assert torch.allclose(out.residuals[level] - words[level], out.residuals[level + 1], rtol=0, atol=1e-12)


def test_the_codes_that_are_served_are_the_nearest_of_what_is_left() -> None:
    items = clustered(200)
    index = index_of(16, 8)
    codes, rest = index.assign(items), items
    for level, book in enumerate(index.codebooks):
        nearest = torch.cdist(rest, book).argmin(1)
        assert torch.equal(codes[:, level], nearest)
        rest = rest - book[nearest]
    assert torch.allclose(index.node_vectors(codes) + rest, items, atol=1e-5)
    hard = with_alpha(index_of(16, 8), 1e9)(items)
    assert torch.equal(hard.codes_BN, codes)


def test_the_balance_term_goes_from_one_over_k_to_one() -> None:
    index = index_of(16, history_batches=3)
    even, one = torch.full((40, 16), 1 / 16), torch.eye(16)[torch.zeros(40, dtype=torch.int64)]
    assert math.isclose(float(index._flops(0, even)), 1 / 16, rel_tol=1e-5)
    index = index_of(16, history_batches=3)
    assert float(index._flops(0, one)) == 1.0
    # The mean is over the last three batches: two of one node, then one that is even.
    index._flops(0, one)
    share = torch.full((16,), 1 / 48)
    share[0] += 2 / 3
    assert math.isclose(float(index._flops(0, even)), float(share.square().sum()), rel_tol=1e-5)


def test_gradients_of_the_index_are_those_of_finite_differences() -> None:
    index = with_alpha(index_of(5, 3, dim=3), 2.0).double().eval()
    items = clustered(6, 3).double().requires_grad_()

    def total(items: torch.Tensor, *books: torch.Tensor) -> torch.Tensor:
        for place, book in enumerate(books):
            index.codebooks[place].data = book
        out = torch.func.functional_call(index, {f"codebooks.{i}": book for i, book in enumerate(books)}, (items,))
        return out.nodes[-1].sin().sum() + out.losses["balance"]

    books = [book.detach().clone().requires_grad_() for book in index.codebooks]
    assert torch.autograd.gradcheck(total, (items, *books), atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "items_learn", "codebooks_learn"), [("joint", 1, 1), ("em", 1, 0), ("separate", 0, 0)]
)
def test_who_learns_from_the_networks_above(mode: Mode, items_learn: int, codebooks_learn: int) -> None:
    index = index_of(16, 8, mode=mode)
    items = clustered(50).requires_grad_()
    loss = index(items).nodes[-1].square().sum() + 0.0 * items.sum()
    loss.backward()
    assert bool(items.grad.abs().sum() > 0) == bool(items_learn)  # type: ignore[union-attr]
    for book in index.codebooks:
        assert (book.grad is not None and bool(book.grad.abs().sum() > 0)) == bool(codebooks_learn)


def test_in_em_networks_see_the_node_as_it_is_served() -> None:
    items = clustered(50)
    index = index_of(16, 8, mode="em")
    assert torch.allclose(index(items).nodes[-1], index.node_vectors(index.assign(items)), atol=1e-5)


def test_one_level_of_em_is_k_means() -> None:
    items = clustered()
    index = index_of(24, mode="em")
    index.fit(items, iterations=1, seed=0)
    book = index.codebooks[0].clone()
    for _ in range(3):
        code = torch.cdist(items, book).argmin(1)
        book = torch.stack([items[code == k].mean(0) if bool((code == k).any()) else book[k] for k in range(24)])
        index.fit(items, iterations=1)
        assert torch.allclose(index.codebooks[0], book, atol=1e-4)


def test_finding_codewords_anew_never_makes_the_error_larger() -> None:
    items = clustered()
    index = index_of(24, 6, mode="em")
    errors = [index.quantization_error(items)]
    for _ in range(8):
        index.fit(items, iterations=2)
        errors.append(index.quantization_error(items))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]


def test_attention_is_as_wide_as_configured_in_the_beginning_and_in_the_end() -> None:
    items = clustered()
    index = index_of(48, perplexity=(6.0, 1.1))
    index.fit(items, seed=0)
    for progress, wanted in ((0.0, 6.0), (1.0, 1.1)):
        index.set_progress(progress)
        soft = index.eval()(items).soft[0].detach()
        assert math.isclose(float(torch.special.entr(soft).sum(1).exp().mean()), wanted, rel_tol=0.02)
    index.set_progress(0.5)
    first, last = index.alpha_2N[:, 0].tolist()
    assert math.isclose(index.alpha(0), first + (last - first) / 4, rel_tol=1e-5)


def test_attention_does_not_depend_on_the_scale_of_items() -> None:
    items = clustered()
    small, large = index_of(48), index_of(48)
    small.fit(items, seed=0)
    large.fit(100 * items, seed=0)
    assert torch.allclose(small.eval()(items).soft[0], large.eval()(100 * items).soft[0], atol=1e-3)


def test_codewords_that_nothing_is_nearest_to_move_to_items() -> None:
    items = clustered()
    index = index_of(24)
    index.codebooks[0].data[3:] = 1e3
    generator = torch.Generator().manual_seed(0)
    assert index.occupancy(index.assign(items))[0]["empty"] == 21
    for _ in range(120):
        index.train()(items[torch.randint(0, len(items), (256,), generator=generator)])
    assert index.reseed(items, generator) == 21
    occupancy = index.occupancy(index.assign(items))[0]
    assert occupancy["empty"] == 0 and occupancy["effective"] > 12


def test_bad_input_is_named() -> None:
    index = index_of(24)
    items = clustered(30)
    items[7, 2] = torch.nan
    with pytest.raises(ValueError, match="row 7 of the items"):
        index.assign(items)
    with pytest.raises(ValueError, match=r"shape \(30, 5\), expected \(items, 8\)"):
        index.assign(items[:, :5])
    with pytest.raises(ValueError, match="more nodes than the 20 items"):
        index.fit(clustered(20), seed=0)
    with pytest.raises(ValueError, match="two falling numbers above 1"):
        index_of(4, perplexity=(1.0, 1.5))
    with pytest.raises(ValueError, match="num_nodes"):
        LearningToIndex.Config(num_nodes=())
