"""InterFormer: feature tokens and behaviour sequences that exchange small summaries at every layer."""

# Shapes: B rows, N feature tokens, T tokens of a sequence (C summary tokens, then L events), D width, M tokens of a
# summary, S summary tokens of the features, K most recent events, P rotary pairs of all heads.

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.layers.attention import (
    MultiHeadAttention,
    PoolingByMultiheadAttention,
    positions_from_latest,
    require_heads,
    rotary_frequencies,
    turns,
)
from fullrank.layers.histories import FeaturesAndHistories, latest
from fullrank.layers.mlp import MLP
from fullrank.layers.token_pairs import TokenPairs
from fullrank.layers.token_projection import FlatToTokens, TokenProjection
from fullrank.models.base import BatchNorm, Dropout, Hidden, InitStd, Ranker, RankerOutput
from fullrank.models.dhen import INTERACTIONS, DHENLayer, build_interaction
from fullrank.schema import Schema
from fullrank.schema import Sequence as HistoryFeature

Flow = Literal["int", "n2s", "s2n", "sep", "sole"]
Gate = Literal["self_gate", "paper", "none"]
Weights = Literal["token_mlp", "token_linear", "flatten_mlp", "two_layer"]
# The ensemble that the authors use as interaction.
DHEN_MODULES = ("dlrm", "dcn")


class SelfGating(nn.Module):
    """Lets a summary decide how much of each of its numbers passes on.

    `self_gate` is x ⊙ σ(W x + b). `paper` is silu(x ⊙ (W x + b)), the printed form with the activation that the paper
    names; with a sigmoid outside, sign and scale would be lost.

    Deviation: the default is `self_gate`, which is what the published formula's text describes.
    """

    def __init__(self, width: int, kind: Gate) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(width, width) if kind != "none" else None

    def forward(self, x_BMD: Tensor) -> Tensor:
        if self.linear is None:
            return x_BMD
        gate_BMD: Tensor = self.linear(x_BMD)
        if self.kind == "self_gate":
            return x_BMD * torch.sigmoid(gate_BMD)
        gated_BMD: Tensor = F.silu(x_BMD * gate_BMD)
        return gated_BMD


class PersonalizedFFN(nn.Module):
    """PFFN(X_sum, S) = S · f(X_sum): every row has a full D x D matrix of its own, applied to all its events.

    `token_mlp` makes the matrix from the token axis, f = W2 silu(W1 X_sum) / √D with S·h + h·D weights;
    `token_linear` is the appendix's X_sumᵀ W; `flatten_mlp` maps the flat summary to D² numbers; `two_layer` is
    norm(norm(gelu(S W1 + b1)) W2 + b2) with both matrices made per row.
    """

    def __init__(self, num_summary: int, width: int, kind: Weights, *, hidden: int = 32) -> None:
        super().__init__()
        self.kind, self.width, self.hidden = kind, width, hidden
        self.scale = width**-0.5
        if kind == "token_linear":
            self.make = nn.Sequential(nn.Linear(num_summary, width, bias=False))
        elif kind == "token_mlp":
            self.make = nn.Sequential(nn.Linear(num_summary, hidden), nn.SiLU(), nn.Linear(hidden, width))
        elif kind == "flatten_mlp":
            flat = num_summary * width
            self.make = nn.Sequential(nn.Linear(flat, hidden), nn.SiLU(), nn.Linear(hidden, width * width))
        else:
            self.make = nn.Sequential(nn.Linear(num_summary, 2 * hidden))
            self.bias_1 = nn.Parameter(torch.zeros(hidden))
            self.bias_2 = nn.Parameter(torch.zeros(width))
            self.inner_norm, self.outer_norm = nn.RMSNorm(hidden), nn.RMSNorm(width)

    def matrix(self, summary_BSD: Tensor) -> Tensor:
        """f(X_sum), shape (B, D, D); for `two_layer` W1 and W2ᵀ side by side, (B, D, 2·hidden)."""
        if self.kind == "flatten_mlp":
            made: Tensor = self.make(summary_BSD.flatten(1)).view(-1, self.width, self.width)
        else:
            made = self.make(summary_BSD.transpose(1, 2))
        matrix: Tensor = made * self.scale
        return matrix

    def forward(self, summary_BSD: Tensor, events_BTD: Tensor) -> Tensor:
        matrix = self.matrix(summary_BSD)
        if self.kind != "two_layer":
            return torch.bmm(events_BTD, matrix)
        first_BDH, second_BDH = matrix.chunk(2, dim=2)
        inner_BTH = self.inner_norm(F.gelu(torch.bmm(events_BTD, first_BDH) + self.bias_1))
        outer_BTD: Tensor = self.outer_norm(torch.bmm(inner_BTH, second_BDH.transpose(1, 2)) + self.bias_2)
        return outer_BTD


