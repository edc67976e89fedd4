from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank.layers.token_projection import TokenProjection
from fullrank.models.dhen import (
    DHEN,
    INTERACTIONS,
    AdvancedDLRM,
    Convolution,
    DHENLayer,
    FlatCross,
    OuterCross,
    SelfAttention,
    build_interaction,
    register_interaction,
)
from fullrank.schema import Categorical, Label, Schema

SCHEMA = Schema(
    features=tuple(Categorical(name=f"f{i}", num_embeddings=7) for i in range(5)), labels=(Label(name="click"),)
)


def set_projection(module: nn.Module, weight_ON: Tensor) -> None:
    assert isinstance(module, TokenProjection)
    with torch.no_grad():
        module.weight_ON.copy_(weight_ON)


def test_linear_identity_doubles_the_tokens_and_zero_leaves_the_shortcut() -> None:
    layer = DHENLayer(4, 3, ["linear"], 4, "sum", None)
    x = torch.randn(2, 4, 3)
    set_projection(layer.interactions[0], torch.eye(4))
    torch.testing.assert_close(layer(x), 2 * x)
    set_projection(layer.interactions[0], torch.zeros(4, 4))
    torch.testing.assert_close(layer(x), x)


@pytest.mark.parametrize("ensemble", ["concat", "sum", "weighted_sum"])
def test_the_norm_comes_after_the_shortcut_and_the_ensemble(ensemble: Any) -> None:
    torch.manual_seed(0)
    layer = DHENLayer(5, 4, ["dcn", "linear", "attention"], 3, ensemble)
    x = torch.randn(6, 5, 4)
    outputs = [module(x) for module in layer.interactions]
    mixed = torch.cat(outputs, 1) if ensemble == "concat" else sum(outputs)
    expected = nn.functional.layer_norm(mixed + layer.shortcut(x), (4,))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", INTERACTIONS)
def test_tokens_of_a_layer_are_those_of_its_modules(name: str) -> None:
    for counts, ensemble, out in (([2, 3], "concat", 5), ([3, 3], "sum", 3), ([1, 1], "weighted_sum", 1)):
        layer = DHENLayer(5, 4, [name, "linear"], counts, ensemble)  # type: ignore[arg-type]
        assert layer.out_tokens == out and layer(torch.randn(2, 5, 4)).shape == (2, out, 4)
        assert isinstance(layer.shortcut, nn.Identity) == (out == 5)
        assert sum(p.numel() for p in layer.shortcut.parameters()) == (0 if out == 5 else 5 * out)


@pytest.mark.parametrize("name", INTERACTIONS)
def test_relabelled_tokens_give_the_same_output_unless_the_module_depends_on_order(name: str) -> None:
    torch.manual_seed(1)
    layer = DHENLayer(6, 4, [name], 3)
    x, order = torch.randn(4, 6, 4), torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = DHENLayer(6, 4, [name], 3)
    state = layer.state_dict()
    for key, value in state.items():
        if key.endswith("weight_ON"):
            state[key] = value[:, order]
    permuted.load_state_dict(state)
    found = torch.allclose(layer(x), permuted(x[:, order]), atol=1e-5)
    assert found == (name in ("linear", "attention"))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("name", "options"), [("dcn", {}), ("dcn", {"rank": 3}), ("outer", {})])
def test_a_stack_of_crosses_has_degree_two_to_the_depth(name: str, options: dict[str, Any], layers: int) -> None:
    torch.manual_seed(2)
    stack = nn.Sequential(*(DHENLayer(4, 3, [name], 4, norm=None, options={name: options}) for _ in range(layers)))
    stack.double()
    x, degree = torch.randn(1, 4, 3, dtype=torch.float64) * 0.5, 2**layers
    values = [stack(t * x)[0, 0, 0].detach() for t in torch.linspace(-1, 1, degree + 2, dtype=torch.float64)]

    def difference(order: int) -> float:
        return float(sum((-1) ** (order - k) * math.comb(order, k) * values[k] for k in range(order + 1)))

    assert abs(difference(degree + 1)) < 1e-10
    assert abs(difference(degree)) > 1e-6


@pytest.mark.parametrize("name", INTERACTIONS)
def test_a_module_whose_output_is_switched_off_is_as_if_it_were_absent(name: str) -> None:
    torch.manual_seed(3)
    both, alone = DHENLayer(5, 4, [name, "dcn"], 3, "sum"), DHENLayer(5, 4, ["dcn"], 3, "sum")
    x = torch.randn(4, 5, 4)
    weighted = DHENLayer(5, 4, [name, "dcn"], 3, "weighted_sum")
    state = both.state_dict()
    alone.load_state_dict({key.replace("interactions.1", "interactions.0"): value for key, value in state.items()
                           if not key.startswith("interactions.0")})  # fmt: skip
    weighted.load_state_dict({**state, "scale": torch.tensor([0.0, 1.0])})
    torch.testing.assert_close(weighted(x), alone(x))
    last = both.interactions[0]
    projections = [last.fm.out, last.linear] if name == "wukong" else [last if name == "linear" else last.out]
    for parameter in (p for projection in projections for p in projection.parameters()):
        nn.init.zeros_(parameter)
    torch.testing.assert_close(both(x), alone(x))


