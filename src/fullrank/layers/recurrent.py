"""GRU over histories of different lengths, with or without an attention that scales its updates."""

# Shapes: B rows, E events of all rows together, N rows still running at a step, C channels of an event, H width of the
# state.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fullrank.embeddings.segments import segment_softmax


@dataclass(frozen=True)
class Steps:
    """Events in the order in which a recurrence needs them: all first events, then all second ones, ...

    Longer histories come first within a step, so the rows that go on to the next step are the first ones of this step
    and no step touches padding.

    Attributes:
        order_E: place of each event in row-after-row order.
        row_E: row of each event.
        counts: rows that have a first, second, ... event; never increasing.
        previous: for the events after the first step, the place of the event before each, in this order.
        last_B: place of each row's last event, in this order; 0 for an empty row.
        empty_B: rows without events.
    """

    order_E: Tensor
    row_E: Tensor
    counts: list[int]
    previous: Tensor
    last_B: Tensor
    empty_B: Tensor

    @classmethod
    def of(cls, lengths_B: Tensor) -> Steps:
        device = lengths_B.device
        sorted_B, rank_to_row_B = lengths_B.sort(descending=True, stable=True)
        longest = int(sorted_B[0]) if lengths_B.numel() else 0
        # Rows with more than t events, for t = 0, 1, ...
        step_T = torch.arange(longest, device=device)
        count_T = torch.searchsorted(-sorted_B, -step_T, right=False)
        total = int(count_T.sum())
        begin_T = count_T.cumsum(0) - count_T
        step_E = torch.repeat_interleave(step_T, count_T, output_size=total)
        place_E = torch.arange(total, device=device)
        rank_E = place_E - begin_T[step_E]
        row_E = rank_to_row_B[rank_E]
        begin_B = lengths_B.cumsum(0) - lengths_B
        first = int(count_T[0]) if longest else 0
        rank_B = torch.empty_like(rank_to_row_B)
        rank_B[rank_to_row_B] = torch.arange(lengths_B.numel(), device=device)
        last_B = begin_T[(lengths_B - 1).clamp_min(0)] + rank_B if longest else torch.zeros_like(lengths_B)
        empty_B = lengths_B == 0
        return cls(
            order_E=begin_B[row_E] + step_E,
            row_E=row_E,
            counts=count_T.tolist(),
            previous=(place_E - count_T[step_E - 1])[first:],
            last_B=last_B.masked_fill(empty_B, 0),
            empty_B=empty_B,
        )

    def last(self, states_EH: Tensor) -> Tensor:
        """Each row's last state, shape (B, H); zero for an empty row."""
        if not self.counts:
            return states_EH.new_zeros(len(self.last_B), states_EH.shape[1])
        return states_EH.index_select(0, self.last_B).masked_fill(self.empty_B[:, None], 0.0)

    def softmax(self, score_E: Tensor) -> Tensor:
        """Softmax over the events of each row."""
        return segment_softmax(score_E, self.row_E, self.last_B.numel())


class AttentionalGRU(nn.Module):
    """GRU with attentional update gate (AUGRU), from a zero state:

        r_t = σ(W_r x_t + U_r h_{t-1} + b_r),   u_t = a_t σ(W_u x_t + U_u h_{t-1} + b_u),
        n_t = tanh(W_n x_t + b_n + r_t ⊙ (U_n h_{t-1} + c_n)),   h_t = (1 - u_t) ⊙ h_{t-1} + u_t ⊙ n_t

    with a scalar a_t per event; a_t = 1 is a GRU. Works step by step on the rows that have an event there (`Steps`).
    The state is float32 also under autocast, which only the products with x follow.

    Deviation: the authors multiply r_t with h_{t-1} before the product with U_n; here after it, as cuDNN and
    `torch.nn.GRU` do, which leaves one matrix product a step instead of two in a row.

    Source: Zhou et al., Deep Interest Evolution Network for Click-Through Rate Prediction, AAAI 2019, equations 2 to 5
    and 16.
    """

    def __init__(self, width: int, state: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 3 * state)
        self.recurrent_3HH = nn.Parameter(torch.empty(3 * state, state))
        self.candidate_bias_H = nn.Parameter(torch.zeros(state))
        for part in self.input.weight.chunk(3):
            nn.init.xavier_uniform_(part)
        for part in self.recurrent_3HH.chunk(3):
            nn.init.orthogonal_(part)
        nn.init.zeros_(self.input.bias)

    def forward(self, events_EC: Tensor, steps: Steps, attention_E: Tensor | None = None) -> Tensor:
        """States after each event, shape (E, H); events, attention and states in the order of `steps`."""
        gates_E3H = self.input(events_EC).to(self.recurrent_3HH.dtype)
        states_EH: Tensor = _recur(gates_E3H, self.recurrent_3HH, self.candidate_bias_H, attention_E, steps)
        return states_EH


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a loop whose number of steps is data
def _recur(
    gates_E3H: Tensor, recurrent_3HH: Tensor, bias_H: Tensor, attention_E: Tensor | None, steps: Steps
) -> Tensor:
    states: Tensor = _Recurrence.apply(gates_E3H, recurrent_3HH, bias_H, attention_E, steps)  # type: ignore[no-untyped-call]
    return states