class MaskNetFusion(nn.Module):
    """The channels of an event as one vector: W (s ⊙ mask(s)) with a two-layer mask; the identity for one channel.

    The mask starts around 1 and W without bias, so that the ids and not two biases are what the layers above first see.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mask: nn.Module | None = None
        self.compress: nn.Module = nn.Identity()
        if channels != width:
            last, compress = nn.Linear(width, channels), nn.Linear(channels, width)
            nn.init.ones_(last.bias)
            nn.init.zeros_(compress.bias)
            self.mask = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), last)
            self.compress = compress

    def forward(self, channels_BLC: Tensor) -> Tensor:
        if self.mask is not None:
            channels_BLC = channels_BLC * self.mask(channels_BLC)
        fused: Tensor = self.compress(channels_BLC)
        return fused


class SequenceSummary(nn.Module):
    """S_sum = gate([S_CLS ‖ PMA(S) ‖ K most recent events]); a learned token stands where there are fewer events."""

    def __init__(self, width: int, num_heads: int, num_cls: int, num_pma: int, num_recent: int, gating: Gate) -> None:
        super().__init__()
        self.num_cls, self.num_recent = num_cls, num_recent
        self.out_tokens = num_cls + num_pma + num_recent
        self.pool = PoolingByMultiheadAttention(width, num_pma, num_heads) if num_pma else None
        self.null_KD = nn.Parameter(torch.randn(num_recent, width) * width**-0.5) if num_recent else None
        self.gate = SelfGating(width, gating)

    def forward(self, events_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        parts = [events_BTD[:, : self.num_cls]]
        if self.pool is not None:
            parts.append(self.pool(events_BTD, mask_BT))
        if self.null_KD is not None:
            recent, exists = latest(events_BTD[:, self.num_cls :], mask_BT[:, self.num_cls :], self.num_recent)
            parts.append(torch.where(exists[:, :, None], recent, self.null_KD.to(recent.dtype)))
        gated: Tensor = self.gate(torch.cat(parts, 1))
        return gated


class FeatureSummary(nn.Module):
    """X_sum = gate(W X): N feature tokens to S on the token axis."""

    def __init__(self, num_tokens: int, num_summary: int, width: int, gating: Gate) -> None:
        super().__init__()
        self.compress = TokenProjection(num_tokens, num_summary)
        self.gate = SelfGating(width, gating)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        gated: Tensor = self.gate(self.compress(tokens_BND))
        return gated


class PairProducts(nn.Module):
    """Dot products of all pairs of tokens, mapped linearly to tokens."""

    def __init__(self, num_tokens: int, num_out_tokens: int, width: int) -> None:
        super().__init__()
        self.pairs = TokenPairs(num_tokens)
        self.out = FlatToTokens(self.pairs.out_features, num_out_tokens, width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        tokens: Tensor = self.out(self.pairs(tokens_BND))
        return tokens


class InteractionArch(nn.Module):
    """X' = norm(X + MLP(interaction([X ‖ S_sum]))): N + M tokens to N."""

    def __init__(self, num_tokens: int, num_summary: int, width: int, interaction: str, *, residual: bool) -> None:
        super().__init__()
        seen = num_tokens + num_summary
        if interaction == "dhen":
            self.interaction: nn.Module = DHENLayer(seen, width, DHEN_MODULES, num_tokens, "sum")
        elif interaction == "dot":
            self.interaction = PairProducts(seen, num_tokens, width)
        else:
            self.interaction = build_interaction(interaction, seen, num_tokens, width)
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width) if residual else None

    def forward(self, tokens_BND: Tensor, summaries: Sequence[Tensor]) -> Tensor:
        mixed_BND: Tensor = self.linear(F.silu(self.interaction(torch.cat([tokens_BND, *summaries], 1))))
        if self.norm is None:
            return mixed_BND
        normal_BND: Tensor = self.norm(tokens_BND + mixed_BND)
        return normal_BND


