"""Wukong: stacked factorisation machines; the order of interactions doubles with every layer."""

# Shapes: B rows, N tokens of a layer, D width, K rank, O output tokens, C compressed tokens.

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.layers.mlp import MLP
from fullrank.layers.token_projection import TokenProjection, project_tokens
from fullrank.layers.tokens import FeatureTokens
from fullrank.models.base import BatchNorm, Dropout, Hidden, InitStd, Ranker, RankerOutput
from fullrank.schema import Schema


def optimized_fm(tokens_BND: Tensor, mixed_BKD: Tensor) -> Tensor:
    """(X Xᵀ) Y as X (Xᵀ Y) of shape (B, N, K), where `mixed_BKD` is (Xᵀ Y)ᵀ: O(N·D·K), and no N x N matrix."""
    return torch.bmm(tokens_BND, mixed_BKD.transpose(1, 2))


class FactorizationMachineBlock(nn.Module):
    """reshape(MLP(norm(flatten(X (Xᵀ Y))))): (B, N, D) to (B, out_tokens, D).

    Args:
        rank: K, columns of Y.
        hidden: widths of the MLP's hidden layers; its output is linear.
        attentive: Y is made for each row, by an MLP with the same `hidden`, from K tokens that compress X.

    Deviation: public implementations start Y from N(0, 1), whose products grow with N; here from N(0, 1/N). They end
    the MLP with a ReLU; here it is linear, so that a block can subtract from what the residual carries.
    """

    def __init__(
        self, num_tokens: int, out_tokens: int, width: int, rank: int, hidden: Sequence[int], *, attentive: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("num_tokens", num_tokens), ("num_fm", out_tokens), ("width", width), ("rank", rank)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.rank, self.width = rank, width
        self.compress = TokenProjection(num_tokens, rank) if attentive else None
        y_KN = torch.randn(rank, num_tokens) * num_tokens**-0.5
        if attentive:
            self.make_hidden = MLP(rank * width, hidden)
            self.make_y = nn.Linear(self.make_hidden.out_features, rank * num_tokens)
            nn.init.xavier_normal_(self.make_y.weight, gain=num_tokens**-0.5)
            # Y starts near a matrix shared by all rows, as in the plain block, and learns to depend on the row.
            self.make_y.bias.data = y_KN.flatten()
        else:
            self.y_KN = nn.Parameter(y_KN)
        self.norm: nn.Module = nn.LayerNorm(num_tokens * rank)
        self.hidden = MLP(num_tokens * rank, hidden)
        self.out = nn.Linear(self.hidden.out_features, out_tokens * width)
        nn.init.xavier_normal_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def mixed(self, tokens_BND: Tensor) -> Tensor:
        """(Xᵀ Y)ᵀ of shape (B, K, D)."""
        if self.compress is None:
            return project_tokens(tokens_BND, self.y_KN)
        y: Tensor = self.make_y(self.make_hidden(self.compress(tokens_BND).flatten(1)))
        return torch.bmm(y.view(len(y), self.rank, -1), tokens_BND)

    def forward(self, tokens_BND: Tensor, mixed_BKD: Tensor | None = None) -> Tensor:
        """`mixed_BKD` saves its computation where the caller has it already."""
        if mixed_BKD is None:
            mixed_BKD = self.mixed(tokens_BND)
        products_BNK = optimized_fm(tokens_BND, mixed_BKD)
        out: Tensor = self.out(self.hidden(self.norm(products_BNK.flatten(1))))
        return out.view(len(out), -1, self.width)


class WukongLayer(nn.Module):
    """norm(concat(FMB(X), W_L X) + R(X)): (B, num_tokens, D) to (B, num_fm + num_linear, D).

    R is the identity where the number of tokens stays, else a linear map over the token axis.

    Args:
        num_fm: tokens of the factorisation machine block.
        num_linear: tokens of the linear compression block.
        rank, hidden, attentive: of the factorisation machine block.

    Raises:
        ValueError: if a size is below 1.
    """

    def __init__(
        self,
        num_tokens: int,
        num_fm: int,
        num_linear: int,
        width: int,
        rank: int,
        hidden: Sequence[int],
        *,
        attentive: bool = False,
    ) -> None:
        super().__init__()
        if num_linear < 1:
            raise ValueError(f"num_linear must be at least 1, got {num_linear}")
        self.num_fm, self.out_tokens = num_fm, num_fm + num_linear
        self.fm = FactorizationMachineBlock(num_tokens, num_fm, width, rank, hidden, attentive=attentive)
        self.linear = TokenProjection(num_tokens, num_linear)
        self.residual = None if num_tokens == self.out_tokens else TokenProjection(num_tokens, self.out_tokens)
        if self.residual is None:
            self.register_buffer("kept_LN", torch.eye(num_tokens)[num_fm:], persistent=False)
        self.norm: nn.Module = nn.LayerNorm(width)

    def _linear_map(self) -> Tensor:
        """W_L plus what R gives the linear tokens; if R is learned, below its rows for the other tokens."""
        weight_LN: Tensor = self.linear.weight_ON
        if self.residual is None:
            return weight_LN + self.get_buffer("kept_LN")
        return self.residual.weight_ON + F.pad(weight_LN, (0, 0, self.num_fm, 0))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        # All maps over the token axis are one product: Y joins W_L unless attentive, and R is part of its rows.
        weight_ON = self._linear_map()
        if self.fm.compress is None:
            both = project_tokens(tokens_BND, torch.cat([self.fm.y_KN, weight_ON]))
            mixed_BKD, mapped_BOD = torch.split(both, [self.fm.rank, len(weight_ON)], 1)
            fm_BFD = self.fm(tokens_BND, mixed_BKD)
        else:
            mapped_BOD, fm_BFD = project_tokens(tokens_BND, weight_ON), self.fm(tokens_BND)
        if self.residual is None:
            kept_BFD, linear_BLD = tokens_BND[:, : self.num_fm], mapped_BOD
        else:
            kept_BFD, linear_BLD = torch.split(mapped_BOD, [self.num_fm, self.out_tokens - self.num_fm], 1)
        out_BOD = torch.cat([fm_BFD + kept_BFD, linear_BLD], 1)
        normed: Tensor = self.norm(out_BOD)
        return normed


class Wukong(Ranker):
    """A stack of `WukongLayer`s on feature tokens, then an MLP on the last layer's tokens side by side."""

    name = "wukong"
    source = "Zhang et al., Wukong: Towards a Scaling Law for Large-Scale Recommendation, ICML 2024"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            num_layers: each doubles the order of interactions.
            num_fm: tokens that a layer's factorisation machine block gives.
            num_linear: tokens that its linear compression block gives.
            rank: columns of Y in X (Xᵀ Y).
            fm_hidden: hidden widths of the MLP in each factorisation machine block.
            attentive: make Y for each row.
            number_tokens: tokens that all numbers together give through an MLP; 0 for a token x·v per number.
            number_hidden: hidden widths of that MLP.
            hidden: widths of the MLP above the stack.
        """

        embedding_init: InitStd = 0.001
        num_layers: int = Field(default=3, ge=1)
        num_fm: int = Field(default=16, ge=1)
        num_linear: int = Field(default=16, ge=1)
        rank: int = Field(default=8, ge=1)
        fm_hidden: Hidden = (128,)
        attentive: bool = False
        number_tokens: int = Field(default=1, ge=0)
        number_hidden: Hidden = (128,)
        hidden: Hidden = (256, 128, 64)
        batch_norm: BatchNorm = False
        dropout: Dropout = 0.0

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.tokens = FeatureTokens(
            schema,
            config.embeddings,
            number_tokens=config.number_tokens,
            number_hidden=config.number_hidden,
        )
        tokens, layers = self.tokens.num_tokens, []
        for _ in range(config.num_layers):
            layer = WukongLayer(
                tokens,
                config.num_fm,
                config.num_linear,
                config.embedding_dim,
                config.rank,
                config.fm_hidden,
                attentive=config.attentive,
            )
            layers.append(layer)
            tokens = layer.out_tokens
        self.layers = nn.Sequential(*layers)
        self.head = MLP(
            tokens * config.embedding_dim,
            config.hidden,
            self.num_tasks,
            batch_norm=config.batch_norm,
            dropout=config.dropout,
            normalized=True,
        )

    def output_biases(self) -> list[Tensor]:
        return [self.head.output_bias]

    def forward(self, batch: Batch) -> RankerOutput:
        return RankerOutput(self.head(self.layers(self.tokens(batch)).flatten(1)))
