from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.models.interformer import (
    InteractionArch,
    InterFormer,
    InterFormerBackbone,
    MaskNetFusion,
    PersonalizedFFN,
    SelfGating,
    SequenceSummary,
)
from fullrank.schema import Categorical, EventId, EventNumber, Label, Numeric, Schema, Sequence

FLOWS = ("int", "n2s", "s2n", "sep", "sole")
N, WIDTH, LENGTH = 5, 8, 6


def backbone(**options: Any) -> InterFormerBackbone:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "num_layers": 2,
        "num_heads": 2,
        "num_summary": 3,
        "num_pma": 2,
        "num_recent": 2,
        "interaction": "dhen",
        "pffn": "token_mlp",
        "gating": "self_gate",
        "flow": "int",
        "rope": True,
        "dropout": 0.0,
    }
    return InterFormerBackbone(N, 1, WIDTH, InterFormerBackbone.Config(**{**settings, **options}))


def inputs(rows: int = 7, lengths: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = lengths or [LENGTH, 3, 1, 0, 5, 2, 4]
    mask = torch.arange(LENGTH) < torch.tensor(lengths[:rows])[:, None]
    tokens = torch.randn(rows, N, WIDTH, generator=generator)
    events = torch.randn(rows, LENGTH, WIDTH, generator=generator).masked_fill(~mask[:, :, None], 0.0)
    return tokens, events, mask


def test_shapes_stay_and_summaries_have_their_number_of_tokens() -> None:
    model = backbone()
    tokens, events, mask = inputs()
    state = torch.cat([model.feature_summaries[0](tokens), events], 1)
    told = model.sequence_summaries[0][0](state, F.pad(mask, (3, 0), value=True))  # type: ignore[index]
    assert told.shape == (7, 3 + 2 + 2, WIDTH)
    assert model.interactions[0](tokens, [told]).shape == tokens.shape
    after = model.sequences[0][0](state, F.pad(mask, (3, 0), value=True), model.feature_summaries[0](tokens), None)  # type: ignore[index]
    assert after.shape == (7, 3 + LENGTH, WIDTH)
    assert model(tokens, [(events, mask)]).shape == (7, model.out_features)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("residual", [True, False])
def test_every_parameter_learns(flow: Any, residual: bool) -> None:
    model = backbone(flow=flow, strict_paper=not residual)
    tokens, events, mask = inputs()
    out = model(tokens, [(events, mask)])
    (out * torch.randn_like(out)).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0]
    assert not dead


@pytest.mark.parametrize(
    ("flow", "events_reach_features", "features_reach_events"),
    [("int", True, True), ("n2s", False, True), ("s2n", True, False), ("sep", False, False)],
)
def test_information_flows_where_the_mode_says(
    flow: Any, events_reach_features: bool, features_reach_events: bool
) -> None:
    model = backbone(flow=flow)
    tokens, events, mask = inputs()
    tokens.requires_grad_()
    events.requires_grad_()
    out = model(tokens, [(events, mask)])
    of_features, of_events = out[:, : 3 * WIDTH], out[:, 3 * WIDTH :]
    (seen,) = torch.autograd.grad(of_features.square().sum(), events, retain_graph=True, allow_unused=True)
    assert (seen is not None and bool(seen.any())) == events_reach_features
    (seen,) = torch.autograd.grad(of_events.square().sum(), tokens, allow_unused=True)
    assert (seen is not None and bool(seen.any())) == features_reach_events


@pytest.mark.parametrize("kind", ["token_mlp", "token_linear", "flatten_mlp"])
def test_a_personal_matrix_is_full_and_belongs_to_its_row(kind: Any) -> None:
    torch.manual_seed(0)
    ffn = PersonalizedFFN(4, WIDTH, kind)
    summary, events = torch.randn(2, 4, WIDTH), torch.randn(1, LENGTH, WIDTH).expand(2, -1, -1)
    matrix = ffn.matrix(summary)
    torch.testing.assert_close(ffn(summary, events), torch.einsum("btd,bde->bte", events, matrix))
    assert not torch.allclose(ffn(summary, events)[0], ffn(summary, events)[1])
    off = matrix[0] - torch.diag(matrix[0].diagonal())
    assert float(off.abs().max()) > 1e-3 and int(torch.linalg.matrix_rank(matrix[0])) > 1
    ffn.matrix = lambda summary_BSD: torch.eye(WIDTH).expand(len(summary_BSD), -1, -1)  # type: ignore[method-assign]
    torch.testing.assert_close(ffn(summary, events), events)