class _Recurrence(torch.autograd.Function):
    """The loop over steps. All that does not depend on the step before it is done once for all events.

    In the backward loop every gradient of a step is g = ∂/∂h_t times a factor that the forward pass fixes:
        ∂/∂n' = g f_n,  ∂/∂r' = g f_r,  ∂/∂u' = g f_u,  ∂/∂(U_n h + c) = g f_n r   (primes: before the activation)
    and h_{t-1} receives g (1 - u) + [∂r', ∂u', ∂(U_n h + c)] U.
    """

    @staticmethod
    def forward(
        ctx: Any, gates_E3H: Tensor, recurrent_3HH: Tensor, bias_H: Tensor, attention_E: Tensor | None, steps: Steps
    ) -> Tensor:
        events, width = gates_E3H.shape[0], recurrent_3HH.shape[1]
        with torch.autocast(gates_E3H.device.type, enabled=False):
            # [r, u], then U_n h + c, then n, step after step; the first step has no state behind it.
            gates_E2H = gates_E3H[:, : 2 * width].contiguous()
            inner_EH = bias_H.expand(events, width).contiguous()
            cand_EH = gates_E3H[:, 2 * width :].contiguous()
            states_EH = torch.empty_like(cand_EH)
            weight_gates, weight_cand = recurrent_3HH[: 2 * width].t(), recurrent_3HH[2 * width :].t()
            update_EH = torch.empty_like(cand_EH) if attention_E is not None else gates_E2H[:, width:]
            before = cand_EH.new_zeros(steps.counts[0] if steps.counts else 0, width)
            begin = 0
            for count in steps.counts:
                here = slice(begin, begin + count)
                before = before[:count]
                gates, inner, cand = gates_E2H[here], inner_EH[here], cand_EH[here]
                if begin:
                    torch.addmm(gates, before, weight_gates, out=gates)
                    torch.addmm(inner, before, weight_cand, out=inner)
                gates.sigmoid_()
                cand.addcmul_(gates[:, :width], inner).tanh_()
                if attention_E is not None:
                    torch.mul(gates[:, width:], attention_E[here, None], out=update_EH[here])
                torch.lerp(before, cand, update_EH[here], out=states_EH[here])
                before = states_EH[here]
                begin += count
        ctx.save_for_backward(gates_E2H, inner_EH, cand_EH, states_EH, recurrent_3HH, attention_E)
        ctx.steps = steps
        return states_EH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_EH: Tensor) -> tuple[Tensor | None, ...]:
        gates_E2H, inner_EH, cand_EH, states_EH, recurrent_3HH, attention_E = ctx.saved_tensors
        steps: Steps = ctx.steps
        width = cand_EH.shape[1]
        first = steps.counts[0] if steps.counts else 0
        reset_EH, open_EH = gates_E2H[:, :width], gates_E2H[:, width:]
        before_EH = torch.cat([states_EH.new_zeros(first, width), states_EH.index_select(0, steps.previous)])
        moved_EH = cand_EH - before_EH
        update_EH = open_EH if attention_E is None else open_EH * attention_E[:, None]
        factor_n_EH = update_EH * (1 - cand_EH.square())
        factors_E3H = torch.empty(len(cand_EH), 3, width, dtype=cand_EH.dtype, device=cand_EH.device)
        torch.mul(factor_n_EH * inner_EH, reset_EH * (1 - reset_EH), out=factors_E3H[:, 0])
        torch.mul(moved_EH * update_EH, 1 - open_EH, out=factors_E3H[:, 1])
        torch.mul(factor_n_EH, reset_EH, out=factors_E3H[:, 2])
        kept_EH = 1 - update_EH
        total_EH = grad_EH.contiguous().clone()
        end, carry = len(total_EH), None
        for index in range(len(steps.counts) - 1, -1, -1):
            count = steps.counts[index]
            here = slice(end - count, end)
            end -= count
            grad = total_EH[here]
            if carry is not None:
                grad[: len(carry)] += carry
            into_3H = factors_E3H[here].mul_(grad[:, None]).flatten(1)
            if index:
                carry = torch.addmm(grad * kept_EH[here], into_3H, recurrent_3HH)
        hidden_E3H = factors_E3H.flatten(1)
        grad_recurrent = hidden_E3H[first:].t() @ before_EH[first:]  # the state before the first event is 0
        grad_bias = factors_E3H[:, 2].sum(0)
        grad_attention = None
        if attention_E is not None:
            grad_attention = (total_EH * moved_EH * open_EH).sum(1)
        torch.mul(factor_n_EH, total_EH, out=factors_E3H[:, 2])
        return hidden_E3H, grad_recurrent, grad_bias, grad_attention, None
