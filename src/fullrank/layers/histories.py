"""A batch as feature tokens and histories, jagged or padded: what models of behaviour sequences start from."""

# Shapes: B rows, F tokens, D width, E events of all rows together, L longest history of the batch, C channels of an
# event, N components of the numbers' codes.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, Tables
from fullrank.embeddings.padding import Padding
from fullrank.layers.numbers import CODE_START, SCALAR_START, NumberCodes
from fullrank.schema import Schema, Sequence


@dataclass(frozen=True)
class Events:
    """One sequence of a batch, row after row, oldest event first.

    Attributes:
        channels_EC: vectors of the id fields, then x·v of each number field, side by side.
        lengths_B: int64, events of each row.
        age_E: seconds between event and request, or None where the schema has no such field.
    """

    channels_EC: Tensor
    lengths_B: Tensor
    age_E: Tensor | None


@dataclass(frozen=True)
class History:
    """One sequence of a batch, oldest event first, padded at the end.

    Attributes:
        channels_BLC: vectors of the id fields, then x·v of each number field, side by side; zero in the padding.
        mask_BL: bool, true where there is an event.
        age_BL: seconds between event and request (0 in the padding), or None where the schema has no such field.
    """

    channels_BLC: Tensor
    mask_BL: Tensor
    age_BL: Tensor | None


class FeaturesAndHistories(nn.Module):
    """tokens_BFD of all features but sequences (all numbers together give one token), and a `History` per sequence.

    Args:
        tables: their width is D, their start also that of the vectors of events' numbers.
        age_field: name of the number field of an event that holds its age in seconds at request time, raw or log1p.

    Attributes:
        num_tokens: F.
        channels: C of each sequence.
        targets: for each sequence, the tokens that share the tables of its id fields (the candidate item, its
            category, ...), field by field; empty unless every id field has one.

    Raises:
        ValueError: if the schema has no features, or a sequence has no id field.
    """

    def __init__(self, schema: Schema, tables: Tables, *, age_field: str = "age") -> None:
        super().__init__()
        self.width = embedding_dim = tables.embedding_dim
        self.sequences = schema.sequences
        self.age_field = age_field
        self.ids = EmbeddingCollection(schema, tables)
        numbers = len(schema.numeric_columns)
        self.num_tokens = len(self.ids.widths) + (numbers > 0)
        if not self.num_tokens and not schema.sequences:
            raise ValueError("the schema has no features")
        self.codes = NumberCodes(schema)
        start = SCALAR_START if self.codes.width == numbers else CODE_START
        self.number_token_ND = nn.Parameter(torch.randn(self.codes.width, embedding_dim) * start) if numbers else None
        self.event_numbers = nn.ParameterDict(
            {
                sequence.name: nn.Parameter(torch.randn(len(sequence.number_fields), embedding_dim) * tables.init_std)
                for sequence in schema.sequences
                if sequence.number_fields
            }
        )
        self.channels = [embedding_dim * len(sequence.fields) for sequence in schema.sequences]
        self.targets = [candidate_tokens(schema, sequence) for sequence in schema.sequences]

    def forward(self, batch: Batch) -> tuple[Tensor, list[History]]:
        tokens_BFD, jagged = self.events(batch)
        histories = []
        for events in jagged:
            padding = Padding.of(events.lengths_B)
            age_BL = None if events.age_E is None else padding.pad(events.age_E[:, None]).squeeze(2)
            histories.append(History(padding.pad(events.channels_EC), padding.mask_BL, age_BL))
        return tokens_BFD, histories

    def events(self, batch: Batch) -> tuple[Tensor, list[Events]]:
        """tokens_BFD, and the histories without padding."""
        embedded = self.ids(batch)
        parts = [embedded.tokens_BFD] if embedded.widths else []
        if self.number_token_ND is not None:
            parts.append((self.codes(batch) @ self.number_token_ND)[:, None, :])
        tokens_BFD = torch.cat(parts, 1) if parts else batch.numeric_BN.new_zeros(len(batch), 0, self.width)
        jagged = []
        for sequence in self.sequences:
            keys = [sequence.column(field) for field in sequence.id_fields]
            channels, lengths_B = [embedded.events[key] for key in keys], embedded.lengths[keys[0]]
            age_E = None
            for index, field in enumerate(sequence.number_fields):
                number, _ = batch.events(sequence.column(field))
                channels.append(number[:, None] * self.event_numbers[sequence.name][index])
                if field.name == self.age_field:
                    age_E = torch.expm1(number) if field.transform == "log1p" else number
            jagged.append(Events(torch.cat(channels, 1) if len(channels) > 1 else channels[0], lengths_B, age_E))
        return tokens_BFD, jagged


def latest(tokens_BLD: Tensor, mask_BL: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most recent real events of each row, oldest first, and which of them exist.

    Rows with fewer events have zeros in front.

    Returns:
        Shapes (B, count, D) and (B, count).
    """
    length_B1 = mask_BL.sum(1, keepdim=True)
    place_BK = length_B1 - count + torch.arange(count, device=mask_BL.device)
    exists_BK = place_BK >= 0
    index_BKD = place_BK.clamp_min(0)[:, :, None].expand(-1, -1, tokens_BLD.shape[2])
    return tokens_BLD.gather(1, index_BKD).masked_fill(~exists_BK[:, :, None], 0.0), exists_BK


def candidate_tokens(schema: Schema, sequence: Sequence) -> list[int]:
    """The tokens that share the tables of a sequence's id fields, field by field: what events are compared with.

    Empty unless every id field has one.

    Raises:
        ValueError: if the sequence has no id field.
    """
    if not sequence.id_fields:
        raise ValueError(f'sequence "{sequence.name}" has no id field: a model of histories needs one')
    single = [feature.table_name for feature in schema.categorical]
    found = [single.index(field.table_name) for field in sequence.id_fields if field.table_name in single]
    return found if len(found) == len(sequence.id_fields) else []
