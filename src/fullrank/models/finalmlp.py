"""FinalMLP: two MLPs on differently gated copies of the input, fused by a multi-head bilinear form."""

# Shapes: B rows, I width of the flat input, T tasks, H heads, X and Y width of a head of either stream.

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, Tables
from fullrank.layers.mlp import MLP, OutputLayer
from fullrank.layers.tokens import FlatFeatures
from fullrank.models.base import BatchNorm, Dropout, Hidden, NonEmptyHidden, Ranker, RankerOutput
from fullrank.schema import Schema


class FeatureGate(nn.Module):
    """2σ(MLP(context)): how much each input number counts; the context is some features' own vectors, or a bias."""

    def __init__(
        self,
        schema: Schema,
        context: tuple[str, ...],
        width: int,
        hidden: tuple[int, ...],
        tables: Tables,
    ) -> None:
        super().__init__()
        names = {feature.name for feature in schema.features}
        for name in context:
            if name not in names:
                raise ValueError(f'gate context "{name}" is not a feature of the schema')
        self.context: EmbeddingCollection | None = None
        if context:
            chosen = schema.model_copy(update={"features": tuple(f for f in schema.categorical if f.name in context)})
            if len(chosen.features) != len(context):
                raise ValueError(f"gate contexts {context} must be single-id features")
            # The ids are those of the features, which are checked there.
            self.context = EmbeddingCollection(chosen, tables, check_ids=False)
            columns = [[f.name for f in schema.categorical].index(f.name) for f in chosen.categorical]
            self.register_buffer("columns", torch.tensor(columns), persistent=False)
            size = self.context.flat_dim
        else:
            size = tables.embedding_dim
            self.bias_1D = nn.Parameter(torch.zeros(1, size))
        self.mlp = MLP(size, hidden, width)

    def forward(self, batch: Batch) -> Tensor:
        if self.context is None:
            context: Tensor = self.bias_1D
        else:
            ids = batch.ids_BF.index_select(1, self.get_buffer("columns"))
            context = self.context(replace(batch, ids_BF=ids)).flat
        return 2 * torch.sigmoid(self.mlp(context))


class BilinearFusion(nn.Module):
    """z_t = b_t + w_xtᵀ x + w_ytᵀ y + Σ_h x_hᵀ W_th y_h for each of T tasks."""

    def __init__(self, x_dim: int, y_dim: int, num_heads: int, num_tasks: int = 1, *, normalized: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_x = OutputLayer(x_dim, num_tasks, normalized=normalized)
        self.linear_y = OutputLayer(y_dim, num_tasks, normalized=normalized)
        self.bilinear_THXY = nn.Parameter(torch.zeros(num_tasks, num_heads, x_dim // num_heads, y_dim // num_heads))
        if not normalized:
            for task in self.bilinear_THXY.data:
                # As one layer from all products x_i y_j to one logit, like the authors' code.
                nn.init.xavier_normal_(task.view(1, -1))

    def forward(self, x_BI: Tensor, y_BI: Tensor) -> Tensor:
        """logits_BT."""
        pairs = [(self._mapped(x_BI, task_HXY).float() * y_BI.float()).sum(1) for task_HXY in self.bilinear_THXY]
        logits_BT: Tensor = self.linear_x(x_BI) + self.linear_y(y_BI) + torch.stack(pairs, 1)
        return logits_BT

    def _mapped(self, x_BI: Tensor, weight_HXY: Tensor) -> Tensor:
        if self.num_heads == 1:
            return x_BI @ weight_HXY[0]
        x_HBX = x_BI.view(x_BI.shape[0], self.num_heads, -1).transpose(0, 1)
        return torch.bmm(x_HBX, weight_HXY.to(x_HBX.dtype)).transpose(0, 1).flatten(1)


class FinalMLP(Ranker):
    """Two-stream MLP; tasks share the streams and have a fusion each."""

    name = "finalmlp"
    source = "Mao et al., FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction, AAAI 2023"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            hidden1, hidden2: widths of either stream's MLP.
            dropout1, dropout2: of either stream.
            gate_hidden: widths of the gates' MLPs; empty for no gates.
            context1, context2: single-id features that steer the gate of either stream; with none it is a constant.
            num_heads: blocks of the bilinear form that joins the streams; each width must divide by it.
        """

        hidden1: NonEmptyHidden = (256, 128, 64)
        hidden2: NonEmptyHidden = (256, 128, 64)
        dropout1: Dropout = 0.0
        dropout2: Dropout = 0.0
        batch_norm: BatchNorm = False
        gate_hidden: Hidden = (64,)
        context1: tuple[str, ...] = ()
        context2: tuple[str, ...] = ()
        num_heads: int = Field(default=1, ge=1)

        @model_validator(mode="after")
        def _heads_divide(self) -> Self:
            for name, hidden in (("hidden1", self.hidden1), ("hidden2", self.hidden2)):
                if not hidden or hidden[-1] % self.num_heads:
                    raise ValueError(
                        f"the last width of {name} {hidden} is not divisible by num_heads {self.num_heads}"
                    )
            return self

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.features = FlatFeatures(schema, config.embeddings)
        width = self.features.width

        def gate(context: tuple[str, ...]) -> FeatureGate | None:
            if not config.gate_hidden:
                return None
            return FeatureGate(schema, context, width, config.gate_hidden, config.embeddings)

        self.gate1, self.gate2 = gate(config.context1), gate(config.context2)
        self.mlp1 = MLP(width, config.hidden1, batch_norm=config.batch_norm, dropout=config.dropout1)
        self.mlp2 = MLP(width, config.hidden2, batch_norm=config.batch_norm, dropout=config.dropout2)
        self.fusion = BilinearFusion(
            config.hidden1[-1], config.hidden2[-1], config.num_heads, self.num_tasks, normalized=config.batch_norm
        )

    def output_biases(self) -> list[Tensor]:
        return [self.fusion.linear_x.bias]

    def forward(self, batch: Batch) -> RankerOutput:
        x_BI = self.features(batch)
        x1_BI = x_BI if self.gate1 is None else x_BI * self.gate1(batch)
        x2_BI = x_BI if self.gate2 is None else x_BI * self.gate2(batch)
        return RankerOutput(self.fusion(self.mlp1(x1_BI), self.mlp2(x2_BI)).float())
