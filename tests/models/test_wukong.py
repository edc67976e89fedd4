from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fullrank.layers.factorization import pairwise_term
from fullrank.layers.token_projection import TokenProjection, project_tokens
from fullrank.models.base import example_batch
from fullrank.models.wukong import FactorizationMachineBlock, Wukong, WukongLayer, optimized_fm
from fullrank.schema import Categorical, Label, Numeric, Schema


def schema(fields: int = 5, numbers: int = 0) -> Schema:
    return Schema(
        features=(
            *(Categorical(name=f"f{i}", num_embeddings=7) for i in range(fields)),
            *(Numeric(name=f"x{i}", encoding="scalar") for i in range(numbers)),
        ),
        labels=(Label(name="click"),),
    )


def polynomial(layer: WukongLayer) -> WukongLayer:
    """The layer without norms and biases, which is a polynomial of degree 2 if its MLP has no hidden layer."""
    layer.norm = layer.fm.norm = nn.Identity()
    nn.init.zeros_(layer.fm.out.bias)
    return layer


def difference(values: list[Tensor], order: int) -> float:
    return float(sum((-1) ** (order - k) * math.comb(order, k) * values[k] for k in range(order + 1)))


def test_optimised_fm_equals_the_pair_matrix_times_y() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 9, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    expected = (x @ x.transpose(1, 2)) @ y
    torch.testing.assert_close(optimized_fm(x, project_tokens(x, y.T)), expected, rtol=0, atol=1e-10)
    full = optimized_fm(x, project_tokens(x, torch.eye(9, dtype=torch.float64)))
    torch.testing.assert_close(full, x @ x.transpose(1, 2), rtol=0, atol=1e-10)


def test_fm_costs_linear_in_the_number_of_tokens() -> None:
    def flops(tokens: int) -> int:
        x, y = torch.randn(2, tokens, 16), torch.randn(8, tokens)
        with FlopCounterMode(display=False) as counter:
            optimized_fm(x, project_tokens(x, y))
        return counter.get_total_flops()

    assert flops(100) == 2 * (2 * 100 * 16 * 8) * 2  # two products, two rows
    assert flops(200) == 2 * flops(100)


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                # A broadcast view takes no memory.
                strides = zip(tensor.shape, tensor.stride(), strict=True)
                self.numel = max(self.numel, math.prod(size for size, stride in strides if stride))
        return out


