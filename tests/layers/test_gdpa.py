from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fullrank.layers.attention import attend, positions_from_latest, rotary_frequencies, turns
from fullrank.layers.gdpa import ACTIVATIONS, gdpa
from fullrank.layers.seed_pooling import HierarchicalSeedPooling, SumKronLinear
from fullrank.layers.sliding_window import SlidingWindowAttention, sliding_window


def qkv(queries: int = 5, keys: int = 7, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, heads, queries, 4, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(3, heads, keys, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return q, k, v


def test_without_activation_it_is_a_product_with_a_small_matrix() -> None:
    q, k, v = qkv()
    torch.testing.assert_close(gdpa(q, k, v, "identity"), q @ (k.transpose(2, 3) @ v))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_it_is_the_two_layer_network_of_each_query(name: str) -> None:
    q, k, v = qkv()
    for row in range(3):
        for head in range(2):
            w1, w2 = k[row, head].T, v[row, head]
            expected = ACTIVATIONS[name](q[row, head] @ w1) @ w2
            torch.testing.assert_close(gdpa(q, k, v, name)[row, head], expected, rtol=1e-12, atol=1e-12)


def test_with_softmax_it_is_ordinary_attention() -> None:
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(gdpa(q, k, v, "softmax", scale=0.5, scale_mode="pre"), expected)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    tensors = tuple(x[:1, :1, :3].clone().requires_grad_() for x in qkv())
    assert torch.autograd.gradcheck(lambda q, k, v: gdpa(q, k, v, name, scale=0.3, scale_mode="pre"), tensors)


def test_scale_inside_or_outside_is_one_for_homogeneous_activations() -> None:
    q, k, v = qkv()
    for name in ("identity", "relu", "leaky_relu"):
        inside, outside = (gdpa(q, k, v, name, scale=0.3, scale_mode=mode) for mode in ("pre", "post"))  # type: ignore[arg-type]
        torch.testing.assert_close(inside, outside)
    assert not torch.allclose(
        gdpa(q, k, v, "gelu", scale=0.3, scale_mode="pre"), gdpa(q, k, v, "gelu", scale=0.3, scale_mode="post")
    )


@pytest.mark.parametrize("name", [*ACTIVATIONS, "softmax"])
def test_absent_keys_add_nothing_and_absent_queries_get_zero(name: str) -> None:
    q, k, v = qkv()
    keys = torch.arange(7) < torch.tensor([[7], [4], [0]])
    queries = torch.arange(5) < torch.tensor([[5], [2], [1]])
    masked = gdpa(q, k, v, name, query_mask_BQ=queries, key_mask_BK=keys)
    torch.testing.assert_close(masked[1, :, :2], gdpa(q[1:2, :, :2], k[1:2, :, :4], v[1:2, :, :4], name)[0])
    assert bool((masked[1, :, 2:] == 0).all()) and bool((masked[2] == 0).all())


def test_each_head_has_its_own_activation() -> None:
    q, k, v = qkv()
    mixed = gdpa(q, k, v, ["relu", "silu"])
    torch.testing.assert_close(mixed[:, 0], gdpa(q, k, v, "relu")[:, 0])
    torch.testing.assert_close(mixed[:, 1], gdpa(q, k, v, "silu")[:, 1])


def test_a_window_hides_what_is_further_away() -> None:
    q, k, v = qkv(7, 7)
    windowed = gdpa(q, k, v, "gelu", window=1)
    torch.testing.assert_close(windowed[:, :, 3], gdpa(q[:, :, 3:4], k[:, :, 2:5], v[:, :, 2:5], "gelu")[:, :, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "tanhh"}, 'activation "tanhh" is unknown'),
        ({"activation": ["relu"] * 3}, "one for each of 2, got 3"),
        ({"window": -1}, "at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gdpa(*qkv(), **arguments)


def masks(rows: int, length: int) -> Tensor:
    return torch.arange(length) < torch.tensor([length, length // 2, 1, 0])[:rows, None]


@pytest.mark.parametrize("window", [0, 1, 3, 5, 16, 17, 40])
@pytest.mark.parametrize("length", [17, 1])
def test_blocks_of_neighbours_equal_a_masked_full_matrix(window: int, length: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 2, length, 6) for _ in range(3))
    mask = masks(4, length)
    place = torch.arange(length)
    seen = ((place[:, None] - place[None]).abs() <= window)[None] & mask[:, None, :]
    some = seen.any(2, keepdim=True)
    weight = (q @ k.transpose(2, 3) * 6**-0.5).masked_fill(~(seen | ~some)[:, None], -torch.inf).softmax(3)
    expected = (weight @ v).masked_fill(~some[:, None], 0.0)
    real = mask[:, None, :, None]
    found = sliding_window(q, k, v, window, mask)
    torch.testing.assert_close(found * real, expected * real, rtol=1e-5, atol=1e-6)
    assert bool(found.isfinite().all())
    if window >= length - 1:
        torch.testing.assert_close(found, attend(q, k, v, mask))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return out


def test_windowed_attention_grows_linearly_and_makes_no_full_matrix() -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(16, 2, 8)
    flops, largest = {}, {}
    for length in (256, 512):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            layer(torch.randn(1, length, 16))
        with torch.no_grad(), Largest() as largest_of:
            layer(torch.randn(1, length, 16))
        flops[length], largest[length] = counter.get_total_flops(), largest_of.elements
    assert flops[512] / flops[256] <= 2.1
    assert largest[512] / largest[256] <= 2.1
    assert largest[512] < 512 * 512


def test_a_kronecker_sum_is_its_dense_matrix() -> None:
    torch.manual_seed(0)
    layer = SumKronLinear(5, 3, 4, 2).double()
    dense = sum(torch.kron(z, w.T.contiguous()) for z, w in zip(layer.mix_RTS, layer.weight_RDD, strict=True))
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x).flatten(1), x.flatten(1) @ dense.T)  # type: ignore[union-attr]
    assert sum(p.numel() for p in layer.parameters()) == 2 * (5 * 3 + 4 * 4)


def test_one_term_with_the_identity_is_plain_compression() -> None:
    layer = SumKronLinear(5, 3, 4, 1)
    with torch.no_grad():
        layer.weight_RDD.copy_(torch.eye(4)[None])
    x = torch.randn(6, 5, 4)
    torch.testing.assert_close(layer(x), layer.mix_RTS[0] @ x)


def test_seed_pooling_sees_a_set_of_real_events() -> None:
    torch.manual_seed(0)
    pool = HierarchicalSeedPooling(8, 2, 6, 3, 2)
    events, mask = torch.randn(3, 10, 8), masks(3, 10)
    order = torch.randperm(10)
    torch.testing.assert_close(pool(events, mask), pool(events[:, order], mask[:, order]), rtol=1e-4, atol=1e-6)
    noise = torch.where(mask[:, :, None], events, torch.randn_like(events))
    torch.testing.assert_close(pool(events, mask), pool(noise, mask))
    with pytest.raises(ValueError, match="3 seeds for 3 tokens"):
        HierarchicalSeedPooling(8, 2, 3, 3, 2)


def test_seed_pooling_with_turned_events_knows_their_order_and_no_padding() -> None:
    torch.manual_seed(0)
    pool = HierarchicalSeedPooling(8, 2, 6, 3, 2)
    events, mask = torch.randn(3, 10, 8), masks(3, 10)
    turn = turns(positions_from_latest(mask)[:, :, None] * rotary_frequencies(2), 2)
    still = torch.ones_like(turn)
    torch.testing.assert_close(pool(events, mask, still), pool(events, mask), rtol=1e-4, atol=1e-6)
    moved = pool(events.roll(1, 1), mask.roll(1, 1), turn.roll(1, 1))
    torch.testing.assert_close(moved, pool(events, mask, turn), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(pool(events.flip(1), mask.flip(1), turn), pool(events, mask, turn), atol=1e-3)
    noise = torch.where(mask[:, :, None], events, torch.randn_like(events))
    torch.testing.assert_close(pool(noise, mask, turn), pool(events, mask, turn))