class SequenceArch(nn.Module):
    """S' = MHA(PFFN(X_sum, S)), each behind a normalisation and with a residual.

    Without a summary of the features the matrix of the PFFN is one for all rows.
    """

    def __init__(
        self, num_summary: int | None, width: int, num_heads: int, pffn: Weights, *, dropout: float, residual: bool
    ) -> None:
        super().__init__()
        self.residual = residual
        self.ffn = PersonalizedFFN(num_summary, width, pffn) if num_summary else nn.Linear(width, width)
        self.attention = MultiHeadAttention(width, num_heads)
        self.before_ffn: nn.Module = nn.LayerNorm(width) if residual else nn.Identity()
        self.before_attention: nn.Module = nn.LayerNorm(width) if residual else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, events_BTD: Tensor, mask_BT: Tensor, summary_BSD: Tensor | None, turn_BTP: Tensor | None
    ) -> Tensor:
        x_BTD: Tensor = self.before_ffn(events_BTD)
        x_BTD = self.ffn(x_BTD) if summary_BSD is None else self.ffn(summary_BSD, x_BTD)
        events_BTD = events_BTD + self.dropout(x_BTD) if self.residual else x_BTD
        x_BTD = self.before_attention(events_BTD)
        x_BTD = self.attention(x_BTD, x_BTD, mask_BT, query_turn_BQP=turn_BTP, key_turn_BKP=turn_BTP)
        if not self.residual:
            return x_BTD
        return events_BTD + cast(Tensor, self.dropout(x_BTD))