@pytest.mark.parametrize("attentive", [False, True])
def test_no_pair_matrix_and_no_weight_matrix_per_row_is_ever_made(attentive: bool) -> None:
    rows, tokens, out, width, rank = 64, 80, 4, 3, 2
    layer = WukongLayer(tokens, out // 2, out // 2, width, rank, (5,), attentive=attentive)
    x = torch.randn(rows, tokens, width, requires_grad=True)
    with LargestTensor() as largest:
        layer(x).sum().backward()
    assert largest.numel <= rows * tokens * width  # a pair matrix would have rows·tokens² numbers
    with LargestTensor() as control:
        torch.bmm(x, x.transpose(1, 2))
    assert control.numel == rows * tokens * tokens


@pytest.mark.parametrize("num_tokens", [6, 7])
@pytest.mark.parametrize("attentive", [False, True])
def test_the_fused_token_maps_equal_the_formula(num_tokens: int, attentive: bool) -> None:
    torch.manual_seed(1)
    layer = WukongLayer(num_tokens, 4, 3, 5, 2, (6,), attentive=attentive).double()
    x = torch.randn(3, num_tokens, 5, dtype=torch.float64)
    residual = x if layer.residual is None else layer.residual(x)
    expected = layer.norm(torch.cat([layer.fm(x), layer.linear(x)], 1) + residual)
    torch.testing.assert_close(layer(x), expected)
    assert layer.out_tokens == 7 and layer(x).shape == (3, 7, 5)


def test_the_residual_is_the_identity_exactly_where_the_number_of_tokens_stays() -> None:
    assert WukongLayer(7, 4, 3, 5, 2, ()).residual is None
    other = WukongLayer(8, 4, 3, 5, 2, ()).residual
    assert isinstance(other, TokenProjection) and other.weight_ON.shape == (7, 8)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_order_of_interactions_doubles_with_each_layer(layers: int) -> None:
    torch.manual_seed(2)
    stack = nn.Sequential(
        *(polynomial(WukongLayer(5 if place == 0 else 6, 3, 3, 4, 2, ())) for place in range(layers))
    ).double()
    x, degree = torch.randn(1, 5, 4, dtype=torch.float64) * 0.5, 2**layers
    values = [stack(t * x)[0, 0, 0].detach() for t in torch.linspace(-1, 1, degree + 2, dtype=torch.float64)]
    assert abs(difference(values, degree + 1)) < 1e-9
    assert abs(difference(values, degree)) > 1e-5


def test_summing_the_upper_triangle_of_the_full_fm_matrix_is_a_factorisation_machine() -> None:
    torch.manual_seed(3)
    tokens, width = 6, 4
    block = FactorizationMachineBlock(tokens, 1, width, tokens, ()).double()
    block.norm = nn.Identity()
    with torch.no_grad():
        block.y_KN.copy_(torch.eye(tokens))
        block.out.weight.zero_()
        block.out.weight[0] = torch.ones(tokens, tokens).triu(1).flatten()
    x = torch.randn(8, tokens, width, dtype=torch.float64)
    torch.testing.assert_close(block(x)[:, 0, 0], pairwise_term(x))


def test_an_attentive_block_whose_weights_are_zero_is_the_plain_block() -> None:
    torch.manual_seed(4)
    attentive = FactorizationMachineBlock(6, 2, 4, 3, (5,), attentive=True)
    plain = FactorizationMachineBlock(6, 2, 4, 3, (5,))
    x = torch.randn(4, 6, 4)
    learned = attentive(x)
    nn.init.zeros_(attentive.make_y.weight)
    shared = {name: value for name, value in attentive.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict({**shared, "y_KN": attentive.make_y.bias.view(3, 6)})
    torch.testing.assert_close(attentive(x), plain(x))
    assert not torch.allclose(learned, plain(x), atol=1e-4)


def test_the_first_products_keep_the_scale_of_the_tokens_whatever_their_number() -> None:
    torch.manual_seed(5)
    spread = []
    for tokens in (20, 2000):
        block = FactorizationMachineBlock(tokens, 1, 16, 4, ())
        x = torch.randn(8, tokens, 16) / 4
        spread.append(float(optimized_fm(x, block.mixed(x)).detach().std()))
    assert 0.5 < spread[0] / spread[1] < 2 and 0.05 < spread[1] < 2


@pytest.mark.parametrize("attentive", [False, True])
def test_flops_are_those_of_the_architecture(attentive: bool) -> None:
    tokens, width, fm, linear, rank, hidden, head = 5, 8, 3, 4, 2, 6, 10
    model = Wukong.from_config(
        schema(tokens),
        {
            "embedding_dim": width,
            "num_layers": 2,
            "num_fm": fm,
            "num_linear": linear,
            "rank": rank,
            "fm_hidden": (hidden,),
            "attentive": attentive,
            "hidden": (head,),
        },
    )
    out, products = fm + linear, 0
    for tokens_in, mapped in ((tokens, out), (out, linear)):  # the first layer's residual is learned
        products += width * tokens_in * (mapped + rank)  # W_L and R, and Xᵀ Y or the compression of attentive Y
        products += width * tokens_in * rank  # X (Xᵀ Y)
        products += tokens_in * rank * hidden + hidden * fm * width
        if attentive:
            products += rank * width * hidden + hidden * rank * tokens_in + width * tokens_in * rank
    products += out * width * head + head
    assert model.flops_per_example() == 2 * products


def test_numbers_enter_together_or_one_by_one() -> None:
    together = Wukong.from_config(schema(3, 4), {"number_tokens": 2})
    assert together.tokens.num_tokens == 3 + 2
    assert Wukong.from_config(schema(3, 4), {"number_tokens": 0}).tokens.num_tokens == 3 + 4
    assert Wukong.from_config(schema(3, 0), {"number_tokens": 2}).tokens.num_tokens == 3
    # A token of numbers depends on every number.
    numbers = torch.randn(1, 4, requires_grad=True)
    together.tokens(replace(example_batch(together.schema, 1), numeric_BN=numbers))[:, 3].sum().backward()
    assert numbers.grad is not None and bool((numbers.grad != 0).all())


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_give_the_same_outputs_and_gradients() -> None:
    torch.manual_seed(6)
    stack = nn.Sequential(WukongLayer(5, 2, 3, 4, 2, (6,)), WukongLayer(5, 2, 2, 4, 2, (6,)))
    x, target = torch.randn(8, 5, 4), torch.randn(8, 4, 4)

    def step(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = function(x)
        return [out, *torch.autograd.grad((out * target).sum(), list(stack.parameters()))]

    torch.testing.assert_close(step(torch.compile(stack)), step(stack), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WukongLayer(5, 0, 2, 4, 2, ()), "num_fm must be at least 1, got 0"),
        (lambda: WukongLayer(5, 2, 0, 4, 2, ()), "num_linear must be at least 1, got 0"),
        (lambda: WukongLayer(5, 2, 2, 4, 0, ()), "rank must be at least 1, got 0"),
        (lambda: WukongLayer(0, 2, 2, 4, 1, ()), "num_tokens must be at least 1, got 0"),
        (lambda: Wukong.from_config(schema(), {"num_layers": 0}), "num_layers"),
        (
            lambda: Wukong.from_config(
                Schema(
                    features=(
                        Categorical(name="user", num_embeddings=7),
                        Categorical(name="item", num_embeddings=7, embedding_dim=8),
                    ),
                    labels=(Label(name="click"),),
                )
            ),
            'one embedding width for all features: "item" has embedding_dim 8, expected 16',
        ),
    ],
)
def test_bad_sizes_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