def test_self_attention_is_pytorchs_encoder_layer_before_its_projection() -> None:
    torch.manual_seed(4)
    ours = SelfAttention(5, 5, 8, num_heads=2, feed_forward=3)
    theirs = nn.TransformerEncoderLayer(8, 2, 24, dropout=0.0, batch_first=True)
    set_projection(ours.out, torch.eye(5))
    mine = ours.attention
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([mine.query.weight, mine.key_value.weight]))
        theirs.self_attn.in_proj_bias.zero_()
    theirs.self_attn.out_proj.load_state_dict(mine.out.state_dict())
    first = ours.mlp.layers[0]
    theirs.linear1.load_state_dict(first.state_dict())
    theirs.linear2.load_state_dict(ours.mlp_out.state_dict())
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_convolution_sees_neighbours_only() -> None:
    torch.manual_seed(5)
    module = Convolution(7, 7, 6)
    set_projection(module.out, torch.eye(7))
    x = torch.randn(1, 7, 6, requires_grad=True)
    module(x)[0, 3, 2].backward()
    assert x.grad is not None
    reached = x.grad[0] != 0
    assert bool(reached[2:5, 1:4].any()) and int(reached.sum()) <= 9
    assert not bool(reached[:2].any() or reached[5:].any() or reached[:, 4:].any() or reached[:, 0].any())


def test_pairs_are_the_upper_triangle_with_its_diagonal() -> None:
    x = torch.randn(3, 4, 5)
    module = AdvancedDLRM(4, 2, 5, compressed_tokens=3, hidden=(7,))
    pairs = torch.stack([(x[:, i] * x[:, j]).sum(1) for i in range(4) for j in range(i, 4)], 1)
    torch.testing.assert_close(module.pairs(x), pairs)
    flat = torch.cat([pairs, module.compress(x).flatten(1)], 1)
    torch.testing.assert_close(module(x), module.out.linear(module.mlp(flat)).view(3, 2, 5))
    outer = OuterCross(4, 2, 5)
    torch.testing.assert_close(outer(x).flatten(1), outer.out.linear(pairs))


def test_a_flat_cross_has_no_skip_of_its_own() -> None:
    module = FlatCross(3, 2, 4)
    x = torch.randn(2, 3, 4)
    flat = x.flatten(1)
    expected = module.out.linear(flat * module.cross(flat)).view(2, 2, 4)
    torch.testing.assert_close(module(x), expected)
    nn.init.zeros_(module.cross.weight)
    assert not bool(module(x).any())  # a skip would pass x on


def test_each_module_has_a_projection_of_its_own() -> None:
    layer = DHENLayer(5, 4, ["dcn", "dcn", "dlrm"], 3)
    places = [p.data_ptr() for p in layer.parameters()]
    assert len(set(places)) == len(places)
    assert not torch.equal(layer.interactions[0].out.linear.weight, layer.interactions[1].out.linear.weight)


def test_the_second_layer_crosses_the_outputs_of_different_modules() -> None:
    # d²y / d(linear output of layer 1) d(dcn output of layer 1) is not zero only if tokens, not logits, are joined.
    torch.manual_seed(6)
    second = DHENLayer(4, 3, ["dcn"], 4, norm=None).double()

    def of_outputs(linear: Tensor, dcn: Tensor) -> Tensor:
        return second(torch.cat([linear, dcn], 1)).sum()

    linear, dcn = torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(of_outputs, (linear, dcn))
    assert float(hessian[0][1].abs().max()) > 1e-3


