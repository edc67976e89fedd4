from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.layers.hilomoe import HiLoMoELinear
from fullrank.models.hilomoe import HiLoMoE, convert_to_hilomoe, expert_usage
from fullrank.schema import Categorical, Label, Schema
from fullrank.training import Trainer, TrainerConfig

SCHEMA = Schema(
    features=tuple(Categorical(name=f"f{i}", num_embeddings=20) for i in range(4)), labels=(Label(name="click"),)
)


def layer(**options: Any) -> HiLoMoELinear:
    torch.manual_seed(0)
    made = HiLoMoELinear(6, 5, **{"num_layers": 3, "num_experts": 4, "top_k": 2, **options}).double()
    for up in made.up_KO:
        nn.init.normal_(up)
    return made


def inputs(rows: int = 50) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_the_equations(moe: HiLoMoELinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and scores of one input, as loops over layers and experts with an explicit matrix W(x)."""
    query = x if moe.project is None else moe.project.weight @ x
    weight, scores = moe.shared.weight.clone(), []
    for down, up in zip(moe.down_KI, moe.up_KO, strict=True):
        a = down @ query / math.sqrt(moe.in_features)
        kept = sorted(range(len(a)), key=lambda k: -float(a[k]))[: moe.top_k]
        total = sum(math.exp(float(a[k])) for k in kept)
        s = torch.tensor([math.exp(float(a[k])) / total if k in kept else 0.0 for k in range(len(a))], dtype=a.dtype)
        for k in kept:
            weight = weight + s[k] * torch.outer(up[k], down[k])
        query = query + s @ down if moe.hierarchical else query
        scores.append(s)
    return weight @ x + moe.shared.bias, torch.stack(scores)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": None}, {"project": True}, {"hierarchical": False}, {"num_layers": 1}]
)
def test_one_pair_of_products_equals_the_loop_over_layers_and_experts(options: dict[str, Any]) -> None:
    moe, x = layer(**options), inputs()
    if moe.project is not None:
        nn.init.normal_(moe.project.weight)
    with torch.no_grad():
        expected = [by_the_equations(moe, row) for row in x]
        torch.testing.assert_close(moe(x), torch.stack([y for y, _ in expected]), rtol=0, atol=1e-12)
        torch.testing.assert_close(moe.scores(x), torch.stack([s for _, s in expected]), rtol=0, atol=1e-12)


def test_a_new_layer_is_bit_for_bit_the_linear_layer_it_wraps() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    x = torch.randn(7, 3, 6)
    assert torch.equal(HiLoMoELinear.from_linear(linear)(x), linear(x))


def test_routing_depends_on_scores_and_keys_but_never_on_outputs() -> None:
    moe, x = layer(), inputs()
    scores = moe.scores(x)
    scores.square().sum().backward()
    assert all(up.grad is None for up in moe.up_KO)
    assert all(down.grad is not None for down in moe.down_KI)
    with torch.no_grad():
        moe.down_KI[0].copy_(torch.randn_like(moe.down_KI[0]))
    assert not torch.allclose(moe.scores(x)[:, 1], scores[:, 1])
    flat = layer(hierarchical=False)
    before = flat.scores(x)
    with torch.no_grad():
        flat.down_KI[0].copy_(torch.randn_like(flat.down_KI[0]))
    assert torch.equal(flat.scores(x)[:, 1], before[:, 1])


def test_scores_sum_to_one_over_exactly_top_k_experts() -> None:
    scores = layer().scores(inputs())
    torch.testing.assert_close(scores.sum(2), torch.ones(50, 3).double())
    assert bool(((scores > 0).sum(2) == 2).all())


def test_balance_is_one_when_experts_share_and_k_over_top_k_when_few_take_all() -> None:
    moe = layer(num_layers=1)
    even = torch.zeros(4, 1, 4)
    for row in range(4):
        even[row, 0, [row, (row + 1) % 4]] = 0.5
    assert float(moe._losses(even, torch.zeros(4, 1, 4))["balance"]) == pytest.approx(1)
    few = torch.tensor([[[0.5, 0.5, 0.0, 0.0]]])
    logits = torch.tensor([[[50.0, 50.0, 0.0, 0.0]]])
    assert float(moe._losses(few, logits)["balance"]) == pytest.approx(4 / 2)
    assert float(moe._losses(few, logits)["z"]) == pytest.approx((50 + math.log(2)) ** 2)


def test_the_matrix_differs_from_the_shared_one_by_at_most_layers_times_top_k_ranks() -> None:
    moe, x = layer(num_layers=1, top_k=2), inputs()
    jacobian = torch.autograd.functional.jacobian(lambda row: moe(row[None])[0], x[0])
    with torch.no_grad():
        scores = moe.scores(x[:1])[0, 0].double()
        delta = moe.up_KO[0].T @ (scores[:, None] * moe.down_KI[0])
    assert int(torch.linalg.matrix_rank(delta)) == 2
    assert jacobian.shape == (5, 6)


def test_parameters_and_operations_are_those_of_the_formula() -> None:
    moe = layer(num_layers=2, num_experts=3, top_k=None)
    count = sum(p.numel() for p in moe.parameters())
    assert count == 6 * 5 + 5 + 2 * 3 * (6 + 5)
    x = inputs(1000)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        moe(x)
    keys = 2 * (3 * 6 * 3 + 1000 * 3 * 3)  # products of keys with one another, and of scores with them
    assert counter.get_total_flops() == 1000 * (2 * 6 * 5 + 2 * 2 * 3 * (6 + 5)) + keys


def test_gradients_are_those_of_finite_differences() -> None:
    moe = layer(top_k=None, project=True)
    x = inputs(3)
    parameters = [moe.down_KI[0], moe.down_KI[1], moe.up_KO[0], moe.project.weight]  # type: ignore[union-attr]

    def run(*values: Tensor) -> Tensor:
        names = ["down_KI.0", "down_KI.1", "up_KO.0", "project.weight"]
        return torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, [p.detach().clone().requires_grad_() for p in parameters])


def test_merging_at_one_input_gives_the_output_of_that_input() -> None:
    moe, x = layer(), inputs()
    merged = moe.merge(x[:1]).double()
    torch.testing.assert_close(merged(x[:1]), moe(x[:1]), rtol=1e-5, atol=1e-6)


def plain(**config: Any) -> HiLoMoE:
    torch.manual_seed(0)
    return HiLoMoE.from_config(
        SCHEMA,
        {"backbone": {"name": "deepfm", "hidden": (16, 8), "embedding_dim": 4, "embedding_init": 0.3}, **config},
    )


def rows(count: int = 512) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 20, (count, 4), generator=generator)
    return Batch(
        numeric_BN=torch.zeros(count, 0),
        ids_BF=ids,
        jagged_keys=(),
        jagged_values=torch.zeros(0, dtype=torch.int64),
        jagged_lengths_KB=torch.zeros(0, count, dtype=torch.int64),
        event_keys=(),
        event_values=torch.zeros(0),
        event_lengths_EB=torch.zeros(0, count, dtype=torch.int64),
        labels_BT=((ids[:, 0] + ids[:, 1]) % 2)[:, None].float(),
    )


def test_conversion_leaves_the_logits_as_they_were() -> None:
    batch, converted = rows(), plain()
    logits = converted(batch).logits_BT
    untouched = plain()
    for name, moe in untouched.expert_layers().items():
        parent, _, leaf = name.rpartition(".")
        setattr(untouched.backbone.get_submodule(parent), leaf, moe.shared)
    assert torch.equal(untouched.backbone(batch).logits_BT, logits)


@pytest.mark.parametrize(
    "tables",
    [
        EmbeddingOptimizer(),
        EmbeddingOptimizer(kind="row_wise_adagrad"),
        EmbeddingOptimizer(kind="sgd", l2=0.5, l2_mode="lazy"),
    ],
    ids=["dense", "row_wise_adagrad", "sgd with decay"],
)
def test_each_stage_trains_what_it_says(tables: EmbeddingOptimizer) -> None:
    model = plain(warm_up=0.4, growth=0.4, num_layers=2)
    seen: list[dict[str, Tensor]] = []

    def watch(share: float) -> None:
        HiLoMoE.set_progress(model, share)
        seen.append({name: value.clone() for name, value in model.state_dict().items()})

    model.set_progress = watch  # type: ignore[method-assign]
    Trainer(TrainerConfig(learning_rate=0.01), tables).fit(model, [rows()] * 10)
    seen.append(dict(model.state_dict()))

    def changed(begin: int, end: int) -> set[str]:
        names = {name for name in seen[0] if not torch.equal(seen[begin][name], seen[end][name])}
        kinds = {"up_KO.0", "down_KI.0", "up_KO.1", "down_KI.1", "tables.", "shared.weight"}
        return {kind for kind in kinds if any(kind in name for name in names)}

    assert changed(0, 4) == {"tables.", "shared.weight"}
    assert changed(4, 6) == {"up_KO.0", "down_KI.0"}
    assert changed(6, 8) == {"up_KO.1", "down_KI.1"}
    assert changed(8, 10) == {"up_KO.0", "down_KI.0", "up_KO.1", "down_KI.1", "tables.", "shared.weight"}
    assert all(float(seen[4][name].abs().max()) == 0 for name in seen[4] if "up_KO" in name)


def test_auxiliary_losses_belong_to_their_stages() -> None:
    model = plain().train()
    names = {}
    for share in (0.0, 0.22, 0.9):
        model.set_progress(share)
        names[share] = set(model(rows(16)).aux_losses)
    assert names == {0.0: set(), 0.22: {"balance", "z", "diversity"}, 0.9: {"balance", "z"}}
    assert not model.eval()(rows(16)).aux_losses


def test_equal_keys_are_the_least_diverse() -> None:
    moe = layer(num_layers=1, num_experts=3)
    with torch.no_grad():
        moe.down_KI[0].copy_(torch.ones(3, 6))
    assert moe.diversity().item() == pytest.approx(3)
    with torch.no_grad():
        moe.down_KI[0].copy_(torch.eye(3, 6))
    assert moe.diversity().item() == pytest.approx(0)


def test_usage_counts_first_choices_and_paths() -> None:
    scores = torch.zeros(4, 2, 3)
    for row, path in enumerate([(0, 1), (0, 1), (2, 1), (0, 0)]):
        for level, expert in enumerate(path):
            scores[row, level, expert] = 1.0
    usage, entropy = expert_usage(scores)
    assert usage.tolist() == [[0.75, 0.0, 0.25], [0.25, 0.75, 0.0]]
    assert entropy == pytest.approx(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)))


def test_routing_is_recorded_for_every_layer_and_changes_nothing() -> None:
    model, batch = plain(), rows(9)
    found = model.routing(batch)
    assert set(found) == set(model.converted)
    assert all(scores.shape == (9, 2, 8) for scores in found.values())


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_k": 0}, {"num_layers": 0}, {"num_experts": 0}])
def test_impossible_sizes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        HiLoMoELinear(3, 3, **{"num_experts": 4, **options})  # type: ignore[arg-type]


def test_only_plain_linear_layers_are_converted() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(TypeError, match="1 is a ReLU"):
        convert_to_hilomoe(model, ["1"])
    with pytest.raises(ValueError, match="no linear layer matches"):
        convert_to_hilomoe(model, ["mlp.*"])
    assert convert_to_hilomoe(model, lambda name, linear: linear.out_features == 3) == ["0"]
