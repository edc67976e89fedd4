"""Facts about networks over towers, their interactions and what they learn from."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.loader import batch_from_frame
from fullrank.retrieval.hierarchy.interactions import InteractionCounts
from fullrank.retrieval.hierarchy.losses import distillation, log_inclusion, sampled_softmax, tail_loss, tail_target
from fullrank.retrieval.hierarchy.monn import MoNN


def network(over_arch: str, **sizes: int) -> MoNN:
    torch.manual_seed(0)
    config = MoNN.Config(over_arch=over_arch, user_vectors=3, item_vectors=2, vector_dim=8, hidden=(16,))
    monn = MoNN(10, 7, sizes.get("interaction_inputs", 4), 2, config)
    for parameter in monn.parameters():  # some start at 0
        parameter.data.normal_(0, 0.3)
    return monn


@pytest.mark.parametrize("over_arch", ["mlp", "wukong", "dhen"])
def test_a_pair_scores_alike_in_a_row_in_a_grid_and_among_items_of_its_own(over_arch: str) -> None:
    monn = network(over_arch)
    users = monn.encode_users(torch.randn(5, 10))
    items = monn.encode_items(torch.randn(6, 7))
    crossed = monn.encode_interactions(torch.randn(5, 6, 4))
    assert crossed is not None
    grid = monn.score_grid(users, items, crossed)
    assert grid.shape == (5, 6, 2) and bool(grid.std() > 0.1)
    assert torch.allclose(grid, monn.score_grid(users, items.expand(5, -1, -1), crossed), atol=1e-5)
    for user, item in itertools.product(range(5), range(6)):
        pair = monn.score_pairs(users[[user]], items[[item]], crossed[[user], item])
        assert torch.allclose(pair[0], grid[user, item], atol=1e-5)


def test_one_vector_on_either_side_and_a_dot_are_two_towers() -> None:
    config = MoNN.Config(over_arch="dot", user_vectors=1, item_vectors=1, vector_dim=8)
    monn = MoNN(10, 7, config=config)
    x, y = torch.randn(5, 10), torch.randn(6, 7)
    scores = monn.score_grid(monn.encode_users(x), monn.encode_items(y))[:, :, 0]
    assert monn.item_tower is not None
    assert torch.allclose(scores, monn.user_tower(x) @ monn.item_tower(y).T, atol=1e-5)
    with pytest.raises(ValueError, match="a dot product has one task"):
        MoNN(10, 7, num_tasks=2, config=config)


def test_the_operations_of_a_pair_are_those_that_a_search_counts() -> None:
    monn = network("mlp")
    users = monn.encode_users(torch.randn(1, 10)).detach().requires_grad_()
    counted = []
    for items in (10, 110):
        with FlopCounterMode(display=False) as counter:
            monn.score_grid(users, torch.randn(items, 16), torch.randn(1, items, 32 // 4))
        counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == 100 * monn.flops_per_pair()


def test_interactions_are_counts_of_the_items_values_in_the_users_lists(dataset: Dataset) -> None:
    rows: Batch = batch_from_frame(dataset.scan("test").head(40).collect(), dataset.schema)
    counts = InteractionCounts(dataset.schema)
    assert counts.width == 2  # the item among the history's items; no list shares the table of the tags
    grid = counts(counts.user_lists(rows), counts.item_values(rows))
    events, lengths_B = rows.jagged("history.item")
    item = [feature.name for feature in dataset.schema.categorical].index("item_id")
    met = 0
    for user, history in enumerate(events.split(lengths_B.tolist())):
        times_I = (history[:, None] == rows.ids_BF[None, :, item]).sum(0).float()
        assert torch.equal(grid[user], torch.stack([(times_I > 0).float(), times_I.log1p()], 1))
        met += int(times_I.sum())
    assert met > 10


def test_uniform_items_need_no_correction_and_the_order_of_a_step_does_not_matter() -> None:
    torch.manual_seed(0)
    logits, own = torch.randn(9, 20), torch.arange(9)
    even = log_inclusion(torch.full((20,), 1 / 20), rows=9, uniform=5, catalogue=20)
    assert torch.allclose(sampled_softmax(logits, own, even), sampled_softmax(logits, own))
    frequency = torch.rand(20)
    log_q = log_inclusion(frequency / frequency.sum(), 9, 5, 20)
    order, columns = torch.randperm(9), torch.randperm(20)
    moved = sampled_softmax(logits[order][:, columns], columns.argsort()[own[order]], log_q[columns])
    assert torch.allclose(moved, sampled_softmax(logits, own, log_q))


def test_a_step_with_every_item_is_the_full_softmax() -> None:
    torch.manual_seed(1)
    logits, own = torch.randn(50, 7), torch.arange(50) % 7
    log_q = log_inclusion(torch.full((7,), 1 / 7), rows=5000)
    assert torch.allclose(log_q, torch.zeros(7), atol=1e-6)
    assert torch.allclose(sampled_softmax(logits, own, log_q), F.cross_entropy(logits, own))


def test_the_probability_of_being_in_a_step_is_that_of_the_mixture() -> None:
    """Of positives by popularity and further items drawn alike: what 20,000 steps show."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.arange(1, 31).float() ** -1
    frequency = frequency / frequency.sum()
    drawn = torch.multinomial(frequency, 20_000 * 8, replacement=True, generator=generator).view(20_000, 8)
    even = torch.randint(0, 30, (20_000, 4), generator=generator)
    seen = F.one_hot(torch.cat([drawn, even], 1), 30).amax(1).float().mean(0)
    assert torch.allclose(log_inclusion(frequency, 8, 4, 30).exp(), seen, atol=0.012)
    with pytest.raises(ValueError, match="rows 0"):
        log_inclusion(frequency, 0)