def test_the_appendix_form_is_a_product_on_the_token_axis() -> None:
    torch.manual_seed(0)
    ffn = PersonalizedFFN(4, WIDTH, "token_linear")
    summary = torch.randn(3, 4, WIDTH)
    linear = ffn.make[0]
    assert isinstance(linear, nn.Linear)
    expected = torch.einsum("bsd,es->bde", summary, linear.weight) * WIDTH**-0.5
    torch.testing.assert_close(ffn.matrix(summary), expected)
    assert sum(p.numel() for p in ffn.parameters()) == 4 * WIDTH


def test_the_two_layer_form_is_its_formula() -> None:
    torch.manual_seed(0)
    ffn = PersonalizedFFN(4, WIDTH, "two_layer", hidden=5)
    summary, events = torch.randn(3, 4, WIDTH), torch.randn(3, LENGTH, WIDTH)
    made = ffn.make(summary.transpose(1, 2)) * WIDTH**-0.5
    first, second = made[..., :5], made[..., 5:].transpose(1, 2)

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

    expected = norm(norm(F.gelu(events @ first)) @ second)
    torch.testing.assert_close(ffn(summary, events), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flow", ["int", "s2n"])
def test_padding_is_never_seen(flow: Any) -> None:
    model = backbone(flow=flow).eval()
    tokens, events, mask = inputs()
    plain = model(tokens, [(events, mask)])
    noise = torch.where(mask[:, :, None], events, torch.randn_like(events))
    torch.testing.assert_close(model(tokens, [(noise, mask)]), plain, rtol=0, atol=1e-6)
    longer = F.pad(events, (0, 0, 0, 4), value=3.0), F.pad(mask, (0, 4))
    torch.testing.assert_close(model(tokens, [longer]), plain, rtol=0, atol=1e-6)
    assert bool(plain.isfinite().all())


def test_missing_recent_events_are_learned_tokens() -> None:
    torch.manual_seed(0)
    summary = SequenceSummary(WIDTH, 2, 1, 0, 3, "none")
    assert summary.null_KD is not None
    _, events, mask = inputs()
    told = summary(torch.cat([torch.zeros(7, 1, WIDTH), events], 1), F.pad(mask, (1, 0), value=True))
    torch.testing.assert_close(told[1, 1:], events[1, :3])  # three events, the latest last
    torch.testing.assert_close(told[2, 1:3], summary.null_KD[:2])  # one event
    torch.testing.assert_close(told[2, 3], events[2, 0])
    torch.testing.assert_close(told[0, 1:], events[0, 3:6])


def test_order_matters_through_positions_and_recency_alone() -> None:
    tokens, events, mask = inputs(lengths=[LENGTH] * 7)
    ordered, blind = backbone().eval(), backbone(rope=False, num_recent=0).eval()
    turned = events.flip(1)
    assert not torch.allclose(ordered(tokens, [(events, mask)]), ordered(tokens, [(turned, mask)]), atol=1e-4)
    torch.testing.assert_close(blind(tokens, [(events, mask)]), blind(tokens, [(turned, mask)]), rtol=1e-4, atol=1e-5)


def test_a_mask_of_ones_is_linear_fusion() -> None:
    torch.manual_seed(0)
    fusion = MaskNetFusion(12, 4)
    assert fusion.mask is not None
    last = fusion.mask[2]  # type: ignore[index]
    nn.init.zeros_(last.weight)
    nn.init.ones_(last.bias)
    channels = torch.randn(3, 5, 12)
    torch.testing.assert_close(fusion(channels), fusion.compress(channels))
    assert torch.equal(MaskNetFusion(4, 4)(channels[..., :4]), channels[..., :4])


def test_gates() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, WIDTH)
    gate = SelfGating(WIDTH, "self_gate")
    assert gate.linear is not None
    torch.testing.assert_close(gate(x), x * torch.sigmoid(x @ gate.linear.weight.T + gate.linear.bias))
    gate.kind = "paper"
    torch.testing.assert_close(gate(x), F.silu(x * (x @ gate.linear.weight.T + gate.linear.bias)))
    assert torch.equal(SelfGating(WIDTH, "none")(x), x)


