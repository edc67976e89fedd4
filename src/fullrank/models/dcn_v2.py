"""DCN-V2: explicit crosses x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l, beside or below an MLP."""

# Shapes: B rows, I width of the flat input, E experts, R rank.

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.layers.crosses import CrossNetwork
from fullrank.layers.mlp import MLP, OutputLayer
from fullrank.layers.tokens import FlatFeatures
from fullrank.models.base import BatchNorm, Dropout, Hidden, Ranker, RankerOutput
from fullrank.schema import Schema


class LowRankCrossNetwork(nn.Module):
    """Mixture of low-rank crosses: Σ_k g_k(x_l) · x_0 ⊙ (U_k tanh(C_k tanh(V_kᵀ x_l)) + b_l) + x_l."""

    def __init__(self, width: int, num_layers: int, rank: int, num_experts: int) -> None:
        super().__init__()
        shape = (num_layers, num_experts)
        self.v_LEIR = nn.Parameter(torch.empty(*shape, width, rank))
        self.c_LERR = nn.Parameter(torch.empty(*shape, rank, rank))
        self.u_LERI = nn.Parameter(torch.empty(*shape, rank, width))
        for weight in (self.v_LEIR, self.c_LERR, self.u_LERI):
            for layer in weight.data:
                for expert in layer:
                    nn.init.xavier_normal_(expert)
        self.bias_LI = nn.Parameter(torch.zeros(num_layers, width))
        self.gates_EI = nn.Parameter(torch.empty(num_experts, width))
        nn.init.xavier_normal_(self.gates_EI)

    def forward(self, x0_BI: Tensor) -> Tensor:
        x_BI = x0_BI
        for v_EIR, c_ERR, u_ERI, bias_I in zip(self.v_LEIR, self.c_LERR, self.u_LERI, self.bias_LI, strict=True):
            inner_EBR = torch.tanh(torch.matmul(x_BI, v_EIR))
            inner_EBR = torch.tanh(torch.bmm(inner_EBR, c_ERR))
            out_EBI = torch.bmm(inner_EBR, u_ERI) + bias_I
            gate_BE = torch.softmax(x_BI @ self.gates_EI.T, dim=1)
            mixed_BI = torch.einsum("be,ebi->bi", gate_BE.to(out_EBI.dtype), out_EBI)
            x_BI = torch.addcmul(x_BI, x0_BI, mixed_BI.to(x0_BI.dtype))
        return x_BI


class DCNv2(Ranker):
    """Deep and cross network, second version, in its four structures."""

    name = "dcn_v2"
    source = "Wang et al., DCN V2: Improved Deep & Cross Network, WWW 2021"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            structure: the crosses alone, an MLP above them, one beside them, or both.
            num_cross_layers: each raises the order of the products by one.
            low_rank: rank R of the mixture of low-rank crosses; 0 for full matrices.
            num_experts: low-rank crosses that a layer mixes.
            hidden: widths of the MLP beside the crosses.
            stacked_hidden: widths of the MLP above the crosses; default `hidden`.
        """

        structure: Literal["crossnet_only", "stacked", "parallel", "stacked_parallel"] = "parallel"
        num_cross_layers: int = Field(default=3, ge=1)
        low_rank: int = Field(default=0, ge=0)
        num_experts: int = Field(default=4, ge=1)
        hidden: Hidden = (256, 128, 64)
        stacked_hidden: Hidden | None = None
        batch_norm: BatchNorm = False
        dropout: Dropout = 0.0

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.features = FlatFeatures(schema, config.embeddings)
        width = self.features.width
        self.cross: nn.Module = (
            LowRankCrossNetwork(width, config.num_cross_layers, config.low_rank, config.num_experts)
            if config.low_rank
            else CrossNetwork(width, config.num_cross_layers)
        )
        options: dict[str, Any] = {"batch_norm": config.batch_norm, "dropout": config.dropout}
        parallel = config.structure in ("parallel", "stacked_parallel")
        stacked = config.structure in ("stacked", "stacked_parallel")
        self.parallel = MLP(width, config.hidden, **options) if parallel else None
        self.stacked = MLP(width, config.stacked_hidden or config.hidden, **options) if stacked else None
        top = self.stacked.out_features if self.stacked else width
        self.head = OutputLayer(
            top + (self.parallel.out_features if self.parallel else 0),
            self.num_tasks,
            normalized=config.batch_norm and config.structure != "crossnet_only",
        )

    def output_biases(self) -> list[Tensor]:
        return [self.head.bias]

    def forward(self, batch: Batch) -> RankerOutput:
        x_BI = self.features(batch)
        top = self.cross(x_BI)
        if self.stacked is not None:
            top = self.stacked(top)
        if self.parallel is not None:
            top = torch.cat([top.float(), self.parallel(x_BI).float()], 1)
        return RankerOutput(self.head(top))
