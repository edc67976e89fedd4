"""A user's logged embeddings as a feature of any ranker: pooled, and read as numbers."""

# Shapes: B rows, L events, D width of the codes shown, C bytes of a code, W words of 8 bytes of a code, E events of all
# rows together.

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, Tables
from fullrank.models.din import TargetAttention
from fullrank.schema import Schema
from fullrank.transfer.codec import code_bytes
from fullrank.transfer.keys import IdKind
from fullrank.transfer.lookup import HistorySequence

# Columns of `Batch.extra`: codes in words of 8 bytes, and seconds since each event; NaN where there is no event.
CODES, AGE = "transfer_codes", "transfer_age"
WORD = 8


class ServedHistory(BaseModel):
    """Which codes a server reads for a student: what it was trained with.

    Attributes:
        version: of the foundation model.
        days: that a history reaches back; null for all time.
        users, events: whether a log's user ids and request ids are numbers, or texts, whose hashes are filed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    days: int | None
    users: IdKind
    events: IdKind


class HistoryConfig(BaseModel):
    """The history of a student.

    Attributes:
        pooling: `sum`, `mean`, or `target_attention`: DIN's, weighted by the row's item.
        dim, bits: of the codes in the log.
        prefix: numbers of a code to read; null for all.
        length: most events.
        attention_hidden: units of the attention's layer.
        served: what a server has to know beside this; `export_student` is told it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Literal["sum", "mean", "target_attention"] = "sum"
    dim: int = Field(default=32, ge=1)
    bits: Literal[4, 32] = 4
    prefix: int | None = Field(default=None, ge=1)
    length: int = Field(default=50, ge=1)
    attention_hidden: int = Field(default=32, ge=1)
    served: ServedHistory | None = None

    @property
    def width(self) -> int:
        return self.dim if self.prefix is None else self.prefix


def history_tensors(sequence: HistorySequence, length: int) -> dict[str, Tensor]:
    """What a lookup found, for `Batch.extra`."""
    codes_BLC, age_BL = sequence.padded(length)
    rows, _, width = codes_BLC.shape
    words = -(-width // WORD)
    padded = np.zeros((rows, length, words * WORD), np.uint8)
    padded[:, :, :width] = codes_BLC
    whole = padded.reshape(rows, length * words * WORD).view(np.int64)
    return {CODES: torch.from_numpy(whole), AGE: torch.from_numpy(age_BL)}


def history_columns(sequence: HistorySequence, length: int) -> list[pl.Series]:
    """The same as columns of a frame."""
    found = history_tensors(sequence, length)
    kinds = {CODES: pl.Int64, AGE: pl.Float32}
    return [pl.Series(name, each.numpy(), dtype=pl.Array(kinds[name], each.shape[1])) for name, each in found.items()]


def decoded(batch: Batch, config: HistoryConfig) -> tuple[Tensor, Tensor]:
    """Values_BLD, and there_BL, which is False where there is no event."""
    age_BL, codes = batch.extra[AGE], batch.extra[CODES]
    rows, length = age_BL.shape
    raw_BLC = codes.contiguous().view(torch.uint8).view(rows, length, -1)
    raw_BLC = raw_BLC[:, :, : code_bytes(config.dim, config.bits)]
    if config.bits == 32:
        values_BLD = raw_BLC.contiguous().view(torch.float32)
    else:
        values_BLD = (torch.stack([raw_BLC & 15, raw_BLC >> 4], 3).flatten(2).float() - 8) / 8
    there_BL = ~age_BL.isnan()
    return values_BLD[:, :, : config.width].masked_fill(~there_BL[:, :, None], 0.0), there_BL


class HistoryPooling(nn.Module):
    """One vector of the events of each row; zero for none.

    The sum is divided by √L, so that it is a number of the size of others.

    Args:
        config: how.
        schema: has the item's features, which target attention looks at the events through.
    """

    def __init__(self, config: HistoryConfig, schema: Schema, tables: Tables) -> None:
        super().__init__()
        self.config = config
        if config.pooling == "target_attention":
            item = schema.select({"item"})
            if not item.categorical:
                raise ValueError("target attention over a history needs an item's id features; the schema has none")
            self.columns = Columns(schema, item)
            self.items = EmbeddingCollection(item, tables)
            self.query = nn.Linear(self.items.flat_dim, config.width)
            self.attention = TargetAttention(config.width, (config.attention_hidden,), softmax=True, activation="relu")

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pooled_BD and has_history_B."""
        values_BLD, there_BL = decoded(batch, self.config)
        lengths_B = there_BL.sum(1)
        if self.config.pooling == "target_attention":
            query_BD = self.query(self.items(self.columns(batch)).flat.float())
            pooled_BD = self.attention(query_BD, values_BLD[there_BL], lengths_B)
        else:
            mean = self.config.pooling == "mean"
            scale = lengths_B.clamp_min(1)[:, None] if mean else self.config.length**0.5
            pooled_BD = values_BLD.sum(1) / scale
        return pooled_BD, (lengths_B > 0).float()


class Columns:
    """The columns of a batch of one schema that a smaller schema has, in that one's order."""

    def __init__(self, whole: Schema, part: Schema) -> None:
        self.numeric = [whole.numeric_columns.index(name) for name in part.numeric_columns]
        names = [feature.name for feature in whole.categorical]
        self.ids = [names.index(feature.name) for feature in part.categorical]
        self.part = part
        self.same = part.numeric_columns == whole.numeric_columns and len(self.ids) == len(names)
        self.same &= part.jagged_keys == whole.jagged_keys and part.event_number_keys == whole.event_number_keys

    def __call__(self, batch: Batch) -> Batch:
        if self.same:
            return batch
        ids = [batch.jagged(key) for key in self.part.jagged_keys]
        numbers = [batch.events(key) for key in self.part.event_number_keys]
        return replace(
            batch,
            numeric_BN=batch.numeric_BN[:, self.numeric],
            ids_BF=batch.ids_BF[:, self.ids],
            jagged_keys=self.part.jagged_keys,
            jagged_values=torch.cat([v for v, _ in ids]) if ids else batch.jagged_values[:0],
            jagged_lengths_KB=torch.stack([n for _, n in ids]) if ids else batch.jagged_lengths_KB[:0],
            event_keys=self.part.event_number_keys,
            event_values=torch.cat([v for v, _ in numbers]) if numbers else batch.event_values[:0],
            event_lengths_EB=torch.stack([n for _, n in numbers]) if numbers else batch.event_lengths_EB[:0],
        )
