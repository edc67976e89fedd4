"""MMoE: experts shared by all tasks, mixed by a gate of each task."""

# Shapes: B rows, E experts, H width of an expert's output, T tasks.

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.layers.experts import ExpertMixture
from fullrank.layers.mlp import MLP
from fullrank.layers.tokens import FlatFeatures
from fullrank.models.base import BatchNorm, Dropout, Hidden, NonEmptyHidden, Ranker, RankerOutput
from fullrank.schema import Schema


class MMoE(Ranker):
    """y_t = tower_t(Σ_k g_tk(x) f_k(x)), g_t = softmax(W_t x)."""

    name = "mmoe"
    source = "Ma et al., Modeling Task Relationships in Multi-task Learning with MMoE, KDD 2018"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            num_experts: experts that all tasks share.
            expert_hidden: widths of an expert's MLP.
            hidden: widths of each task's tower.
        """

        num_experts: int = Field(default=4, ge=1)
        expert_hidden: NonEmptyHidden = (128, 64)
        hidden: Hidden = (32,)
        batch_norm: BatchNorm = False
        dropout: Dropout = 0.0

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.features = FlatFeatures(schema, config.embeddings)
        width = self.features.width
        options: dict[str, Any] = {"batch_norm": config.batch_norm, "dropout": config.dropout}
        self.experts = nn.ModuleList(MLP(width, config.expert_hidden, **options) for _ in range(config.num_experts))
        self.gates = nn.ModuleList(ExpertMixture(width, config.num_experts) for _ in range(self.num_tasks))
        self.towers = nn.ModuleList(
            MLP(config.expert_hidden[-1], config.hidden, 1, **options) for _ in range(self.num_tasks)
        )

    def output_biases(self) -> list[Tensor]:
        return [tower.output_bias for tower in cast(Iterable[MLP], self.towers)]

    def forward(self, batch: Batch) -> RankerOutput:
        x_BI = self.features(batch)
        outputs_BEH = torch.stack([expert(x_BI).float() for expert in self.experts], 1)
        logits = [tower(gate(x_BI, outputs_BEH)) for gate, tower in zip(self.gates, self.towers, strict=True)]
        return RankerOutput(torch.cat(logits, 1))
