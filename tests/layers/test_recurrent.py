from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fullrank.layers.recurrent import AttentionalGRU, Steps

LENGTHS = torch.tensor([3, 0, 7, 1, 7, 0, 2])
STARTS = (LENGTHS.cumsum(0) - LENGTHS).tolist()
CHANNELS, STATE = 4, 5


def layer() -> AttentionalGRU:
    torch.manual_seed(0)
    gru = AttentionalGRU(CHANNELS, STATE).double()
    nn.init.normal_(gru.input.bias)
    nn.init.normal_(gru.candidate_bias_H)
    return gru


def events(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Events row after row, and a weight of each."""
    generator = torch.Generator().manual_seed(seed)
    total = int(LENGTHS.sum())
    channels = torch.randn(total, CHANNELS, generator=generator, dtype=torch.float64)
    return channels, torch.rand(total, generator=generator, dtype=torch.float64)


def by_row(gru: AttentionalGRU, channels: Tensor, attention: Tensor | None) -> tuple[Tensor, Tensor]:
    """States in row-after-row order and last states, by the equations, one event at a time."""
    w_r, w_u, w_n = gru.input.weight.chunk(3)
    b_r, b_u, b_n = gru.input.bias.chunk(3)
    u_r, u_u, u_n = gru.recurrent_3HH.chunk(3)
    states, last = [], []
    for start, length in zip(STARTS, LENGTHS.tolist(), strict=True):
        h = channels.new_zeros(STATE)
        for place in range(start, start + length):
            x = channels[place]
            r, u = torch.sigmoid(w_r @ x + u_r @ h + b_r), torch.sigmoid(w_u @ x + u_u @ h + b_u)
            n = torch.tanh(w_n @ x + b_n + r * (u_n @ h + gru.candidate_bias_H))
            u = u if attention is None else attention[place] * u
            h = (1 - u) * h + u * n
            states.append(h)
        last.append(h)
    return torch.stack(states), torch.stack(last)


@pytest.mark.parametrize("attended", [False, True])
def test_states_and_gradients_are_those_of_the_equations(attended: bool) -> None:
    gru = layer()
    channels, weights = events()
    steps = Steps.of(LENGTHS)
    leaves = [channels.requires_grad_(), *gru.parameters()] + ([weights.requires_grad_()] if attended else [])
    attention = weights if attended else None
    expected_states, expected_last = by_row(gru, channels, attention)
    states = gru(channels[steps.order_E], steps, None if attention is None else attention[steps.order_E])
    torch.testing.assert_close(states, expected_states[steps.order_E])
    torch.testing.assert_close(steps.last(states), expected_last)
    # A loss that reads every state, so that gradients join at every step.
    probe = torch.randn_like(states)
    ours = torch.autograd.grad((states * probe).sum(), leaves)
    theirs = torch.autograd.grad((expected_states[steps.order_E] * probe).sum(), leaves)
    torch.testing.assert_close(ours, theirs)


def test_attention_of_one_is_pytorchs_gru() -> None:
    gru = layer()
    theirs = nn.GRU(CHANNELS, STATE, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        # PyTorch's gate says how much of the state to keep, ours how much to replace.
        sign = torch.ones(3 * STATE, dtype=torch.float64)
        sign[STATE : 2 * STATE] = -1
        theirs.weight_ih_l0.copy_(gru.input.weight * sign[:, None])
        theirs.bias_ih_l0.copy_(gru.input.bias * sign)
        theirs.weight_hh_l0.copy_(gru.recurrent_3HH * sign[:, None])
        theirs.bias_hh_l0.zero_()[2 * STATE :] = gru.candidate_bias_H
    channels, _ = events()
    steps = Steps.of(LENGTHS)
    last = steps.last(gru(channels[steps.order_E], steps, torch.ones(len(channels), dtype=torch.float64)))
    for row, part in enumerate(channels.split(LENGTHS.tolist())):
        expected = theirs(part[None])[1][0, 0] if len(part) else torch.zeros(STATE, dtype=torch.float64)
        torch.testing.assert_close(last[row], expected)


def test_an_event_without_attention_leaves_the_state_alone() -> None:
    gru = layer()
    channels, weights = events()
    steps = Steps.of(LENGTHS)
    ordered = channels[steps.order_E]
    assert bool((gru(ordered, steps, torch.zeros(len(channels), dtype=torch.float64)) == 0).all())
    third = STARTS[2] + 3
    weights[third] = 0
    states = gru(ordered, steps, weights[steps.order_E])
    in_rows = torch.empty_like(states)
    in_rows[steps.order_E] = states
    torch.testing.assert_close(in_rows[third], in_rows[third - 1], rtol=0, atol=0)
    assert float((in_rows[third + 1] - in_rows[third]).detach().abs().max()) > 1e-3


def test_steps_visit_every_event_once_and_longer_rows_first() -> None:
    steps = Steps.of(LENGTHS)
    assert sorted(steps.order_E.tolist()) == list(range(int(LENGTHS.sum())))
    assert steps.counts == [int((t < LENGTHS).sum()) for t in range(7)]
    first = steps.counts[0]
    # The one before an event is its neighbour in the same row.
    assert (steps.order_E[steps.previous] == steps.order_E[first:] - 1).all()
    assert (steps.row_E[steps.previous] == steps.row_E[first:]).all()
    filled = ~steps.empty_B
    assert (steps.order_E[steps.last_B][filled] == (LENGTHS.cumsum(0) - 1)[filled]).all()


def test_softmax_is_that_of_each_row() -> None:
    steps = Steps.of(LENGTHS)
    _, scores = events()
    scores = 100 * scores
    softmax = steps.softmax(scores[steps.order_E])
    expected = torch.cat([part.softmax(0) for part in scores.split(LENGTHS.tolist())])
    torch.testing.assert_close(softmax, expected[steps.order_E])


@pytest.mark.parametrize("lengths", [torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)])
def test_nothing_but_empty_rows(lengths: Tensor) -> None:
    gru = layer()
    steps = Steps.of(lengths)
    last = steps.last(gru(torch.zeros(0, CHANNELS, dtype=torch.float64), steps))
    assert last.shape == (len(lengths), STATE) and not last.any()


def test_operations_are_those_of_the_events_there_are() -> None:
    gru = layer()
    channels, _ = events()
    steps = Steps.of(LENGTHS)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gru(channels[steps.order_E], steps)
    later = len(channels) - steps.counts[0]  # the first state of a row has none before it
    assert counter.get_total_flops() == 2 * 3 * STATE * (len(channels) * CHANNELS + later * STATE)


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor):
                self.numel = max(self.numel, made.numel())
        return out


def test_one_long_history_costs_nothing_to_the_others() -> None:
    gru = layer()
    lengths = torch.full((50,), 2)
    lengths[17] = 200
    channels = torch.randn(int(lengths.sum()), CHANNELS, dtype=torch.float64, requires_grad=True)
    steps = Steps.of(lengths)
    with Largest() as largest:
        gru(channels[steps.order_E], steps).sum().backward()
    assert largest.numel <= len(channels) * 3 * STATE  # padded, it would be 33 times as much
