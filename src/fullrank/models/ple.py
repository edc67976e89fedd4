"""PLE: levels of experts, some shared and some of one task; each task's gate sees its own and the shared ones."""

# Shapes: B rows, H width of an expert's output.

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.layers.experts import ExtractionLevel
from fullrank.layers.mlp import MLP
from fullrank.layers.tokens import FlatFeatures
from fullrank.models.base import BatchNorm, Dropout, Hidden, NonEmptyHidden, Ranker, RankerOutput
from fullrank.schema import Schema


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
            ExtractionLevel(
                width,
                config.expert_hidden,
                self.num_tasks,
                num_shared=config.num_shared_experts,
                num_own=config.num_task_experts,
                last=level == config.num_levels - 1,
                batch_norm=config.batch_norm,
                dropout=config.dropout,
            )
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
