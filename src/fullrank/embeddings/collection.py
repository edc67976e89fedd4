"""One module that looks up every id feature of a schema."""

# Shapes: B rows, F single-id features, K jagged keys, L longest sequence, D width, N ids looked up in one buffer.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings.optimizer import EmbeddingOptimizer
from fullrank.embeddings.row_buffer import STATES, Backend, RowBuffer
from fullrank.embeddings.segments import segment_sum
from fullrank.schema import MultiCategorical, Schema


@dataclass(frozen=True)
class Embedded:
    """Vectors of one batch.

    Attributes:
        flat: float32, shape (B, sum of widths): single-id features, pooled bags, then pooled sequences.
        widths: width of each of those tokens.
        events: vectors (sum of lengths, D) of each `<sequence>.<field>`, oldest first within a row.
        lengths: int64 lengths_B of each `<sequence>.<field>`.
    """

    flat: Tensor
    widths: tuple[int, ...]
    events: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens_BFD(self) -> Tensor:
        """The tokens of `flat` as one tensor.

        Raises:
            ValueError: if their widths differ.
        """
        if len(set(self.widths)) != 1:
            raise ValueError(f"this model needs one embedding width for all features, got {sorted(set(self.widths))}")
        return self.flat.view(self.flat.shape[0], len(self.widths), self.widths[0])

    def padded(self, key: str) -> tuple[Tensor, Tensor]:
        """history_BLD and mask_BL of one sequence field; L is the longest history of the batch (at least 1)."""
        return pad(self.events[key], self.lengths[key])


