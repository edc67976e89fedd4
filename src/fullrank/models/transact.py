"""TransAct: a transformer over recent actions, each fused with the candidate from the start."""

# Shapes: B rows, E events of all rows together, L longest history, C width of an event, D width of the candidate,
# W = C + D, K latest outputs.

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings.padding import Padding
from fullrank.embeddings.segments import row_of
from fullrank.layers.crosses import CrossNetwork
from fullrank.layers.encoder import EncoderLayer, LengthGroups
from fullrank.layers.histories import Events, FeaturesAndHistories, latest
from fullrank.layers.mlp import MLP
from fullrank.models.base import BatchNorm, Dropout, Hidden, InitStd, Ranker, RankerOutput
from fullrank.schema import Schema

HOUR = 3600.0


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled model hides the same events
def _uniform(count: int, device: torch.device) -> Tensor:
    return torch.rand(count, device=device)


class RecentActions(nn.Module):
    """Tokens [event ‖ candidate] through encoder layers; then the K latest outputs and the maximum of all of them.

    No position is added: order is seen through the K latest alone. Slots of events that do not exist are zero, and so
    is the maximum of an empty history.

    Args:
        width: W of [event ‖ candidate].
    """

    class Config(BaseModel):
        """Hyper-parameters.

        Attributes:
            num_layers: of the transformer.
            num_heads: of each layer.
            feed_forward: width of a layer's inner MLP.
            latest: K, how many of the latest outputs go on as they are.
            window_hours: in training, each row forgets the events of its last T hours, T uniform in [0, window_hours];
                the paper does this against an echo of the user's latest actions. 0 for none; needs events with an age.
        """

        model_config = ConfigDict(extra="forbid", frozen=True)

        num_layers: int = Field(default=2, ge=0)
        num_heads: int = Field(default=2, ge=1)
        feed_forward: int = Field(default=64, ge=1)
        latest: int = Field(default=10, ge=0)
        window_hours: float = Field(default=0.0, ge=0)
        dropout: Dropout = 0.0

    def __init__(self, width: int, max_length: int, config: Config) -> None:
        super().__init__()
        self.latest, self.window_hours = min(config.latest, max_length), config.window_hours
        self.width = width * (self.latest + 1)
        self.layers = nn.ModuleList(
            EncoderLayer(width, config.num_heads, config.feed_forward, nn.ReLU(), dropout=config.dropout)
            for _ in range(config.num_layers)
        )

    def forward(self, events: Events, candidate_BD: Tensor) -> Tensor:
        """Shape (B, `width`)."""
        row_B = torch.arange(len(candidate_BD), device=candidate_BD.device)
        lengths_B, channels_EC = events.lengths_B, events.channels_EC
        row_E = row_of(lengths_B, len(channels_EC))
        if self.training and self.window_hours:
            assert events.age_E is not None
            hidden_B = _uniform(len(row_B), row_B.device) * (self.window_hours * HOUR)
            kept = (events.age_E >= hidden_B.index_select(0, row_E)).nonzero().squeeze(1)
            channels_EC, row_E = channels_EC.index_select(0, kept), row_E.index_select(0, kept)
            lengths_B = torch.bincount(row_E, minlength=len(row_B))
        x_EW = torch.cat([channels_EC, candidate_BD.index_select(0, row_E)], 1)
        if len(self.layers):
            begin_B = lengths_B.cumsum(0) - lengths_B
            slot_E = torch.arange(len(row_E), device=row_E.device) - begin_B.index_select(0, row_E)
            groups = LengthGroups.of(lengths_B, row_E, slot_E)
            x_EW = x_EW.index_select(0, groups.order_E)
            for layer in self.layers:
                x_EW = layer(x_EW, groups)
            x_EW = x_EW.index_select(0, groups.place_E)
        padding = Padding.of(lengths_B)
        x_BLW = padding.pad(x_EW)
        latest_BKW, _ = latest(x_BLW, padding.mask_BL, self.latest)
        top_BW = x_BLW.masked_fill(~padding.mask_BL[:, :, None], -torch.inf).amax(1)
        top_BW = top_BW.masked_fill(lengths_B[:, None] == 0, 0.0)
        return torch.cat([latest_BKW.flatten(1), top_BW], 1)


class TransAct(Ranker):
    """Transformer-based real-time user action model.

    Each sequence becomes the output of `RecentActions`; those and all other features go through full-matrix crosses
    and then an MLP, as DCN-V2's stacked structure.

    Our reading: the paper's model is one block of a larger ranker; what it does not say of the rest is DCN-V2's.
    """

    name = "transact"
    source = (
        "Xia et al., TransAct: Transformer-based Realtime User Action Model for Recommendation at Pinterest, KDD 2023, "
        "arXiv 2306.00248"
    )
    needs_history = True

    class Config(RecentActions.Config, Ranker.Config):
        """Hyper-parameters, those of `RecentActions` included.

        Attributes:
            num_cross_layers: of the crosses below the MLP.
        """

        embedding_init: InitStd = 0.05
        num_cross_layers: int = Field(default=2, ge=0)
        hidden: Hidden = (256, 128, 64)
        batch_norm: BatchNorm = False

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.features = FeaturesAndHistories(schema, config.embeddings)
        for sequence in schema.sequences:
            timed = any(field.name == self.features.age_field for field in sequence.number_fields)
            if config.window_hours and not timed:
                raise ValueError(
                    f'window_hours needs the age of events, sequence "{sequence.name}" has no number field '
                    f'"{self.features.age_field}"'
                )
        self.actions = nn.ModuleList(
            RecentActions(channels + len(targets) * config.embedding_dim, sequence.max_length, config)
            for sequence, channels, targets in zip(
                schema.sequences, self.features.channels, self.features.targets, strict=True
            )
        )
        width = self.features.num_tokens * config.embedding_dim
        width += sum(actions.width for actions in self.actions)  # type: ignore[misc]
        self.crosses = CrossNetwork(width, config.num_cross_layers)
        self.mlp = MLP(
            width,
            config.hidden,
            self.num_tasks,
            batch_norm=config.batch_norm,
            dropout=config.dropout,
            normalized=config.num_layers > 0,
        )

    def output_biases(self) -> list[Tensor]:
        return [self.mlp.output_bias]

    def forward(self, batch: Batch) -> RankerOutput:
        tokens_BFD, sequences = self.features.events(batch)
        parts = [tokens_BFD.flatten(1)]
        for events, targets, actions in zip(sequences, self.features.targets, self.actions, strict=True):
            parts.append(actions(events, tokens_BFD[:, targets].flatten(1)))
        return RankerOutput(self.mlp(self.crosses(torch.cat(parts, 1))))
