"""PLE: levels of experts, some shared and some of one task; each task's gate sees its own and the shared ones."""

# Shapes: B rows, I width of the flat input, E experts, H width of an expert's output.

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.layers.experts import ExpertMixture
from fullrank.layers.mlp import MLP
from fullrank.layers.tokens import FlatFeatures
from fullrank.models.base import BatchNorm, Dropout, Hidden, NonEmptyHidden, Ranker, RankerOutput
from fullrank.schema import Schema


class _Level(nn.Module):
    """Customised gate control: one input and one output per task, and one of each for the shared experts.

    The last level has no shared output.
    """

    def __init__(self, width: int, config: PLE.Config, num_tasks: int, *, last: bool) -> None:
        super().__init__()

        def experts(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                MLP(width, config.expert_hidden, batch_norm=config.batch_norm, dropout=config.dropout)
                for _ in range(count)
            )

        self.shared = experts(config.num_shared_experts)
        self.own = nn.ModuleList(experts(config.num_task_experts) for _ in range(num_tasks))
        each = config.num_task_experts + config.num_shared_experts
        self.gates = nn.ModuleList(ExpertMixture(width, each) for _ in range(num_tasks))
        everything = config.num_shared_experts + num_tasks * config.num_task_experts
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


class PLE(Ranker):
    """Progressive layered extraction; with one level and no task experts it is MMoE."""

    name = "ple"
    source = "Tang et al., Progressive Layered Extraction (PLE), RecSys 2020"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            num_levels: levels of experts.
            num_shared_experts: experts of a level that all tasks share.
            num_task_experts: further ones of each task.
            expert_hidden: widths of an expert's MLP.
            hidden: widths of each task's tower.
        """

        num_levels: int = Field(default=2, ge=1)
        num_shared_experts: int = Field(default=2, ge=1)
        num_task_experts: int = Field(default=2, ge=0)
        expert_hidden: NonEmptyHidden = (128, 64)
        hidden: Hidden = (32,)
        batch_norm: BatchNorm = False
        dropout: Dropout = 0.0

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.features = FlatFeatures(schema, config.embeddings)
        widths = [self.features.width] + [config.expert_hidden[-1]] * (config.num_levels - 1)
        self.levels = nn.ModuleList(
            _Level(width, config, self.num_tasks, last=level == config.num_levels - 1)
            for level, width in enumerate(widths)
        )
        self.towers = nn.ModuleList(
            MLP(config.expert_hidden[-1], config.hidden, 1, batch_norm=config.batch_norm, dropout=config.dropout)
            for _ in range(self.num_tasks)
        )

    def output_biases(self) -> list[Tensor]:
        return [tower.output_bias for tower in cast(Iterable[MLP], self.towers)]

    def forward(self, batch: Batch) -> RankerOutput:
        streams = [self.features(batch)] * (self.num_tasks + 1)
        for level in self.levels:
            streams = level(streams)
        logits = [tower(x_BH) for tower, x_BH in zip(self.towers, streams, strict=True)]
        return RankerOutput(torch.cat(logits, 1))