class InterFormerBackbone(nn.Module):
    """N feature tokens and any number of padded sequences of width D to one vector per row.

    `flow` says what is exchanged: `int` both ways, `n2s` only features to sequences, `s2n` only sequences to features,
    `sep` nothing before the head, `sole` leaves the sequences out.

    Deviation: the printed algorithm ends with summaries made *before* the last layer, whose interaction and attention
    would then get no gradient; here one more pair of summaries is taken from the last layer's outputs.

    Attributes:
        out_features: width of the output.
    """

    class Config(BaseModel):
        """Hyper-parameters.

        Attributes:
            num_layers: each exchanges summaries once.
            interaction: `dhen` (pair products and crosses, as the authors), `dot`, or any name of
                `fullrank.models.dhen.INTERACTIONS` such as `dcn` or `wukong`.
            num_heads: of attention within a sequence.
            num_summary: tokens of the summary of the features, and CLS tokens of each sequence.
            num_pma, num_recent: summary tokens by attention pooling, and most recent events.
            pffn: how a row's matrix for its events is made, see `PersonalizedFFN`.
            gating: how summaries are gated, see `SelfGating`.
            flow: what is exchanged: both ways, only features to sequences (`n2s`), only sequences to features (`s2n`),
                nothing before the head (`sep`), or no sequences at all (`sole`).
            rope: let attention know the events' places.
            strict_paper: without the residuals and normalisations that make layers stackable.
            dropout: of what each layer adds to the events, and of the head's MLP.
        """

        model_config = ConfigDict(extra="forbid", frozen=True)

        num_layers: int = Field(default=2, ge=1)
        interaction: str = "dhen"
        num_heads: int = Field(default=2, ge=1)
        num_summary: int = Field(default=4, ge=1)
        num_pma: int = Field(default=2, ge=0)
        num_recent: int = Field(default=2, ge=0)
        pffn: Weights = "token_mlp"
        gating: Gate = "self_gate"
        flow: Flow = "int"
        rope: bool = True
        strict_paper: bool = False
        dropout: Dropout = 0.0

        @field_validator("interaction")
        @classmethod
        def _known(cls, interaction: str) -> str:
            if interaction not in ("dhen", "dot"):
                INTERACTIONS.find(interaction)
            return interaction

    def __init__(self, num_tokens: int, num_sequences: int, width: int, config: Config) -> None:
        super().__init__()
        num_layers, num_heads, num_summary = config.num_layers, config.num_heads, config.num_summary
        flow, gating, residual = config.flow, config.gating, not config.strict_paper
        require_heads(width, num_heads)
        if config.rope and (width // num_heads) % 2:
            raise ValueError(f"rotary positions need heads of even width, got {width} / {num_heads}")
        self.num_summary, self.num_heads = num_summary, num_heads
        self.num_sequences = num_sequences if flow != "sole" else 0
        self.to_sequences, self.to_features = flow in ("int", "n2s"), flow in ("int", "s2n")

        def sequence_summaries() -> nn.ModuleList:
            return nn.ModuleList(
                SequenceSummary(width, num_heads, num_summary, config.num_pma, config.num_recent, gating)
                for _ in range(self.num_sequences)
            )

        told = num_summary + config.num_pma + config.num_recent
        exchanged = self.num_sequences * told if self.to_features else 0
        self.cls_CD = (
            nn.Parameter(torch.randn(self.num_sequences, num_summary, width) * width**-0.5)
            if self.num_sequences and not self.to_sequences
            else None
        )
        tells = self.num_sequences > 0 and self.to_sequences
        self.feature_summaries = nn.ModuleList(
            FeatureSummary(num_tokens, num_summary, width, gating) for _ in range(num_layers * tells)
        )
        self.sequence_summaries = nn.ModuleList(
            sequence_summaries() for _ in range(num_layers if self.to_features else 0)
        )
        self.interactions = nn.ModuleList(
            InteractionArch(num_tokens, exchanged, width, config.interaction, residual=residual)
            for _ in range(num_layers)
        )
        self.sequences = nn.ModuleList(
            nn.ModuleList(
                SequenceArch(
                    num_summary if tells else None,
                    width,
                    num_heads,
                    config.pffn,
                    dropout=config.dropout,
                    residual=residual,
                )
                for _ in range(self.num_sequences)
            )
            for _ in range(num_layers)
        )
        self.last_feature_summary = FeatureSummary(num_tokens, num_summary, width, gating)
        self.last_sequence_summaries = sequence_summaries()
        pairs = width // num_heads // 2
        self.register_buffer("frequency_R", rotary_frequencies(pairs) if config.rope else None, persistent=False)
        self.out_features = (num_summary + self.num_sequences * told) * width

    def forward(self, tokens_BND: Tensor, sequences: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Shape (B, out_features).

        Args:
            sequences: (events_BLD, mask_BL) of each, oldest event first.
        """
        states, masks, turned = [], [], []
        for index, (events_BLD, mask_BL) in enumerate(sequences[: self.num_sequences]):
            if self.cls_CD is not None:
                cls_BCD = self.cls_CD[index].expand(len(tokens_BND), -1, -1).to(events_BLD.dtype)
            else:
                cls_BCD = self.feature_summaries[0](tokens_BND)
            states.append(torch.cat([cls_BCD, events_BLD], 1))
            masks.append(F.pad(mask_BL, (self.num_summary, 0), value=True))
            turned.append(self._turns(mask_BL))
        for layer, interaction in enumerate(self.interactions):
            summary_BSD = self.feature_summaries[layer](tokens_BND) if self.feature_summaries else None
            tells = cast(nn.ModuleList, self.sequence_summaries[layer]) if self.sequence_summaries else nn.ModuleList()
            told = [tell(state, mask) for tell, state, mask in zip(tells, states, masks, strict=len(tells) > 0)]
            tokens_BND = interaction(tokens_BND, told)
            archs = cast(nn.ModuleList, self.sequences[layer])
            states = [
                arch(state, mask, summary_BSD, turn)
                for arch, state, mask, turn in zip(archs, states, masks, turned, strict=True)
            ]
        summaries = [self.last_feature_summary(tokens_BND)]
        summaries += [
            tell(state, mask) for tell, state, mask in zip(self.last_sequence_summaries, states, masks, strict=True)
        ]
        return torch.cat(summaries, 1).flatten(1)

    def _turns(self, mask_BL: Tensor) -> Tensor | None:
        """Rotation by the place counted back from the latest event; none for the summary tokens."""
        if self.frequency_R is None:
            return None
        angle_BLR = positions_from_latest(mask_BL)[:, :, None] * self.get_buffer("frequency_R")
        return turns(F.pad(angle_BLR, (0, 0, self.num_summary, 0)), self.num_heads)


class InterFormer(Ranker):
    """Heterogeneous interaction learning. Each sequence of the schema has a sequence part of its own.

    Deviation: tokens and events are normalised before the first layer (not with `strict_paper`). Tables start small, so
    otherwise the layers' biases and the first residual sums drown them, and training begins with a long standstill.
    """

    name = "interformer"
    source = "Zeng et al., InterFormer: Effective Heterogeneous Interaction Learning for CTR Prediction, CIKM 2025"

    class Config(InterFormerBackbone.Config, Ranker.Config):
        """Hyper-parameters, those of the backbone included.

        Attributes:
            hidden: widths of the head's MLP.
        """

        embedding_init: InitStd = 0.001
        hidden: Hidden = (256, 128, 64)
        batch_norm: BatchNorm = False

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        for sequence in schema.sequences:
            if config.num_recent > sequence.max_length:
                kept = f'sequence "{sequence.name}" keeps {sequence.max_length} events'
                raise ValueError(f"num_recent is {config.num_recent}, but {kept}")
        width = config.embedding_dim
        if config.flow == "sole":
            features = tuple(feature for feature in schema.features if not isinstance(feature, HistoryFeature))
            schema = schema.model_copy(update={"features": features})
        self.features = FeaturesAndHistories(schema, config.embeddings)
        normalize = not config.strict_paper
        self.token_norm: nn.Module = nn.LayerNorm(width) if normalize else nn.Identity()
        self.event_norms = nn.ModuleList(
            nn.LayerNorm(channels) if normalize else nn.Identity() for channels in self.features.channels
        )
        self.fusions = nn.ModuleList(MaskNetFusion(channels, width) for channels in self.features.channels)
        self.backbone = InterFormerBackbone(self.features.num_tokens, len(schema.sequences), width, config)
        self.mlp = MLP(
            self.backbone.out_features,
            config.hidden,
            self.num_tasks,
            batch_norm=config.batch_norm,
            dropout=config.dropout,
            normalized=not config.strict_paper,
        )

    def output_biases(self) -> list[Tensor]:
        return [self.mlp.output_bias]

    def forward(self, batch: Batch) -> RankerOutput:
        tokens_BND, histories = self.features(batch)
        sequences = [
            (fusion(norm(history.channels_BLC)), history.mask_BL)
            for norm, fusion, history in zip(self.event_norms, self.fusions, histories, strict=True)
        ]
        return RankerOutput(self.mlp(self.backbone(self.token_norm(tokens_BND), sequences)))
