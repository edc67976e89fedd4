"""DIN: the history seen through the candidate, by an attention MLP on (candidate, event) pairs."""

# Shapes: B rows, D vector of an event (all its id fields side by side), A width of the attention layer,
# E events of all rows together.

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BeforeValidator, Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection
from fullrank.embeddings.segments import row_of, segment_softmax, segment_sum, spread
from fullrank.layers.dice import Dice, dice_scores
from fullrank.layers.histories import candidate_tokens
from fullrank.layers.mlp import ACTIVATIONS, MLP
from fullrank.layers.numbers import NumberVectors
from fullrank.models.base import BatchNorm, Dropout, Hidden, Ranker, RankerOutput
from fullrank.schema import Schema


class TargetAttention(nn.Module):
    """Σ_t a_t k_t with a_t = MLP([q, k_t, q-k_t, q⊙k_t]), activated by Dice or ReLU.

    Works on the events there are, not on padding. The first layer's W is used as W_k-W_d on k, W_q+W_d on q and W_p on
    q⊙k, which is the paper's formula with a quarter fewer multiplications.

    Deviation: Dice's statistics are taken over real events only; public implementations include padding.
    """

    def __init__(
        self, width: int, hidden: tuple[int, ...], *, softmax: bool, activation: str = "dice", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.softmax = softmax
        self.weight_A4D = nn.Parameter(torch.empty(hidden[0], 4 * width))
        self.bias_A = nn.Parameter(torch.zeros(hidden[0]))
        self.activations = nn.ModuleList(ACTIVATIONS[activation](units) for units in hidden)
        self.dropout = nn.Dropout(dropout)
        self.deeper = nn.ModuleList(nn.Linear(*units) for units in itertools.pairwise(hidden))
        self.score_A = nn.Parameter(torch.empty(1, hidden[-1]))
        self.score_bias = nn.Parameter(torch.zeros(1))
        for layer in cast(Iterable[nn.Linear], self.deeper):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.xavier_normal_(self.weight_A4D)
        nn.init.xavier_normal_(self.score_A)

    def forward(self, query_BD: Tensor, events_ED: Tensor, lengths_B: Tensor) -> Tensor:
        """Pooled history_BD; zero for an empty history."""
        # An exported program does not branch on its input.
        if not torch.compiler.is_exporting() and events_ED.shape[0] == 0:
            return torch.zeros_like(query_BD) + 0 * self.score_bias
        score_E = self._scores(query_BD, events_ED, lengths_B) + self.score_bias
        if self.softmax:
            score_E = segment_softmax(score_E, row_of(lengths_B, score_E.shape[0]), lengths_B.numel())
        return segment_sum(events_ED, lengths_B, weights_E=score_E)

    def _scores(self, query_BD: Tensor, events_ED: Tensor, lengths_B: Tensor) -> Tensor:
        w_query, w_event, w_difference, w_product = self.weight_A4D.chunk(4, dim=1)
        weight_AI = torch.cat([w_event - w_difference, w_query + w_difference, w_product], 1)
        query_ED = spread(query_BD, lengths_B, events_ED.shape[0])
        z_EI = torch.cat([events_ED, query_ED, query_ED * events_ED], 1)
        weights, biases = [weight_AI], [self.bias_A]
        for layer in cast(Iterable[nn.Linear], self.deeper):
            weights.append(layer.weight)
            biases.append(layer.bias)
        *inner, last = self.activations
        for weight, bias, activation in zip(weights, biases, inner, strict=False):
            z_EI = self.dropout(activation(F.linear(z_EI, weight, bias)))
        if isinstance(last, Dice) and self.dropout.p == 0:
            return dice_scores(z_EI, weights[-1], biases[-1], last, self.score_A[0])
        hidden_EA: Tensor = self.dropout(last(F.linear(z_EI, weights[-1], biases[-1])))
        return hidden_EA.float() @ self.score_A[0]


def _several(widths: Any) -> Any:
    return (widths,) if isinstance(widths, int) else widths


class DIN(Ranker):
    """Deep interest network.

    Each sequence whose events share a table with candidate features is pooled by attention against those features;
    other sequences are mean-pooled.
    """

    name = "din"
    source = "Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018"
    needs_history = True

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            hidden: widths of the output MLP.
            attention_hidden: widths of the attention MLP; a single number is one layer.
            attention_activation, attention_dropout: of that MLP; the paper's is Dice without dropout.
            softmax: normalise the attention weights of a row to sum 1 (the paper does not).
            activation: of the output MLP; the paper's is `dice`.
        """

        hidden: Hidden = (256, 128, 64)
        attention_hidden: Annotated[tuple[PositiveInt, ...], BeforeValidator(_several), Field(min_length=1)] = (64,)
        attention_activation: Literal["dice", "relu"] = "dice"
        attention_dropout: Dropout = 0.0
        softmax: bool = False
        activation: Literal["relu", "dice"] = "relu"
        batch_norm: BatchNorm = False
        dropout: Dropout = 0.0

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.embeddings = EmbeddingCollection(schema, config.embeddings)
        self.numbers = NumberVectors(schema, config.embeddings)
        # Of each sequence the keys of its id fields, and the tokens that they are compared with.
        self.plans = [
            ([sequence.column(field) for field in sequence.id_fields], candidate_tokens(schema, sequence))
            for sequence in schema.sequences
        ]
        widths = [config.embedding_dim * len(keys) for keys, _ in self.plans]
        self.attentions = nn.ModuleList(
            TargetAttention(
                width,
                config.attention_hidden,
                softmax=config.softmax,
                activation=config.attention_activation,
                dropout=config.attention_dropout,
            )
            if targets
            else nn.Identity()
            for width, (_, targets) in zip(widths, self.plans, strict=True)
        )
        width = self.embeddings.flat_dim + sum(widths) + len(schema.numeric_columns) * config.embedding_dim
        self.mlp = MLP(
            width,
            config.hidden,
            self.num_tasks,
            activation=config.activation,
            batch_norm=config.batch_norm,
            dropout=config.dropout,
        )

    def output_biases(self) -> list[Tensor]:
        return [self.mlp.output_bias]

    def forward(self, batch: Batch) -> RankerOutput:
        embedded = self.embeddings(batch)
        parts = [embedded.flat]
        for (keys, targets), attention in zip(self.plans, self.attentions, strict=True):
            events = [embedded.events[key] for key in keys]
            events_ED = events[0] if len(events) == 1 else torch.cat(events, 1)
            lengths_B = embedded.lengths[keys[0]]
            if targets:
                tokens_BFD = embedded.tokens_BFD
                query_BD = torch.cat([tokens_BFD[:, target] for target in targets], 1)
                parts.append(attention(query_BD, events_ED, lengths_B))
            else:
                parts.append(segment_sum(events_ED, lengths_B, mean=True))
        if batch.numeric_BN.shape[1]:
            parts.append(self.numbers(batch).flatten(1))
        return RankerOutput(self.mlp(torch.cat(parts, 1)))
