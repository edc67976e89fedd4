"""Experts that tasks share, experts of one task, and the gates over both."""

# Shapes: B rows, I input width, E experts, H width of an expert's output, D width of a task's output, T tasks.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fullrank.layers.mlp import MLP, Float32Linear, OutputLayer


class ExpertMixture(nn.Module):
    """Σ_k softmax(W x)_k f_k: the gate's weights sum to 1 in every row."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.gate = Float32Linear(width, num_experts, bias=False)
        nn.init.xavier_normal_(self.gate.weight)

    def weights(self, x_BI: Tensor) -> Tensor:
        """Shape (B, E), rows summing to 1."""
        return torch.softmax(self.gate(x_BI), dim=1)

    def forward(self, x_BI: Tensor, outputs_BEH: Tensor) -> Tensor:
        return torch.bmm(self.weights(x_BI)[:, None], outputs_BEH).squeeze(1)


class ExtractionLevel(nn.Module):
    """Customised gate control: one input and one output per task, and one of each for the shared experts.

    The last level has no shared output. Without experts of its own a task's gate is that of MMoE.

    Args:
        expert_hidden: widths of an expert's MLP.
        num_shared: experts that all tasks share.
        num_own: further ones of each task.

    Source: Tang et al., Progressive Layered Extraction (PLE), RecSys 2020.
    """

    def __init__(
        self,
        width: int,
        expert_hidden: Sequence[int],
        num_tasks: int,
        *,
        num_shared: int,
        num_own: int,
        last: bool,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()

        def experts(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                MLP(width, expert_hidden, batch_norm=batch_norm, dropout=dropout) for _ in range(count)
            )

        self.shared = experts(num_shared)
        self.own = nn.ModuleList(experts(num_own) for _ in range(num_tasks))
        self.gates = nn.ModuleList(ExpertMixture(width, num_own + num_shared) for _ in range(num_tasks))
        everything = num_shared + num_tasks * num_own
        self.shared_gate = None if last else ExpertMixture(width, everything)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Inputs and outputs: one (B, I) per task, the shared one last."""
        shared = [expert(inputs[-1]).float() for expert in self.shared]
        own = [
            [expert(x_BI).float() for expert in experts]
            for experts, x_BI in zip(cast(Iterable[nn.ModuleList], self.own), inputs[:-1], strict=True)
        ]
        outputs = [
            gate(x_BI, torch.stack([*mine, *shared], 1))
            for gate, x_BI, mine in zip(self.gates, inputs[:-1], own, strict=True)
        ]
        if self.shared_gate is not None:
            everything = [output for mine in own for output in mine] + shared
            outputs.append(self.shared_gate(inputs[-1], torch.stack(everything, 1)))
        return outputs


class ExpertTower(nn.Module):
    """A vector for each task from levels of experts, side by side: shape (B, T·D).

    One level without experts of a task is MMoE; with one expert only, that is one MLP that all tasks share.

    Args:
        hidden: widths of an expert's MLP.
        output_dim: D.
    """

    def __init__(
        self,
        width: int,
        hidden: Sequence[int],
        output_dim: int,
        num_tasks: int,
        *,
        num_shared: int,
        num_own: int = 0,
        num_levels: int = 1,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            ExtractionLevel(
                width if level == 0 else hidden[-1],
                hidden,
                num_tasks,
                num_shared=num_shared,
                num_own=num_own,
                last=level == num_levels - 1,
            )
            for level in range(num_levels)
        )
        self.projections = nn.ModuleList(
            OutputLayer(hidden[-1], output_dim, normalized=False) for _ in range(num_tasks)
        )

    def forward(self, x_BI: Tensor) -> Tensor:
        streams = [x_BI] * (len(self.projections) + 1)
        for level in self.levels:
            streams = level(streams)
        return torch.cat([project(x_BH) for project, x_BH in zip(self.projections, streams, strict=True)], 1)