def pad(values: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Jagged rows (sum of lengths, D) to (B, L, D), zero beyond each row's end, and the mask of real entries."""
    longest = max(1, int(lengths_B.max())) if lengths_B.numel() else 1
    mask_BL = torch.arange(longest, device=values.device) < lengths_B[:, None]
    places = mask_BL.view(-1).nonzero().squeeze(1)
    padded = values.new_zeros((mask_BL.numel(), values.shape[1])).index_copy(0, places, values)
    return padded.view(*mask_BL.shape, values.shape[1]), mask_BL


class _Group:
    """Which columns of a batch are looked up in one buffer, and where their rows begin in it."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.first_row: dict[str, int] = {}
        self.rows = 0
        self.single: list[int] = []
        self.jagged: list[int] = []

    def add_table(self, table: str, rows: int) -> None:
        self.first_row[table] = self.rows
        self.rows += rows


class EmbeddingCollection(nn.Module):
    """Tables for all id features of a fitted schema, looked up together.

    Tables of equal width lie behind one another in one buffer, so that a batch costs one gather and one update
    however many features there are. Rows start from N(0, `init_std`²).

    `requires_grad_(False)`, on the collection or on any module around it, makes the tables stand still whatever their
    optimiser: no update, no decay, no penalty.

    Args:
        embedding_dim: width of tables that the schema does not size.
        backend: what updates rows in the fused kinds: `torch`, or FBGEMM's CPU kernels, whose results agree to float32
            rounding and which were no faster on any machine measured (benchmarks/embedding_backends.py).
        sequences: look up the events of sequences too.
        pool_sequences: give each id field of each sequence as one mean-pooled token in `flat` instead of `events`.
        check_ids: raise on an id outside its table, which costs one pass over the ids.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int,
        init_std: float = 1e-4,
        optimizer: EmbeddingOptimizer | None = None,
        backend: Backend = "torch",
        sequences: bool = True,
        pool_sequences: bool = False,
        check_ids: bool = True,
    ) -> None:
        super().__init__()
        self.check_ids = check_ids
        self.columns = schema.embedded()
        rows_of = schema.tables()
        self.single = tuple(feature.name for feature in schema.categorical)
        bags = tuple(bag.name for bag in schema.bags)
        events = tuple(key for key in schema.jagged_keys if key not in bags) if sequences else ()
        self.jagged = (*bags, *events)
        self.pooled = (*bags, *events) if pool_sequences else bags
        self.event_keys = () if pool_sequences else events
        width_of = {name: feature.embedding_dim or embedding_dim for name, feature in self.columns.items()}
        self.widths = tuple(width_of[name] for name in (*self.single, *self.pooled))
        self.group_of: dict[str, int] = {}
        self.groups: list[_Group] = []
        buffers: list[RowBuffer] = []
        for name in (*self.single, *self.jagged):
            table, width = self.columns[name].table_name, width_of[name]
            index = next((i for i, group in enumerate(self.groups) if group.width == width), None)
            if index is None:
                index = len(self.groups)
                self.groups.append(_Group(width))
            group = self.groups[index]
            if table not in group.first_row:
                group.add_table(table, rows_of[table])
            self.group_of[name] = index
            (group.single if name in self.single else group.jagged).append(
                (self.single if name in self.single else self.jagged).index(name)
            )
        for group in self.groups:
            buffers.append(RowBuffer(torch.randn(group.rows, group.width) * init_std, backend))
        self.buffers_ = nn.ModuleList(buffers)
        self._rows_of = {name: rows_of[self.columns[name].table_name] for name in (*self.single, *self.jagged)}
        for index, group in enumerate(self.groups):
            single = [group.first_row[self.columns[self.single[i]].table_name] for i in group.single]
            jagged = [group.first_row[self.columns[self.jagged[i]].table_name] for i in group.jagged]
            self.register_buffer(f"_single_offset_{index}", torch.tensor(single, dtype=torch.int64), persistent=False)
            self.register_buffer(f"_jagged_offset_{index}", torch.tensor(jagged, dtype=torch.int64), persistent=False)
        limits = torch.tensor([self._rows_of[name] for name in self.single], dtype=torch.int64)
        self.register_buffer("_single_rows", limits, persistent=False)
        self.set_optimizer(optimizer or EmbeddingOptimizer())

    @property
    def flat_dim(self) -> int:
        """Width of `Embedded.flat`."""
        return sum(self.widths)

    def num_parameters(self) -> int:
        return sum(group.rows * group.width for group in self.groups)

    def _row_buffers(self) -> Iterator[RowBuffer]:
        for buffer in self.buffers_:
            assert isinstance(buffer, RowBuffer)
            yield buffer

    def set_optimizer(self, optimizer: EmbeddingOptimizer) -> None:
        """Choose how tables learn, forgetting any optimiser state; weights stay."""
        self.optimizer = optimizer
        for buffer in self._row_buffers():
            buffer.set_optimizer(optimizer)

    def set_learning_rate(self, learning_rate: float) -> None:
        """For the fused kinds; kind `dense` has its rate in the model's optimiser."""
        for buffer in self._row_buffers():
            buffer.set_learning_rate(learning_rate)

    def before_step(self) -> None:
        """Call between the backward pass and the dense optimiser's step."""
        for buffer in self._row_buffers():
            buffer.before_step()

    def after_step(self) -> None:
        """Call after the dense optimiser's step."""
        for buffer in self._row_buffers():
            buffer.after_step()

    def flush(self) -> None:
        """Apply decay that lazy L2 still owes; done by itself before evaluation and saving."""
        for buffer in self._row_buffers():
            buffer.flush()

    def train(self, mode: bool = True) -> EmbeddingCollection:
        if not mode:
            self.flush()
        return super().train(mode)

    def forward(self, batch: Batch) -> Embedded:
        """Look up a batch.

        Raises:
            IndexError: if an id is outside its table; names the feature and the id.
        """
        if self.check_ids:
            self._check(batch)
        size = len(batch)
        counts, begins = self._jagged_places(batch)
        if len(self.groups) == 1:
            tokens, events = self._lookup(0, batch, counts, begins, size)
            flat = tokens[0].flatten(1) if len(tokens) == 1 else torch.cat([t.flatten(1) for t in tokens], 1)
        else:
            by_name: dict[str, Tensor] = {}
            events = {}
            for index, group in enumerate(self.groups):
                tokens, more = self._lookup(index, batch, counts, begins, size)
                names = [self.single[i] for i in group.single]
                names += [self.jagged[i] for i in group.jagged if self.jagged[i] in self.pooled]
                vectors = [vector for block in tokens for vector in block.unbind(1)]
                by_name.update(zip(names, vectors, strict=True))
                events.update(more)
            order = (*self.single, *self.pooled)
            flat = torch.cat([by_name[name] for name in order], 1) if order else batch.numeric_BN.new_zeros((size, 0))
        lengths = {key: batch.jagged_lengths_KB[batch.jagged_keys.index(key)] for key in self.event_keys}
        return Embedded(flat, self.widths, events, lengths)

    def lookup_single(self, ids_BF: Tensor) -> Tensor:
        """Vectors (B, sum of widths) of a collection that has single-id features of one width only."""
        if self.jagged or len(self.groups) != 1:
            raise ValueError("lookup_single is for collections of single-id features of one width")
        ids = (ids_BF + self.get_buffer("_single_offset_0")).view(-1)
        vectors: Tensor = self.buffers_[0](ids).view(ids_BF.shape[0], -1)
        return vectors

    def _jagged_places(self, batch: Batch) -> tuple[list[int], list[int]]:
        """Number of values and place of the first of each of our jagged keys."""
        if not self.jagged:
            return [], []
        if batch.jagged_keys[: len(self.jagged)] != self.jagged:
            raise ValueError(f"the batch has jagged keys {batch.jagged_keys}, the model was built for {self.jagged}")
        counts = batch.jagged_lengths_KB[: len(self.jagged)].sum(1).tolist()
        begins = [sum(counts[:i]) for i in range(len(counts))]
        return counts, begins

    def _lookup(
        self, index: int, batch: Batch, counts: list[int], begins: list[int], size: int
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Tokens of one buffer as blocks (B, fields, D), singles first, and its event vectors."""
        group = self.groups[index]
        single_offset = self.get_buffer(f"_single_offset_{index}")
        jagged_offset = self.get_buffer(f"_jagged_offset_{index}")
        whole = len(group.single) == len(self.single)
        ids = []
        if group.single:
            ids_BF = batch.ids_BF if whole else batch.ids_BF[:, group.single]
            ids.append((ids_BF + single_offset).view(-1))
        sizes = [counts[i] for i in group.jagged]
        if group.jagged:
            total = sum(sizes)
            if len(group.jagged) == len(self.jagged):
                values = batch.jagged_values[:total]
            else:
                values = torch.cat([batch.jagged_values[begins[i] : begins[i] + counts[i]] for i in group.jagged])
            if len(sizes) == 1:
                ids.append(values + jagged_offset)
            else:
                ids.append(values + jagged_offset.repeat_interleave(torch.tensor(sizes), output_size=total))
        if not ids:
            return [], {}
        vectors = self.buffers_[index](ids[0] if len(ids) == 1 else torch.cat(ids))
        pieces = vectors.split(([ids[0].numel()] if group.single else []) + sizes)
        tokens: list[Tensor] = []
        if group.single:
            tokens.append(pieces[0].view(size, len(group.single), group.width))
            pieces = pieces[1:]
        events: dict[str, Tensor] = {}
        for place, piece in zip(group.jagged, pieces, strict=True):
            name = self.jagged[place]
            if name in self.pooled:
                feature = self.columns[name]
                mean = feature.pooling == "mean" if isinstance(feature, MultiCategorical) else True
                lengths_B = batch.jagged_lengths_KB[place]
                tokens.append(segment_sum(piece, lengths_B, mean=mean)[:, None, :])
            else:
                events[name] = piece
        return tokens, events

    def _check(self, batch: Batch) -> None:
        if self.single:
            limits = self.get_buffer("_single_rows")
            if bool(((batch.ids_BF < 0) | (batch.ids_BF >= limits)).any()):
                bad = ((batch.ids_BF < 0) | (batch.ids_BF >= limits)).nonzero()[0]
                name = self.single[int(bad[1])]
                _refuse(name, int(batch.ids_BF[bad[0], bad[1]]), self._rows_of[name])
        begin = 0
        for place, name in enumerate(self.jagged):
            count = int(batch.jagged_lengths_KB[place].sum())
            values = batch.jagged_values[begin : begin + count]
            begin += count
            if count:
                low, high = torch.aminmax(values)
                if int(low) < 0 or int(high) >= self._rows_of[name]:
                    _refuse(name, int(low) if int(low) < 0 else int(high), self._rows_of[name])

    # State: one entry per table, whatever the backend and the grouping.

    def _tables(self) -> Iterator[tuple[str, RowBuffer, slice]]:
        rows = {self.columns[name].table_name: self._rows_of[name] for name in self._rows_of}
        for group, buffer in zip(self.groups, self._row_buffers(), strict=True):
            for table, first in group.first_row.items():
                yield table, buffer, slice(first, first + rows[table])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.flush()
        for table, buffer, rows in self._tables():
            destination[f"{prefix}tables.{table}.weight"] = buffer.weight_RD.detach()[rows]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key in [key for key in state if key.startswith(f"{prefix}buffers_.")]:
            del state[key]
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for table, buffer, rows in self._tables():
            key = f"{prefix}tables.{table}.weight"
            if key not in state_dict:
                missing_keys.append(key)
                continue
            value = state_dict[key]
            target = buffer.weight_RD.data[rows]
            if value.shape != target.shape:
                error_msgs.append(f'table "{table}" has shape {tuple(value.shape)}, expected {tuple(target.shape)}')
                continue
            target.copy_(value)
        for index in range(len(self.groups)):  # the buffers' own names are ours to fill: nothing is missing there
            state_dict[f"{prefix}buffers_.{index}.weight_RD"] = self._buffer(index).weight_RD.detach()

    def _buffer(self, index: int) -> RowBuffer:
        buffer = self.buffers_[index]
        assert isinstance(buffer, RowBuffer)
        return buffer

    def optimizer_state(self) -> dict[str, Tensor]:
        """State of the fused optimisers as `tables.<table>.<name>`, with `step` and the decay bookkeeping."""
        state: dict[str, Tensor] = {}
        self.flush()
        for index, buffer in enumerate(self._row_buffers()):
            state[f"groups.{index}.step"] = torch.tensor(buffer.step)
            state[f"groups.{index}.log_decay"] = torch.tensor(buffer.log_decay, dtype=torch.float64)
        for table, buffer, rows in self._tables():
            for name in STATES[self.optimizer.kind]:
                state[f"tables.{table}.{name}"] = buffer.states[name][rows]
        return state

    @torch.no_grad()
    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `optimizer_state()` of a collection with the same schema and optimiser.

        Raises:
            ValueError: if an entry is missing or has another shape.
        """
        for index, buffer in enumerate(self._row_buffers()):
            buffer.step = int(_entry(state, f"groups.{index}.step"))
            buffer.log_decay = float(_entry(state, f"groups.{index}.log_decay"))
            buffer.decay_is_applied()
        for table, buffer, rows in self._tables():
            for name in STATES[self.optimizer.kind]:
                value = _entry(state, f"tables.{table}.{name}")
                target = buffer.states[name][rows]
                if value.shape != target.shape:
                    raise ValueError(
                        f'state "{name}" of table "{table}" has shape {tuple(value.shape)}, expected '
                        f"{tuple(target.shape)}"
                    )
                target.copy_(value)


def _entry(state: dict[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f'the embedding state has no entry "{key}"')
    return state[key]


def _refuse(feature: str, value: int, rows: int) -> None:
    raise IndexError(f'feature "{feature}": id {value} is outside its table of {rows} rows')