def flops_of(name: str, tokens: int, out: int, width: int) -> int:
    """Multiply-adds of one row through a module with its default sizes."""
    pairs, flat = tokens * (tokens + 1) // 2, tokens * width
    gram, to_tokens = tokens * tokens * width, out * width
    projection = tokens * out * width
    return {
        "dlrm": gram + projection + (pairs + to_tokens) * 128 + 128 * to_tokens,
        "attention": tokens * width * width * (1 + 2 + 1 + 8) + 2 * gram + projection,
        "convolution": flat * 4 * 9 + flat * 4 + projection,
        "linear": projection,
        "dcn": flat * flat + flat * to_tokens,
        "outer": gram + pairs * to_tokens,
        "wukong": 2 * flat * 8 + tokens * 8 * 128 + 128 * (out - out // 2) * width + tokens * width * (out // 2),
    }[name]


@pytest.mark.parametrize("name", INTERACTIONS)
def test_flops_are_those_of_the_architecture(name: str) -> None:
    tokens, out, width = 5, 3, 8
    model = DHEN.from_config(
        SCHEMA, {"embedding_dim": width, "layers": [[name, "linear"]], "num_out_tokens": out, "hidden": [6]}
    )
    shortcut = tokens * 2 * out * width
    head = 2 * out * width * 6 + 6
    linear = tokens * out * width
    assert model.flops_per_example() == 2 * (flops_of(name, tokens, out, width) + linear + shortcut + head)


def test_layers_may_have_different_modules() -> None:
    model = DHEN.from_config(
        SCHEMA,
        {
            "layers": [["attention", "linear"], ["dcn"], ["convolution", "dlrm", "wukong"]],
            "num_out_tokens": 4,
            "options": {"attention": {"num_heads": 4}, "dcn": {"rank": 2}},
        },
    )
    assert [layer.names for layer in model.layers] == [
        ("attention", "linear"),
        ("dcn",),
        ("convolution", "dlrm", "wukong"),
    ]
    assert model.layers[0].interactions[0].attention.num_heads == 4
    assert [layer.out_tokens for layer in model.layers] == [8, 4, 12]


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_layer_gives_the_same_outputs_and_gradients() -> None:
    torch.manual_seed(7)
    layer = DHENLayer(5, 4, ["dlrm", "linear"], 2, "weighted_sum")
    x, target = torch.randn(8, 5, 4), torch.randn(8, 2, 4)

    def step(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = function(x)
        return [out, *torch.autograd.grad((out * target).sum(), list(layer.parameters()))]

    torch.testing.assert_close(step(torch.compile(layer)), step(layer), rtol=1e-4, atol=1e-4)


class Mean(nn.Module):
    def __init__(self, num_tokens: int, num_out_tokens: int, width: int, times: float = 1.0) -> None:
        super().__init__()
        self.num_out_tokens, self.times = num_out_tokens, times

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        return self.times * tokens_BMD.mean(1, keepdim=True).expand(-1, self.num_out_tokens, -1)


@pytest.fixture
def registered() -> Iterator[None]:
    register_interaction("mean", Mean)
    register_interaction("too_few", lambda num_tokens, num_out_tokens, width: Mean(num_tokens, 1, width))
    yield
    INTERACTIONS.unregister("mean")
    INTERACTIONS.unregister("too_few")


@pytest.mark.usefixtures("registered")
def test_a_users_own_module_takes_part() -> None:
    layer = DHENLayer(5, 4, ["mean", "linear"], 5, "sum", None, options={"mean": {"times": 3.0}})
    set_projection(layer.interactions[1], torch.zeros(5, 5))
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(layer(x), x + 3 * x.mean(1, keepdim=True))
    assert DHEN.from_config(SCHEMA, {"layers": [["mean"]]}).layers[0].names == ("mean",)
    with pytest.raises(ValueError, match='interaction "too_few" gave shape \\(2, 1, 4\\), expected \\(2, 3, 4\\)'):
        DHENLayer(5, 4, ["too_few"], 3)(x)
    with pytest.raises(ValueError, match='the interaction "mean" exists already'):
        register_interaction("mean", nn.Identity)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DHENLayer(5, 4, ["dcn", "linear"], [2, 3], "sum"), r'"sum" needs equal num_out_tokens .* \[2, 3\]'),
        (lambda: DHENLayer(5, 4, ["dcn", "linear"], [2, 3], "weighted_sum"), "needs equal num_out_tokens"),
        (lambda: DHENLayer(5, 4, ["dcn", "linear"], [2]), "num_out_tokens has 1 numbers for 2 modules"),
        (lambda: DHENLayer(5, 4, ["crossnet"], 2), 'interaction "crossnet" is unknown; choose one of dlrm, attention'),
        (lambda: DHENLayer(5, 4, [], 2), "at least one interaction module"),
        (lambda: DHENLayer(5, 4, ["dcn"], 0), 'interaction "dcn": num_out_tokens must be at least 1, got 0'),
        (lambda: DHENLayer(5, 4, ["dcn"], 2, "mean"), 'ensemble "mean" is unknown'),  # type: ignore[arg-type]
        (lambda: DHENLayer(5, 4, ["dcn"], 2, norm="batch"), 'norm "batch" is unknown'),  # type: ignore[arg-type]
        (lambda: DHENLayer(5, 5, ["attention"], 2), "got 2 heads for width 5"),
        (lambda: build_interaction("dcn", 5, 2, 4, ranks=3), "options of interaction \"dcn\": .*'ranks'"),
        (lambda: DHEN.from_config(SCHEMA, {"layers": [["dcn"], ["fm"]]}), 'interaction "fm" is unknown; choose one of'),
        (lambda: DHEN.from_config(SCHEMA, {"layers": []}), "layers"),
        (lambda: DHEN.from_config(SCHEMA, {"layers": [["dcn"], []]}), r"layers\[1\] has no interaction module"),
        (lambda: DHEN.from_config(SCHEMA, {"options": {"dcn": {"rank": 2}}}), '"dcn", which no layer has'),
    ],
)
def test_wrong_input_is_refused_by_name(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
