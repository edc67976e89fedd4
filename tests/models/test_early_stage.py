"""Facts about the early-stage ranker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fullrank.batch import Batch, RowGather
from fullrank.funnel import TwoSided
from fullrank.models.base import example_batch
from fullrank.models.early_stage import EarlyStageRanker
from fullrank.retrieval.pairing import Pairing
from fullrank.schema import Categorical, EventId, Label, Numeric, Schema, Sequence

SCHEMA = Schema(
    features=(
        Categorical(name="user", role="user", encoding="identity", num_embeddings=50),
        Categorical(name="item", role="item", encoding="identity", num_embeddings=40),
        Categorical(name="hour", role="context", encoding="identity", num_embeddings=24),
        Numeric(name="price", role="item"),
        Numeric(name="age", role="user"),
        Sequence(
            name="history",
            fields=(EventId(name="item", table="item", encoding="identity", num_embeddings=40),),
            max_length=5,
        ),
    ),
    labels=(Label(name="click"), Label(name="hide")),
)


def random_batch(rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch = example_batch(SCHEMA, rows)
    batch.ids_BF.random_(0, 24, generator=generator)
    batch.jagged_values.random_(0, 24, generator=generator)
    batch.numeric_BN.normal_(generator=generator)
    return batch


KINDS = [
    {"bottom": bottom, "interaction": interaction}
    for bottom in ("shared_bottom", "mmoe", "ple")
    for interaction in ("mlp", "product")
]
CHAIN = {"chain": {"hide": "click"}}
every_kind = pytest.mark.parametrize("config", KINDS, ids=lambda kind: "-".join(kind.values()))


def made(config: dict[str, Any]) -> EarlyStageRanker:
    torch.manual_seed(0)
    return EarlyStageRanker.from_config(SCHEMA, {"embedding_init": 0.5, **config}).eval()


@pytest.mark.parametrize("config", [*KINDS, *({**kind, **CHAIN} for kind in KINDS[:2])])
def test_scoring_precomputed_items_equals_the_forward_pass_on_pairs(config: dict[str, Any]) -> None:
    model = made(config)
    users, items = random_batch(3, 0), random_batch(7, 1)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    assert isinstance(model, TwoSided)
    vectors_IV = model.item_vectors(items)
    handle = model.towers.user_mlp.register_forward_hook(count)
    logits_UPT = model.score(users, vectors_IV.expand(3, -1, -1))
    handle.remove()
    assert calls == 1
    user, item = torch.arange(3).repeat_interleave(7), torch.arange(7).repeat(3)
    expected = model(Pairing.of(SCHEMA)(RowGather(users), user, RowGather(items), item)).logits_BT.view(3, 7, 2)
    assert torch.allclose(logits_UPT, expected, atol=1e-6, rtol=1e-6)


@every_kind
def test_an_item_vector_does_not_depend_on_the_user(config: dict[str, Any]) -> None:
    model = made(config)
    items, others = random_batch(7, 1), random_batch(7, 2)
    rows = torch.arange(7)
    mixed = Pairing.of(SCHEMA)(RowGather(others), rows, RowGather(items), rows)
    assert torch.equal(model.item_vectors(items), model.item_vectors(mixed))


@every_kind
def test_user_and_item_interact_through_their_product(config: dict[str, Any]) -> None:
    """The mixed difference of the logit over two users and two items is not zero: the model is more than a sum."""
    model = made(config)
    logits_UPT = model.score(random_batch(2, 0), model.item_vectors(random_batch(2, 1)).expand(2, -1, -1))
    mixed = logits_UPT[0, 0] - logits_UPT[0, 1] - logits_UPT[1, 0] + logits_UPT[1, 1]
    assert bool((mixed.abs() > 1e-4).all())


def test_the_product_is_a_bilinear_form_of_the_vectors_of_each_task() -> None:
    model = made({"interaction": "product", "output_dim": 4})
    batch = random_batch(9, 3)
    user_BTD, item_BTD = (vectors_BW.view(9, 2, 4) for vectors_BW in model.towers(batch))
    expected = (user_BTD * item_BTD).sum(2) + model.item_head(item_BTD.flatten(1)) + model.head(user_BTD.flatten(1))
    assert torch.allclose(model(batch).logits_BT, expected, atol=1e-6)


def test_ple_without_experts_of_a_task_is_mmoe() -> None:
    ple, mmoe = (made({"bottom": bottom, "num_task_experts": 0}) for bottom in ("ple", "mmoe"))
    assert ple.state_dict().keys() == mmoe.state_dict().keys()
    mmoe.load_state_dict(ple.state_dict())
    batch = random_batch(9, 3)
    assert torch.equal(ple(batch).logits_BT, mmoe(batch).logits_BT)


def test_mmoe_with_one_expert_is_a_shared_bottom() -> None:
    mmoe = made({"bottom": "mmoe", "num_experts": 1, "interaction": "product", "hidden": [8]})
    shared = made({"interaction": "product", "hidden": [8]})
    state = {name: value for name, value in mmoe.state_dict().items() if name in shared.state_dict()}
    for side in ("user_mlp", "item_mlp"):
        expert, projections = getattr(mmoe.towers, side).levels[0].shared[0], getattr(mmoe.towers, side).projections
        state |= {f"towers.{side}.layers.0.{name}": value for name, value in expert.layers[0].state_dict().items()}
        for name in ("weight", "bias"):
            state[f"towers.{side}.layers.2.{name}"] = torch.cat([getattr(each, name) for each in projections])
    shared.load_state_dict(state)
    batch = random_batch(9, 3)
    assert torch.allclose(mmoe(batch).logits_BT, shared(batch).logits_BT, atol=1e-6)


def test_the_weights_of_a_gate_sum_to_one_and_differ_by_task() -> None:
    model = made({"bottom": "ple", "num_levels": 2})
    inputs = torch.randn(5, model.towers.side_widths["user"])
    level = model.towers.user_mlp.levels[0]
    weights = [gate.weights(inputs) for gate in (*level.gates, level.shared_gate)]
    assert all(torch.allclose(each.sum(1), torch.ones(5)) for each in weights)
    assert not torch.allclose(weights[0], weights[1])


@every_kind
def test_a_task_without_an_observed_label_costs_nothing_and_moves_nothing_of_its_own(config: dict[str, Any]) -> None:
    """NaN is what masks a label."""
    model = made(config).train()
    batch = random_batch(9, 3)
    labels_BT = torch.randint(2, (9, 2)).float()
    labels_BT[:, 1] = torch.nan
    masked = replace(batch, labels_BT=labels_BT)
    output = model(masked)
    loss = model.loss(output, masked)
    alone = torch.nn.functional.binary_cross_entropy_with_logits(output.logits_BT[:, 0], labels_BT[:, 0])
    assert torch.allclose(loss, alone)
    loss.backward()
    for head in (model.head, model.item_head):
        assert head.weight.grad is not None
        assert bool((head.weight.grad[1] == 0).all()) and bool((head.weight.grad[0] != 0).any())


@pytest.mark.parametrize("interaction", ["mlp", "product"])
def test_in_a_chain_the_probability_of_a_task_is_that_of_it_and_the_one_before(interaction: str) -> None:
    alone, chained = made({"interaction": interaction}), made({"interaction": interaction, **CHAIN})
    chained.load_state_dict(alone.state_dict())
    batch = random_batch(200, 4)
    for scale in (1.0, 300.0):
        for model in (alone, chained):
            model.head.bias.data = torch.tensor([-0.1, 0.4]) * scale
            model.item_head.weight.data *= scale
        given_BT, both_BT = (model(batch).logits_BT.double() for model in (alone, chained))
        assert torch.equal(both_BT[:, 0], given_BT[:, 0]) and bool(both_BT.isfinite().all())
        expected_B = torch.sigmoid(given_BT).prod(1)
        assert torch.allclose(torch.sigmoid(both_BT[:, 1]), expected_B, atol=1e-6)
        assert bool((both_BT[:, 1] <= both_BT[:, 0]).all())
    # The loss of the second task moves the first one too, by the derivative of -log(1 - p q).
    a, b = torch.tensor(0.3, requires_grad=True), torch.tensor(-1.2, requires_grad=True)
    p, q = torch.sigmoid(a), torch.sigmoid(b)
    logit = chained._joint(torch.stack([a, b]))[1]
    found = torch.autograd.grad(torch.nn.functional.softplus(logit), (a, b), retain_graph=True)
    expected = torch.autograd.grad(-torch.log(1 - p * q), (a, b))
    assert torch.allclose(torch.stack(found), torch.stack(expected))


def test_a_chain_starts_at_the_base_rates_of_all_tasks() -> None:
    """Also one of three tasks, given in any order."""
    schema = SCHEMA.model_copy(update={"labels": tuple(Label(name=name) for name in ("review", "click", "buy"))})
    chain = {"review": "buy", "buy": "click"}
    model = EarlyStageRanker.from_config(schema, {"embedding_init": 0.0, "chain": chain}).eval()
    batch = example_batch(schema, 100)
    batch.labels_BT[:] = 0
    for task, count in ((0, 2), (1, 40), (2, 10)):
        batch.labels_BT[:count, task] = 1
    model.start_at_base_rate(batch)
    for weight in (model.item_head.weight, model.head.weight):
        weight.data.zero_()
    assert torch.allclose(torch.sigmoid(model(batch).logits_BT[0]), torch.tensor([0.02, 0.4, 0.1]), atol=1e-6)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ({"click": "hide", "hide": "click"}, "would have to happen before itself"),
        ({"hide": "view"}, 'there is no binary label "view"; the schema has click, hide'),
    ],
)
def test_a_chain_that_cannot_be_is_refused(chain: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made({"chain": chain})


def test_experts_without_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="bottom mmoe needs hidden"):
        EarlyStageRanker.Config(bottom="mmoe", hidden=())
