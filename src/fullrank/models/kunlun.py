"""Kunlun: InterFormer's exchange made cheap, with layers that take turns and event types of their own sizes."""

# Shapes: B rows, N feature tokens, L events, D global width, E width of an event type, S tokens of the feature summary,
# K hidden units of GDPA, H summary tokens of all sequences, P rotary pairs of all heads.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.layers.attention import merge_heads, require_heads, split_heads, turns
from fullrank.layers.gdpa import ScaleMode, check_activations, gdpa
from fullrank.layers.histories import FeaturesAndHistories, History, latest
from fullrank.layers.mlp import MLP
from fullrank.layers.rote import ROTE
from fullrank.layers.seed_pooling import HierarchicalSeedPooling
from fullrank.layers.sliding_window import SlidingWindowAttention
from fullrank.layers.token_projection import TokenProjection
from fullrank.models.base import BatchNorm, Dropout, Hidden, InitStd, Ranker, RankerOutput
from fullrank.models.wukong import WukongLayer
from fullrank.schema import Schema


class EventConfig(BaseModel):
    """Capacity of one event type.

    Attributes:
        width: E of its tokens; None for the width of the features.
        num_heads: of its attention and of GDPA.
        num_tokens: summary tokens that it contributes.
        num_recent: latest events that join them as they are.
        num_layers: layers in which its own state moves on; later layers of the model keep its last one. None for all.
        window: events that see one another in attention are at most so many places apart.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: int | None = Field(default=None, ge=1)
    num_heads: int = Field(default=2, ge=1)
    num_tokens: int = Field(default=4, ge=1)
    num_recent: int = Field(default=2, ge=0)
    num_layers: int | None = Field(default=None, ge=1)
    window: int = Field(default=16, ge=0)


@dataclass(frozen=True)
class LayerPlan:
    """What a layer does with the sequences.

    Attributes:
        fresh: make a new summary (else the previous layer's is used again).
        personal: personalised network of the events (GDPA).
        attention: attention within the window.
    """

    fresh: bool
    personal: bool
    attention: bool


def _check_seeds(name: str, event: EventConfig, num_seeds: int) -> None:
    if num_seeds <= event.num_tokens:
        raise ValueError(f'num_seeds is {num_seeds}, expected more than the {event.num_tokens} tokens of "{name}"')


def xavier_(module: nn.Module) -> None:
    """Starts a linear layer as `MLP` does: Xavier weights, biases of 0.

    With PyTorch's own start each layer halves what differs between rows and adds a constant, and after this model's
    many small layers the head would see little but constants: on news clicks (Globo) one seed of three then never
    left AUC .5.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class FieldNorm(nn.Module):
    """A layer norm for each field of an event, so that a number far larger than the vectors of ids drowns none."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(channels // width))

    def forward(self, channels_BLC: Tensor) -> Tensor:
        fields = torch.split(channels_BLC, self.width, -1)
        return torch.cat([norm(field) for norm, field in zip(self.norms, fields, strict=True)], -1)


def layer_plans(skip: Literal["alternate", "none"], num_layers: int) -> list[LayerPlan]:
    """`alternate`: even layers summarise and personalise, odd ones attend and reuse; `none`: every layer does all."""
    if skip == "none":
        return [LayerPlan(True, True, True)] * num_layers
    return [LayerPlan(layer % 2 == 0, layer % 2 == 0, layer % 2 == 1) for layer in range(num_layers)]


class PersonalGDPA(nn.Module):
    """S + act(norm(S) W1) W2 with W1 and W2 made per row from the summary of the features.

    The number K of keys is the hidden width of that network: as many as the summary has tokens would be a bottleneck.
    """

    def __init__(
        self,
        num_summary: int,
        summary_width: int,
        width: int,
        num_heads: int,
        hidden: int,
        activation: str | Sequence[str],
        *,
        scale: float,
        scale_mode: ScaleMode,
    ) -> None:
        super().__init__()
        require_heads(width, num_heads)
        self.num_heads, self.scale, self.scale_mode = num_heads, scale, scale_mode
        self.activation = activation
        check_activations(activation, num_heads)
        self.norm = nn.LayerNorm(width)
        self.keys = TokenProjection(num_summary, hidden)
        self.weights = nn.Linear(summary_width, 2 * width)

    def forward(self, events_BLE: Tensor, mask_BL: Tensor, summary_BSD: Tensor) -> Tensor:
        key, value = (split_heads(x, self.num_heads) for x in self.weights(self.keys(summary_BSD)).chunk(2, dim=2))
        query = split_heads(self.norm(events_BLE), self.num_heads)
        mixed = gdpa(
            query, key, value, self.activation, scale=self.scale, scale_mode=self.scale_mode, query_mask_BQ=mask_BL
        )
        return events_BLE + merge_heads(mixed)


class SummaryTokens(nn.Module):
    """Summary tokens of one event type and its latest events, at the width of the features.

    Deviation: sources speak of HSP in the place of InterFormer's pooling and say nothing of the recent events that
    InterFormer hands on beside it. We keep them.
    """

    def __init__(self, event: EventConfig, out_width: int, config: KunlunBackbone.Config) -> None:
        super().__init__()
        self.num_recent = event.num_recent
        width, seeds = event.width or out_width, max(config.num_seeds, event.num_tokens + 1)
        self.pool = HierarchicalSeedPooling(width, event.num_heads, seeds, event.num_tokens, config.kron_rank)
        self.out = nn.Linear(width, out_width) if width != out_width else nn.Identity()

    def forward(self, events_BLE: Tensor, mask_BL: Tensor, turn_BLP: Tensor) -> Tensor:
        parts = [self.pool(events_BLE, mask_BL, turn_BLP)]
        if self.num_recent:
            parts.append(latest(events_BLE, mask_BL, self.num_recent)[0])
        tokens_BHD: Tensor = self.out(torch.cat(parts, 1))
        return tokens_BHD


class EventBlock(nn.Module):
    """One layer of one event type: moves its events on, and summarises them (`pool`) if the layer's plan says so."""

    def __init__(
        self,
        plan: LayerPlan,
        event: EventConfig,
        summary_width: int,
        max_length: int,
        config: KunlunBackbone.Config,
    ) -> None:
        super().__init__()
        width, heads = event.width or summary_width, event.num_heads
        self.pool = SummaryTokens(event, summary_width, config) if plan.fresh else None
        self.personal: PersonalGDPA | None = None
        if plan.personal:
            self.personal = PersonalGDPA(
                config.num_summary,
                summary_width,
                width,
                heads,
                config.gdpa_hidden,
                config.activation,
                scale=1 / max_length,
                scale_mode=config.scale_mode,
            )
        self.attention = SlidingWindowAttention(width, heads, event.window) if plan.attention else None
        self.norm = nn.LayerNorm(width) if plan.attention else None

    def forward(self, events_BLE: Tensor, mask_BL: Tensor, turn_BLP: Tensor, summary_BSD: Tensor) -> Tensor:
        if self.personal is not None:
            events_BLE = self.personal(events_BLE, mask_BL, summary_BSD)
        if self.attention is not None and self.norm is not None:
            events_BLE = self.norm(events_BLE + self.attention(events_BLE, mask_BL, turn_BLP))
        return events_BLE


class MixtureOfWukongExperts(nn.Module):
    """Tokens dealt out to M Wukong layers that run side by side; N tokens to `num_experts` times their output tokens.

    Deviation: experts never see one another's tokens inside a layer, so by default a linear map over the token axis
    mixes their outputs (`mix`); token i goes to expert i mod M, so that every expert gets features and summaries.
    """

    def __init__(
        self,
        num_tokens: int,
        num_out_tokens: int,
        width: int,
        num_experts: int,
        rank: int,
        hidden: Sequence[int],
        *,
        mix: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= num_experts <= min(num_tokens, num_out_tokens // 2):
            raise ValueError(
                f"expected 1 to {min(num_tokens, num_out_tokens // 2)} experts for {num_tokens} tokens in and "
                f"{num_out_tokens} out, got {num_experts}"
            )
        shares = [
            [len(range(e, count, num_experts)) for e in range(num_experts)] for count in (num_tokens, num_out_tokens)
        ]
        self.experts = nn.ModuleList(
            WukongLayer(tokens, out - out // 2, out // 2, width, rank, hidden)
            for tokens, out in zip(*shares, strict=True)
        )
        self.mix = TokenProjection(num_out_tokens, num_out_tokens) if mix and num_experts > 1 else None

    def forward(self, tokens_BND: Tensor) -> Tensor:
        parts = [tokens_BND[:, expert :: len(self.experts)] for expert in range(len(self.experts))]
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)], 1)
        return outputs if self.mix is None else cast(Tensor, self.mix(outputs))


class FeatureWeights(nn.Module):
    """X_sum: feature tokens compressed to S tokens, normalised, then an MLP on each.

    Deviation: the normalisation is ours. Tables start small, so without it the MLP's biases drown the tokens
    (validation AUC .871 against .879 on MovieLens-1M).
    """

    def __init__(self, num_tokens: int, num_summary: int, width: int) -> None:
        super().__init__()
        self.compress = TokenProjection(num_tokens, num_summary)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        summary: Tensor = self.mlp(self.norm(self.compress(tokens_BND)))
        return summary


class KunlunBackbone(nn.Module):
    """Feature tokens and padded events of several types to N' tokens of width D.

    Every layer: X' = MoWE([X_sum ‖ H]); a layer that is `fresh` makes new summaries H of the sequences, another uses
    those of the layer before; the events move on by GDPA or by attention in a window, as its plan says.

    Deviation: what layers do to the events after the last fresh summary would reach no output (with two alternating
    layers neither GDPA nor attention would), so the head also reads summaries of the last states.
    """

    class Config(BaseModel):
        """Hyper-parameters.

        Attributes:
            events: capacity of each sequence of the schema, by name; those not named have the defaults.
            num_layers: layers of the model.
            num_summary: tokens of the features' summary.
            num_seeds: learned questions to a history; more than its summary tokens.
            gdpa_hidden: hidden width of the personalised network.
            kron_rank: terms of the map that compresses seeds to summary tokens.
            num_experts: Wukong layers side by side, each of a part of the tokens; one lets all tokens meet.
            num_out_tokens: feature tokens between layers.
            fm_rank: rank of the factorisation machine of a Wukong layer.
            fm_hidden: hidden widths of its MLP.
            mix: mix the experts' outputs.
            activation: of GDPA; one for all heads, or one per head.
            scale_mode: scale attention scores after the activation, as the published kernels, or before it, as the
                paper.
            comp_skip: `alternate` does half of the sequence work in each layer, `none` all of it.
            rote: let attention know times, where the events have ages.
            time_scale: seconds that count as one in ln(1 + Δt / scale).
            rote_reference: an event's time is counted to the request, or from the event before it.
        """

        model_config = ConfigDict(extra="forbid", frozen=True)

        events: dict[str, EventConfig] = Field(default={})
        num_layers: int = Field(default=2, ge=1)
        num_summary: int = Field(default=12, ge=1)
        num_seeds: int = Field(default=16, ge=2)
        gdpa_hidden: int = Field(default=32, ge=1)
        kron_rank: int = Field(default=4, ge=1)
        num_experts: int = Field(default=1, ge=1)
        num_out_tokens: int = Field(default=16, ge=2)
        fm_rank: int = Field(default=8, ge=1)
        fm_hidden: Hidden = (128,)
        mix: bool = True
        activation: str | tuple[str, ...] = "gelu_tanh"
        scale_mode: ScaleMode = "post"
        comp_skip: Literal["alternate", "none"] = "alternate"
        rote: bool = True
        time_scale: float = Field(default=86_400.0, gt=0)
        rote_reference: Literal["request", "previous"] = "request"

        @model_validator(mode="after")
        def _sizes_fit(self) -> Self:
            for name, event in self.events.items():
                _check_seeds(name, event, self.num_seeds)
            if self.num_experts > self.num_out_tokens // 2:
                most = self.num_out_tokens // 2
                raise ValueError(f"num_out_tokens {self.num_out_tokens} are enough for {most} experts at most")
            return self

    def __init__(self, num_tokens: int, width: int, max_lengths: Mapping[str, int], config: Config) -> None:
        super().__init__()
        self.names = list(max_lengths)
        for name in config.events:
            if name not in max_lengths:
                known = ", ".join(max_lengths) or "none"
                raise ValueError(f'events: there is no sequence "{name}"; the schema has {known}')
        events = {name: config.events.get(name, EventConfig()) for name in max_lengths}
        self.rote = config.rote
        self.plans = layer_plans(config.comp_skip, config.num_layers)
        self.angles, self.heads = nn.ModuleList(), [event.num_heads for event in events.values()]
        for name, event in events.items():
            _check_seeds(name, event, config.num_seeds)
            own = event.width or width
            require_heads(own, event.num_heads)
            if (own // event.num_heads) % 2:
                raise ValueError(
                    f'events "{name}": rotary attention needs heads of even width, got {own} / {event.num_heads}'
                )
            pairs = own // event.num_heads // 2
            self.angles.append(ROTE(pairs, time_scale=config.time_scale, reference=config.rote_reference))
        summaries = sum(event.num_tokens + event.num_recent for event in events.values())
        self.features, self.blocks, self.interactions = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer, plan in enumerate(self.plans):
            self.features.append(FeatureWeights(num_tokens, config.num_summary, width))
            self.blocks.append(
                nn.ModuleList(
                    EventBlock(plan, event, width, max_lengths[name], config)
                    if layer < (event.num_layers or config.num_layers)
                    else nn.Identity()
                    for name, event in events.items()
                )
            )
            self.interactions.append(
                MixtureOfWukongExperts(
                    config.num_summary + summaries,
                    config.num_out_tokens,
                    width,
                    config.num_experts,
                    config.fm_rank,
                    config.fm_hidden,
                    mix=config.mix,
                )
            )
            num_tokens = config.num_out_tokens
        self.last_pools = nn.ModuleList(SummaryTokens(event, width, config) for event in events.values())
        self.out_features = (config.num_out_tokens + summaries) * width
        self.apply(xavier_)

    def forward(self, tokens_BND: Tensor, sequences: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
        """Shape (B, out_features).

        Args:
            sequences: (events_BLE, mask_BL, age_BL or None) of each event type, in the order of `events`.
        """
        states = [events_BLE for events_BLE, _, _ in sequences]
        masks = [mask_BL for _, mask_BL, _ in sequences]
        turned = [
            turns(rote(mask_BL, age_BL if self.rote else None), heads)
            for rote, heads, (_, mask_BL, age_BL) in zip(self.angles, self.heads, sequences, strict=True)
        ]
        summaries: list[Tensor] = []
        for layer, interaction in enumerate(self.interactions):
            summary_BSD = self.features[layer](tokens_BND)
            blocks = list(cast(nn.ModuleList, self.blocks[layer]))
            for index, block in enumerate(blocks):
                if isinstance(block, EventBlock) and block.pool is not None:
                    summaries[index : index + 1] = [block.pool(states[index], masks[index], turned[index])]
            tokens_BND = interaction(torch.cat([summary_BSD, *summaries], 1))
            states = [
                block(state, mask, turn, summary_BSD) if isinstance(block, EventBlock) else state
                for block, state, mask, turn in zip(blocks, states, masks, turned, strict=True)
            ]
        last = [
            pool(state, mask, turn)
            for pool, state, mask, turn in zip(self.last_pools, states, masks, turned, strict=True)
        ]
        return torch.cat([tokens_BND, *last], 1).flatten(1)


class Kunlun(Ranker):
    """See `KunlunBackbone`; every sequence of the schema is an event type.

    Deviation: events are normalised before their MLP, for the reasons that `FeatureWeights` and `FieldNorm` give.
    """

    name = "kunlun"
    source = "Kunlun: Establishing Scaling Laws for Massive-Scale Recommendation Systems, arXiv 2602.10016, 2026"

    class Config(KunlunBackbone.Config, Ranker.Config):
        """Hyper-parameters, those of the backbone included.

        Attributes:
            hidden: widths of the head's MLP.
        """

        embedding_init: InitStd = 0.001
        hidden: Hidden = (256, 128, 64)
        batch_norm: BatchNorm = False
        dropout: Dropout = 0.0

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        width = config.embedding_dim
        self.features = FeaturesAndHistories(schema, config.embeddings)
        widths = [config.events.get(sequence.name, EventConfig()).width or width for sequence in schema.sequences]
        self.events = nn.ModuleList(
            nn.Sequential(FieldNorm(channels, width), nn.Linear(channels, own), nn.SiLU(), nn.Linear(own, own))
            for channels, own in zip(self.features.channels, widths, strict=True)
        ).apply(xavier_)
        lengths = {sequence.name: sequence.max_length for sequence in schema.sequences}
        self.backbone = KunlunBackbone(self.features.num_tokens, width, lengths, config)
        self.mlp = MLP(
            self.backbone.out_features,
            config.hidden,
            self.num_tasks,
            batch_norm=config.batch_norm,
            dropout=config.dropout,
            normalized=True,
        )

    def output_biases(self) -> list[Tensor]:
        return [self.mlp.output_bias]

    def forward(self, batch: Batch) -> RankerOutput:
        tokens_BND, histories = self.features(batch)
        sequences = [self._sequence(layer, history) for layer, history in zip(self.events, histories, strict=True)]
        return RankerOutput(self.mlp(self.backbone(tokens_BND, sequences)))

    @staticmethod
    def _sequence(layer: nn.Module, history: History) -> tuple[Tensor, Tensor, Tensor | None]:
        events_BLE = layer(history.channels_BLC).masked_fill(~history.mask_BL[:, :, None], 0.0)
        return events_BLE, history.mask_BL, history.age_BL