@pytest.mark.parametrize("interaction", ["dhen", "dot", "dcn", "wukong"])
def test_without_sequences_it_is_its_interaction_backbone(interaction: str) -> None:
    torch.manual_seed(0)
    model = InterFormerBackbone(
        N, 0, WIDTH, InterFormerBackbone.Config(num_summary=3, interaction=interaction, gating="none")
    )
    tokens, _, _ = inputs()
    x = tokens
    for arch in model.interactions:
        assert isinstance(arch, InteractionArch) and arch.norm is not None
        x = arch.norm(x + arch.linear(F.silu(arch.interaction(x))))
    torch.testing.assert_close(model(tokens, []), model.last_feature_summary.compress(x).flatten(1))  # type: ignore[operator, union-attr]


SCHEMA = Schema(
    features=(
        Numeric(name="price"),
        Categorical(name="user", num_embeddings=11),
        Categorical(name="item", num_embeddings=9),
        Sequence(name="clicks", max_length=6, fields=(EventId(name="item", table="item", num_embeddings=9),)),
        Sequence(
            name="carts",
            max_length=4,
            fields=(EventId(name="item", table="item", num_embeddings=9), EventNumber(name="age", transform="log1p")),
        ),
    ),
    labels=(Label(name="click"),),
)


def two_sequences() -> Batch:
    return Batch(
        numeric_BN=torch.tensor([[0.5], [1.0], [-2.0]]),
        ids_BF=torch.tensor([[1, 2], [3, 4], [5, 6]]),
        jagged_keys=("clicks.item", "carts.item"),
        jagged_values=torch.tensor([1, 2, 3, 4, 5, 6, 7]),
        jagged_lengths_KB=torch.tensor([[3, 1, 0], [0, 1, 2]]),
        event_keys=("carts.age",),
        event_values=torch.tensor([3.0, 2.0, 1.0]),
        event_lengths_EB=torch.tensor([[0, 1, 2]]),
        labels_BT=torch.tensor([[1.0], [0.0], [1.0]]),
    )


@pytest.mark.parametrize("flow", FLOWS)
def test_two_sequences_of_different_fields_and_lengths(flow: Any) -> None:
    torch.manual_seed(0)
    model = InterFormer.from_config(SCHEMA, {"flow": flow, "hidden": (8,)}).eval()
    nn.init.normal_(model.mlp.layers[-1].weight)
    batch = two_sequences()
    logits = model(batch).logits_BT
    other = replace(batch, jagged_values=torch.tensor([1, 2, 8, 4, 5, 6, 7]))
    changed = (model(other).logits_BT != logits)[:, 0].tolist()
    assert changed == [flow != "sole", False, False]


def test_one_row_of_a_longer_batch_is_scored_alike() -> None:
    torch.manual_seed(0)
    model = InterFormer.from_config(SCHEMA, {"embedding_init": 0.5}).eval()
    nn.init.normal_(model.mlp.layers[-1].weight)
    batch = two_sequences()
    alone = torch.cat([model(batch[i : i + 1]).logits_BT for i in range(3)])
    torch.testing.assert_close(model(batch).logits_BT, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide the width of the tokens, got 3 heads for width 16"),
        ({"num_recent": 5}, 'num_recent is 5, but sequence "carts" keeps 4 events'),
        ({"interaction": "dcnv9"}, "dcnv9"),
        ({"num_heads": 16}, "even width"),
        ({"num_summary": 0}, "num_summary"),
    ],
)
def test_impossible_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InterFormer.from_config(SCHEMA, config)
