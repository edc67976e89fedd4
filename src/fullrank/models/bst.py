"""BST: a transformer over the history and the candidate."""

# Shapes: B rows, E events of all rows together, T = B + E tokens (candidates, then events), L longest history, C width.

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.embeddings.padding import Padding
from fullrank.embeddings.segments import row_of
from fullrank.layers.encoder import EncoderLayer, LengthGroups
from fullrank.layers.histories import Events, FeaturesAndHistories
from fullrank.layers.mlp import MLP
from fullrank.models.base import BatchNorm, Dropout, Hidden, InitStd, Ranker, RankerOutput
from fullrank.schema import Schema

Pooling = Literal["mean", "candidate", "concat"]
# Ages in seconds by their binary logarithm; the last bucket begins at 34 years.
AGE_BUCKETS = 32


class BehaviourTransformer(nn.Module):
    """Candidate and events, each plus a vector of its position, through encoder layers; then pooled.

    The position of an event is its age, in buckets of a power of two of seconds, where events have an age; else its
    place counted back from the latest. That of the candidate is 0. So padding never shifts a position.

    Args:
        channels: C, width of an event; a narrower candidate is filled up with zeros.
        max_length: longest history.
        timed: events have an age.
        position_init: standard deviation that position vectors start from.
    """

    class Config(BaseModel):
        """Hyper-parameters.

        Attributes:
            num_layers: encoder layers; the paper found one best.
            num_heads: of each layer.
            feed_forward: width of a layer's inner MLP, in widths of an event.
            position: add position vectors.
            pooling: of the outputs: their mean, that of the candidate, or all side by side (candidate, latest event,
                ..., then zeros).
        """

        model_config = ConfigDict(extra="forbid", frozen=True)

        num_layers: int = Field(default=1, ge=0)
        num_heads: int = Field(default=2, ge=1)
        feed_forward: int = Field(default=4, ge=1)
        position: bool = True
        pooling: Pooling = "mean"
        dropout: Dropout = 0.0

    def __init__(self, channels: int, max_length: int, config: Config, *, timed: bool, position_init: float) -> None:
        super().__init__()
        self.max_length, self.timed, self.pooling = max_length, timed, config.pooling
        self.width = channels * (max_length + 1) if config.pooling == "concat" else channels
        self.position_PC: nn.Parameter | None = None
        if config.position:
            rows = 1 + (AGE_BUCKETS if timed else max_length)
            self.position_PC = nn.Parameter(torch.randn(rows, channels) * position_init)
        inner = config.feed_forward * channels
        self.layers = nn.ModuleList(
            EncoderLayer(channels, config.num_heads, inner, nn.LeakyReLU(), dropout=config.dropout)
            for _ in range(config.num_layers)
        )

    def forward(self, events: Events, candidate_BC: Tensor) -> Tensor:
        """Shape (B, `width`)."""
        size, total = len(candidate_BC), len(events.channels_EC)
        lengths_B = events.lengths_B
        row_B = torch.arange(size, device=lengths_B.device)
        row_E = row_of(lengths_B, total)
        # 1 for the latest event of a row, 2 for the one before it, ...
        since_E = lengths_B.cumsum(0).index_select(0, row_E) - torch.arange(total, device=row_E.device)
        row_T, slot_T = torch.cat([row_B, row_E]), F.pad(since_E, (size, 0))
        missing = events.channels_EC.shape[1] - candidate_BC.shape[1]
        x_TC = torch.cat([F.pad(candidate_BC, (0, missing)), events.channels_EC])
        if self.position_PC is not None:
            x_TC = x_TC + F.embedding(F.pad(self._position(events, since_E), (size, 0)), self.position_PC)
        if len(self.layers):
            groups = LengthGroups.of(1 + lengths_B, row_T, slot_T)
            x_TC = x_TC.index_select(0, groups.order_E)
            for layer in self.layers:
                x_TC = layer(x_TC, groups)
            x_TC = x_TC.index_select(0, groups.place_E)
        if self.pooling == "candidate":
            return x_TC[:size]
        if self.pooling == "concat":
            width = 1 + self.max_length
            mask_BL = torch.arange(width, device=row_T.device) <= lengths_B[:, None]
            return Padding(mask_BL, row_T * width + slot_T).pad(x_TC).flatten(1)
        return x_TC[:size].index_add(0, row_E, x_TC[size:]) / (1 + lengths_B)[:, None]

    def _position(self, events: Events, since_E: Tensor) -> Tensor:
        if self.timed:
            assert events.age_E is not None
            # age + 1 in [2^b, 2^(b+1)) is bucket b.
            bucket_E = torch.frexp(events.age_E.clamp_min(0) + 1).exponent - 1
            return 1 + bucket_E.long().clamp_max(AGE_BUCKETS - 1)
        return since_E.clamp_max(self.max_length)


class BST(Ranker):
    """Behaviour sequence transformer.

    Each sequence goes with its candidate (the features that share its tables) through a `BehaviourTransformer`; the
    results and all other features into an MLP. A sequence without candidate has its position vector alone there.

    Deviation: the paper joins the vector of the position to that of the item before a linear projection; here it is
    added, which is such a projection without its cost. The paper's outputs go side by side into the MLP (pooling
    `concat`); the default here is their mean, which public implementations use.
    """

    name = "bst"
    source = (
        "Chen et al., Behavior Sequence Transformer for E-commerce Recommendation in Alibaba, DLP-KDD 2019, "
        "arXiv 1905.06874"
    )
    needs_history = True

    class Config(BehaviourTransformer.Config, Ranker.Config):
        """Hyper-parameters, those of the transformer included.

        Attributes:
            hidden: widths of the MLP above the transformers.
        """

        embedding_init: InitStd = 0.05
        hidden: Hidden = (256, 128, 64)
        batch_norm: BatchNorm = False

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.features = FeaturesAndHistories(schema, config.embeddings)
        self.transformers = nn.ModuleList(
            BehaviourTransformer(
                channels,
                sequence.max_length,
                config,
                timed=any(field.name == self.features.age_field for field in sequence.number_fields),
                position_init=config.embedding_init,
            )
            for sequence, channels in zip(schema.sequences, self.features.channels, strict=True)
        )
        width = self.features.num_tokens * config.embedding_dim
        width += sum(transformer.width for transformer in self.transformers)  # type: ignore[misc]
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
        for events, targets, transformer in zip(sequences, self.features.targets, self.transformers, strict=True):
            parts.append(transformer(events, tokens_BFD[:, targets].flatten(1)))
        return RankerOutput(self.mlp(torch.cat(parts, 1)))
