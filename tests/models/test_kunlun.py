from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank.layers.rote import ROTE
from fullrank.metrics.scaling_law import fit_scaling_law, scaling_efficiency
from fullrank.models.kunlun import (
    EventBlock,
    EventConfig,
    FieldNorm,
    Kunlun,
    KunlunBackbone,
    MixtureOfWukongExperts,
    PersonalGDPA,
    SummaryTokens,
)
from fullrank.models.wukong import WukongLayer
from fullrank.schema import Categorical, EventId, Label, Schema, Sequence

WIDTH, LENGTH, N = 8, 6, 5
CLICKS, VIEWS = EventConfig(width=8, window=2, num_tokens=3), EventConfig(width=4, window=1, num_tokens=2, num_layers=2)


def backbone(events: dict[str, EventConfig] | None = None, **options: Any) -> KunlunBackbone:
    torch.manual_seed(0)
    events = {"clicks": CLICKS, "views": VIEWS} if events is None else events
    settings: dict[str, Any] = {
        "num_layers": 3, "num_summary": 3, "num_seeds": 7, "gdpa_hidden": 6, "kron_rank": 2, "num_experts": 2,
        "num_out_tokens": 6, "fm_rank": 4, "fm_hidden": (8,), "mix": True, "activation": "gelu_tanh",
        "scale_mode": "post", "comp_skip": "alternate", "rote": True, "time_scale": 3600.0,
        "rote_reference": "request",
    }  # fmt: skip
    config = KunlunBackbone.Config(events=events, **{**settings, **options})
    return KunlunBackbone(N, WIDTH, dict.fromkeys(events, LENGTH), config)


def inputs() -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor | None]]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(4, N, WIDTH, generator=generator)
    sequences: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for width, lengths in ((8, [6, 3, 1, 0]), (4, [2, 6, 0, 5])):
        mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
        age = torch.rand(4, LENGTH, generator=generator).sort(1, descending=True).values * 1e5
        events = torch.randn(4, LENGTH, width, generator=generator).masked_fill(~mask[:, :, None], 0.0)
        sequences.append((events, mask, age))
    return tokens, sequences


