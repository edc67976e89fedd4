"""AutoInt+: self-attention over feature tokens, beside an MLP."""

# Shapes: B rows, F tokens, D token width, A attention width, H heads.

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.layers.linear_term import LinearTerms
from fullrank.layers.mlp import MLP, OutputLayer
from fullrank.layers.tokens import FeatureTokens
from fullrank.models.base import BatchNorm, Dropout, Hidden, Ranker, RankerOutput
from fullrank.schema import Schema


class InteractingLayer(nn.Module):
    """Multi-head self-attention over tokens with a residual: relu(norm(attention(x) + W x))."""

    def __init__(self, width: int, attention_dim: int, num_heads: int, *, layer_norm: bool, scale: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * attention_dim, bias=False)
        self.residual = nn.Identity() if width == attention_dim else nn.Linear(width, attention_dim, bias=False)
        self.norm = nn.LayerNorm(attention_dim) if layer_norm else nn.Identity()
        self.scale = (attention_dim // num_heads) ** -0.5 if scale else 1.0
        for part in self.query_key_value.weight.data.chunk(3):
            nn.init.xavier_normal_(part)
        if isinstance(self.residual, nn.Linear):
            nn.init.xavier_normal_(self.residual.weight)

    def forward(self, tokens_BFD: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in self.query_key_value(tokens_BFD).chunk(3, dim=2)
        )
        mixed_BHFA = torch.softmax(query @ key.transpose(2, 3) * self.scale, dim=3) @ value
        mixed_BFA = mixed_BHFA.transpose(1, 2).flatten(2)
        return F.relu(self.norm(mixed_BFA + self.residual(tokens_BFD)))


class AutoInt(Ranker):
    """Automatic feature interaction learning; with an empty `hidden` the plain AutoInt."""

    name = "autoint"
    source = "Song et al., AutoInt: Automatic Feature Interaction Learning via Self-Attentive Networks, CIKM 2019"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            attention_dim: width of a layer's tokens, all heads together.
            num_layers: attention layers.
            num_heads: heads of each.
            layer_norm: normalise what a layer gives.
            scale: divide attention scores by the square root of a head's width (the paper does not).
            wide: add a first-order term.
            hidden: widths of the MLP beside the attention; empty for none.
        """

        attention_dim: int = Field(default=64, ge=1)
        num_layers: int = Field(default=2, ge=1)
        num_heads: int = Field(default=2, ge=1)
        layer_norm: bool = False
        scale: bool = False
        wide: bool = False
        hidden: Hidden = (256, 128, 64)
        batch_norm: BatchNorm = False
        dropout: Dropout = 0.0

        @model_validator(mode="after")
        def _heads_divide(self) -> Self:
            if self.attention_dim % self.num_heads:
                raise ValueError(f"attention_dim {self.attention_dim} is not divisible by num_heads {self.num_heads}")
            return self

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.tokens = FeatureTokens(schema, config.embeddings)
        widths = [config.embedding_dim] + [config.attention_dim] * config.num_layers
        self.attention = nn.Sequential(
            *(
                InteractingLayer(
                    w, config.attention_dim, config.num_heads, layer_norm=config.layer_norm, scale=config.scale
                )
                for w in widths[:-1]
            )
        )
        self.head = OutputLayer(
            self.tokens.num_tokens * config.attention_dim, self.num_tasks, normalized=config.layer_norm
        )
        flat = self.tokens.num_tokens * config.embedding_dim
        options: dict[str, Any] = {"batch_norm": config.batch_norm, "dropout": config.dropout}
        self.mlp = MLP(flat, config.hidden, self.num_tasks, **options) if config.hidden else None
        self.linear = LinearTerms(schema, config.embeddings, bias=False) if config.wide else None

    def output_biases(self) -> list[Tensor]:
        return [self.head.bias]

    def forward(self, batch: Batch) -> RankerOutput:
        tokens_BFD = self.tokens(batch)
        logits_BT: Tensor = self.head(self.attention(tokens_BFD).flatten(1))
        if self.mlp is not None:
            logits_BT = logits_BT + self.mlp(tokens_BFD.flatten(1))
        if self.linear is not None:
            logits_BT = logits_BT + self.linear(batch)
        return RankerOutput(logits_BT.float())