def test_the_corrected_gradient_is_that_of_the_full_softmax_and_the_other_signs_are_not() -> None:
    """Over steps of 256 positives drawn by popularity."""
    generator = torch.Generator().manual_seed(0)
    users, items = 5, 200
    frequency = torch.arange(1, items + 1).float() ** -0.8
    frequency = frequency / frequency.sum()
    scores = (torch.randn(users, items, generator=generator)).requires_grad_()
    full = torch.zeros(users, items)
    found = {"minus": torch.zeros(users, items), "none": torch.zeros(users, items), "plus": torch.zeros(users, items)}
    for _ in range(400):
        item = torch.multinomial(frequency, 256, replacement=True, generator=generator)
        user = torch.randint(0, users, (256,), generator=generator)
        full += torch.autograd.grad(F.cross_entropy(scores[user], item), scores)[0]
        distinct, own = torch.unique(item, return_inverse=True)
        log_q = log_inclusion(frequency[distinct], 256)
        for name, correction in (("minus", log_q), ("none", None), ("plus", -log_q)):
            loss = sampled_softmax(scores[user][:, distinct], own, correction)
            found[name] += torch.autograd.grad(loss, scores)[0]
    cosine = {name: float(F.cosine_similarity(each.flatten(), full.flatten(), 0)) for name, each in found.items()}
    assert cosine["minus"] > 0.99 and cosine["minus"] > cosine["none"] > cosine["plus"]


def test_distillation_is_least_at_the_teachers_logits_and_leaves_the_teacher_alone() -> None:
    torch.manual_seed(2)
    teacher, student = torch.randn(50, requires_grad=True), torch.randn(50, requires_grad=True)
    distillation(student, teacher).backward()
    assert teacher.grad is None
    assert torch.equal(student.grad.sign(), (student - teacher).sign())  # type: ignore[union-attr]


def test_the_target_of_a_node_is_the_mean_of_its_best_members() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, -9.0], [0.0, 0.0, 2.0, 4.0]])
    assert tail_target(logits, 2).tolist() == [4.0, 3.0]
    assert tail_target(logits, 9).tolist() == [0.0, 1.5]


def test_the_nodes_that_a_user_goes_to_weigh_most() -> None:
    """Where all are wanted alike it is the plain distance; where one is, the others hardly count."""
    found = torch.tensor([[0.0, 3.0, -1.0]])
    alike = torch.full_like(found, 0.5)
    assert torch.allclose(tail_loss(found, alike), F.smooth_l1_loss(found, alike))
    wanted = torch.tensor([[10.0, 0.0, 0.0]])
    best_only, others_only = torch.tensor([[8.0, 0.0, 0.0]]), torch.tensor([[10.0, 2.0, 2.0]])
    assert float(tail_loss(best_only, wanted)) == pytest.approx(1.5, abs=1e-3)
    assert float(tail_loss(others_only, wanted)) < 1e-3


@pytest.mark.parametrize("over_arch", ["mlp", "wukong"])
def test_one_pairs_interactions_may_stand_for_all(over_arch: str) -> None:
    monn = network(over_arch)
    users, items = monn.encode_users(torch.randn(3, 10)), monn.encode_items(torch.randn(4, 7))
    nothing, each = (monn.encode_interactions(torch.zeros(*shape, 4)) for shape in ((1, 1), (3, 4)))
    assert torch.allclose(monn.score_grid(users, items, nothing), monn.score_grid(users, items, each), atol=1e-5)