@pytest.mark.parametrize("comp_skip", ["alternate", "none"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_every_parameter_learns(comp_skip: Any, layers: int) -> None:
    model = backbone(comp_skip=comp_skip, num_layers=layers)
    out = model(*inputs())
    (out * torch.randn_like(out)).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0]
    assert not dead


def test_padding_is_never_seen() -> None:
    model = backbone().eval()
    tokens, sequences = inputs()
    plain = model(tokens, sequences)
    noisy = [(torch.where(m[:, :, None], e, torch.randn_like(e)), m, a) for e, m, a in sequences]
    torch.testing.assert_close(model(tokens, noisy), plain, rtol=1e-5, atol=1e-6)
    longer = [
        (nn.functional.pad(e, (0, 0, 0, 3), value=2.0), nn.functional.pad(m, (0, 3)), nn.functional.pad(a, (0, 3)))
        for e, m, a in sequences
        if a is not None
    ]
    torch.testing.assert_close(model(tokens, longer), plain, rtol=1e-4, atol=1e-5)
    assert bool(plain.isfinite().all())


def test_layers_that_reuse_have_no_pooling_and_layers_that_attend_no_network() -> None:
    model = backbone()
    for layer, blocks in enumerate(model.blocks):
        block = blocks[0]  # type: ignore[index]
        assert isinstance(block, EventBlock)
        assert (block.pool is None) == (layer % 2 == 1)
        assert (block.personal is None) == (layer % 2 == 1)
        assert (block.attention is None) == (layer % 2 == 0)
    assert isinstance(model.blocks[2][1], nn.Identity)  # type: ignore[index]


def test_a_reused_summary_is_that_of_the_layer_before() -> None:
    model = backbone(num_layers=2)
    seen: list[Tensor] = []
    for interaction in model.interactions:
        interaction.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(*inputs())
    assert torch.equal(seen[0][:, 3:], seen[1][:, 3:])


def test_skipping_saves_the_operations_that_it_leaves_out() -> None:
    schema = schema_of(50)
    config = {"num_layers": 4, "hidden": (8,)}
    flops = {
        skip: Kunlun.from_config(schema, {**config, "comp_skip": skip}).flops_per_example()
        for skip in ("alternate", "none")
    }
    model = Kunlun.from_config(schema, {**config, "comp_skip": "none"})
    # Half of the layers lose pooling and network, the other half attention: per layer of width d over L events,
    # seeds K, tokens T, rank R, hidden F:
    d, length, seeds, tokens, rank, hidden = 16, 50, 16, 4, 4, 32
    attention = 2 * length * 4 * d * d + 2 * 2 * _windowed(length, 16) * d
    network = 2 * hidden * 12 * d + 2 * hidden * d * 2 * d + 2 * 2 * length * hidden * d
    pooling = 2 * (seeds * d * d + length * d * 2 * d + 2 * seeds * length * d + seeds * d * d)
    pooling += 2 * (rank * tokens * seeds * d + tokens * rank * d * d)
    assert flops["none"] - flops["alternate"] == pytest.approx(2 * (attention + network + pooling), rel=0.01)
    assert model.flops_per_example() == flops["none"]


def _windowed(length: int, window: int) -> int:
    """Scores that are computed: every chunk of `window` tokens against three chunks."""
    chunks = -(-length // window)
    return chunks * window * 3 * window


def test_a_smaller_event_type_costs_less() -> None:
    schema = schema_of(50)
    large = Kunlun.from_config(schema, {"num_layers": 3}).flops_per_example()
    small = Kunlun.from_config(
        schema, {"num_layers": 3, "events": {"clicks": {"width": 8, "num_layers": 1, "window": 4}}}
    ).flops_per_example()
    assert small < 0.7 * large


def test_personal_networks_belong_to_their_row() -> None:
    torch.manual_seed(0)
    layer = PersonalGDPA(3, WIDTH, WIDTH, 2, 10, "relu", scale=0.5, scale_mode="post")
    events = torch.randn(1, LENGTH, WIDTH).expand(2, -1, -1)
    summary, mask = torch.randn(2, 3, WIDTH), torch.ones(2, LENGTH, dtype=torch.bool)
    out = layer(events, mask, summary)
    assert not torch.allclose(out[0], out[1])
    made = layer.weights(layer.keys(summary))
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        w1, w2 = made[0, :, :8][:, part].T, made[0, :, 8:][:, part]
        expected = torch.relu(layer.norm(events[0])[:, part] @ w1) @ w2 * 0.5 + events[0][:, part]
        torch.testing.assert_close(out[0][:, part], expected)


def test_time_turns_the_pairs_that_place_does_not() -> None:
    rote = ROTE(4, time_scale=3600.0)
    mask = torch.tensor([[True, True, True, False]])
    age = torch.tensor([[7200.0, 3600.0, 0.0, 0.0]])
    angle = rote(mask, age)
    torch.testing.assert_close(angle[0, :3, 0], torch.tensor([2.0, 1.0, 0.0]))
    torch.testing.assert_close(angle[0, :3, 2], torch.log1p(torch.tensor([2.0, 1.0, 0.0])))
    # Without times, and for events of age 0, only the place counts.
    assert bool((rote(mask, torch.zeros(1, 4))[0, :, 2:] == 0).all())
    assert rote(mask, None).shape == angle.shape
    huge = rote(mask, torch.full((1, 4), 1e30))
    assert bool(huge.isfinite().all())
    ages = torch.tensor([[1e6, 1e4, 1e2, 0.0]])
    assert bool((rote.log_time(torch.ones(1, 4, dtype=torch.bool), ages).diff() < 0).all())


def test_gaps_to_the_previous_event() -> None:
    rote = ROTE(4, time_scale=100.0, reference="previous")
    mask = torch.ones(1, 3, dtype=torch.bool)
    times = rote.log_time(mask, torch.tensor([[350.0, 250.0, 50.0]]))
    torch.testing.assert_close(times, torch.tensor([[0.0, math.log(2), math.log(3)]]))
    # A later request moves all ages alike and no gap.
    torch.testing.assert_close(rote.log_time(mask, torch.tensor([[1350.0, 1250.0, 1050.0]])), times)


def test_events_from_the_future_are_counted() -> None:
    mask = torch.tensor([[True, True, False]])
    with pytest.warns(UserWarning, match="1 events are younger"):
        times = ROTE(4).log_time(mask, torch.tensor([[100.0, -5.0, -5.0]]))
    assert float(times[0, 1]) == 0


def test_one_expert_is_a_wukong_layer_and_unmixed_experts_do_not_meet() -> None:
    torch.manual_seed(0)
    one = MixtureOfWukongExperts(6, 6, WIDTH, 1, 4, (8,))
    assert isinstance(one.experts[0], WukongLayer)
    tokens = torch.randn(1, 6, WIDTH)
    assert torch.equal(one(tokens), one.experts[0](tokens))
    two = MixtureOfWukongExperts(6, 6, WIDTH, 2, 4, (8,), mix=False)
    # Sums of normalised outputs, and of their squares, are constant: their gradients would be rounding.
    jacobian = torch.autograd.functional.jacobian(lambda x: two(x)[0].pow(3).sum(1), tokens)[:, 0].abs().sum(2) > 1e-4
    assert not bool(jacobian[:3, 1::2].any()) and not bool(jacobian[3:, 0::2].any())
    assert bool(jacobian[:3, 0::2].any()) and bool(jacobian[3:, 1::2].any())
    with pytest.raises(ValueError, match="expected 1 to 3 experts"):
        MixtureOfWukongExperts(6, 6, WIDTH, 4, 4, (8,))


def test_a_scaling_law_is_recovered() -> None:
    flops = [1e6, 4e6, 1.6e7, 6.4e7]
    law = fit_scaling_law(flops, [0.9 - 0.01 * math.log(c / 1e6) for c in flops])
    assert law.ne0 == pytest.approx(0.9) and law.eta == pytest.approx(0.01) and law.r2 == pytest.approx(1)
    assert law(2e6) == pytest.approx(0.9 - 0.01 * math.log(2))
    slower = fit_scaling_law(flops, [0.9 - 0.005 * math.log(c / 1e6) for c in flops])
    assert scaling_efficiency(law, slower) == pytest.approx(2)


def test_few_or_scattered_points_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="3 points"):
        fit_scaling_law([1, 2, 4], [0.9, 0.8, 0.7])
    with pytest.warns(UserWarning, match="not on a line"):
        fit_scaling_law([1, 2, 4, 8], [0.9, 0.7, 0.9, 0.7])
    with pytest.raises(ValueError, match="2 different"):
        fit_scaling_law([3, 3], [0.1, 0.2])


def schema_of(length: int) -> Schema:
    fields = (EventId(name="item", table="item", num_embeddings=9),)
    return Schema(
        features=(
            Categorical(name="user", num_embeddings=11),
            Categorical(name="item", num_embeddings=9),
            Sequence(name="clicks", max_length=length, fields=fields),
        ),
        labels=(Label(name="click"),),
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"events": {"purchases": {}}}, 'no sequence "purchases"; the schema has clicks'),
        ({"num_seeds": 4}, "num_seeds is 4, expected more than the 4 tokens"),
        ({"activation": ("relu", "silu", "gelu")}, "one for each of 2, got 3"),
        ({"events": {"clicks": {"window": -1}}}, "window"),
        ({"events": {"clicks": {"num_heads": 3}}}, "got 3 heads for width 16"),
    ],
)
def test_impossible_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kunlun.from_config(schema_of(10), config)


def test_recent_events_join_the_summary_as_they_are() -> None:
    config = KunlunBackbone.Config(num_seeds=7, kron_rank=2)
    summary = SummaryTokens(EventConfig(num_tokens=3, num_recent=2), WIDTH, config)
    _, sequences = inputs()
    events, mask, _ = sequences[0]
    turn = torch.ones(*events.shape[:2], WIDTH // 2, dtype=torch.complex64)
    tokens = summary(events, mask, turn)
    assert tokens.shape == (4, 5, WIDTH)
    torch.testing.assert_close(tokens[:2, 3:], torch.stack([events[0, 4:6], events[1, 1:3]]))
    torch.testing.assert_close(tokens[2, 3:], torch.stack([torch.zeros(WIDTH), events[2, 0]]))
    assert bool((tokens[3, 3:] == 0).all())


def test_a_large_number_of_an_event_drowns_no_other_field() -> None:
    norm = FieldNorm(2 * WIDTH, WIDTH)
    ids, number = torch.randn(3, 4, WIDTH), 1e6 * torch.randn(3, 4, WIDTH)
    assert torch.equal(norm(torch.cat([ids, number], 2))[..., :WIDTH], nn.functional.layer_norm(ids, (WIDTH,)))
