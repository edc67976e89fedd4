"""DIN: the history seen through the candidate, by an attention MLP on (candidate, event) pairs."""

# Shapes: B rows, D vector of an event (all its id fields side by side), A width of the attention layer,
# E events of all rows together.

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection
from fullrank.embeddings.collection import segment_sum
from fullrank.layers.mlp import MLP
from fullrank.layers.tokens import NumberVectors
from fullrank.models.base import Ranker, RankerOutput
from fullrank.schema import EventId, Schema, Sequence


class TargetAttention(nn.Module):
    """Σ_t a_t k_t with a_t = wᵀ dice(W [q, k_t, q-k_t, q⊙k_t] + b).

    Works on the events there are, not on padding. W is used as W_q+W_d on q (once per row), W_k-W_d on k and W_p on
    q⊙k, which halves the multiplications of the paper's formula and changes nothing else.

    Dice(x) = p x + (1-p) α x with p = σ of the standardised x. Deviation: its statistics are taken over real events
    only; the authors' code includes padding.
    """

    def __init__(self, width: int, hidden: int, *, softmax: bool) -> None:
        super().__init__()
        self.softmax = softmax
        self.weight_A4D = nn.Parameter(torch.empty(hidden, 4 * width))
        self.bias_A = nn.Parameter(torch.zeros(hidden))
        self.alpha_A = nn.Parameter(torch.zeros(hidden))
        self.norm = nn.BatchNorm1d(hidden, eps=1e-8, momentum=0.01, affine=False)
        self.score_A = nn.Parameter(torch.empty(1, hidden))
        self.score_bias = nn.Parameter(torch.zeros(1))
        nn.init.xavier_normal_(self.weight_A4D)
        nn.init.xavier_normal_(self.score_A)

    def forward(self, query_BD: Tensor, events_ED: Tensor, lengths_B: Tensor) -> Tensor:
        """Pooled history_BD; zero for an empty history."""
        if events_ED.shape[0] == 0:
            return torch.zeros_like(query_BD) + 0 * self.score_bias
        size = lengths_B.numel()
        row_E = torch.repeat_interleave(
            torch.arange(size, device=lengths_B.device), lengths_B, output_size=events_ED.shape[0]
        )
        w_query, w_event, w_difference, w_product = self.weight_A4D.chunk(4, dim=1)
        per_row_BA = F.linear(query_BD, w_query + w_difference, self.bias_A)
        product_ED = events_ED * query_BD.index_select(0, row_E)
        x_EA = F.linear(torch.cat([events_ED, product_ED], 1), torch.cat([w_event - w_difference, w_product], 1))
        x_EA = x_EA + per_row_BA.index_select(0, row_E)
        gated_EA = x_EA * torch.sigmoid(self._standardised(x_EA))
        # wᵀ dice(x) = (w α)ᵀ x + (w (1-α))ᵀ (p x): no pass over (E, A) but the two products.
        direct = self.score_A * self.alpha_A
        score_E1 = F.linear(x_EA, direct) + F.linear(gated_EA, self.score_A - direct)
        score_E = score_E1.float().squeeze(1) + self.score_bias
        if self.softmax:
            score_E = _softmax_by_row(score_E, row_E, size)
        return torch.zeros_like(query_BD).index_add(0, row_E, events_ED * score_E[:, None])

    def _standardised(self, x_EA: Tensor) -> Tensor:
        if self.training and x_EA.shape[0] == 1:  # one event has no variance to learn from
            return F.batch_norm(x_EA, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)
        result: Tensor = self.norm(x_EA)
        return result


def _softmax_by_row(score_E: Tensor, row_E: Tensor, size: int) -> Tensor:
    top_B = score_E.new_full((size,), -torch.inf).scatter_reduce(0, row_E, score_E.detach(), "amax")
    weight_E = torch.exp(score_E - top_B.index_select(0, row_E))
    total_B = weight_E.new_zeros(size).index_add(0, row_E, weight_E)
    return weight_E / total_B.index_select(0, row_E)


class DIN(Ranker):
    """Deep interest network.

    Each sequence whose events share a table with candidate features is pooled by attention against those features;
    other sequences are mean-pooled.
    """

    name = "din"
    source = "Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018"

    class Config(Ranker.Config):
        hidden: tuple[int, ...] = (256, 128, 64)
        attention_hidden: int = Field(default=64, ge=1)
        softmax: bool = False
        batch_norm: bool = False
        dropout: float = 0.0

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.embeddings = EmbeddingCollection(
            schema, embedding_dim=config.embedding_dim, init_std=config.embedding_init
        )
        self.numbers = NumberVectors(schema, config.embedding_dim, config.embedding_init)
        self.plans = [_plan(schema, sequence) for sequence in schema.sequences]
        widths = [config.embedding_dim * len(keys) for keys, _ in self.plans]
        self.attentions = nn.ModuleList(
            TargetAttention(width, config.attention_hidden, softmax=config.softmax) if targets else nn.Identity()
            for width, (_, targets) in zip(widths, self.plans, strict=True)
        )
        width = self.embeddings.flat_dim + sum(widths) + len(schema.numeric_columns) * config.embedding_dim
        self.mlp = MLP(width, config.hidden, self.num_tasks, batch_norm=config.batch_norm, dropout=config.dropout)

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
                query_BD = tokens_BFD[:, targets].flatten(1)
                parts.append(attention(query_BD, events_ED, lengths_B))
            else:
                parts.append(segment_sum(events_ED, lengths_B, mean=True))
        if batch.numeric_BN.shape[1]:
            parts.append(self.numbers(batch).flatten(1))
        return RankerOutput(self.mlp(torch.cat(parts, 1)))


def _plan(schema: Schema, sequence: Sequence) -> tuple[list[str], list[int]]:
    """Event keys of a sequence, and the token that each is compared with (none unless every field has one)."""
    single = [feature.table_name for feature in schema.categorical]
    fields: list[EventId] = list(sequence.id_fields)
    if not fields:
        raise ValueError(f'DIN needs id fields, sequence "{sequence.name}" has none')
    keys = [sequence.column(field) for field in fields]
    targets = [single.index(field.table_name) for field in fields if field.table_name in single]
    return keys, targets if len(targets) == len(fields) else []
