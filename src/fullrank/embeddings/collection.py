"""One module that looks up every id feature of a schema."""

# Shapes: B rows, F single-id features, K jagged keys, D width, N ids looked up in one buffer or of one table.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings.embedded import Embedded
from fullrank.embeddings.full import FullTable
from fullrank.embeddings.layout import Buffer, Layout, Place
from fullrank.embeddings.optimizer import EmbeddingOptimizer
from fullrank.embeddings.packed import PackedRows, Packing
from fullrank.embeddings.partitions import check_ids, check_integers
from fullrank.embeddings.row_buffer import STATES, Backend, RowBuffer
from fullrank.embeddings.segments import segment_sum
from fullrank.embeddings.table import BITS, TABLE_KINDS, Ask, Table, Tables
from fullrank.schema import MultiCategorical, Schema


class _Composed(NamedTuple):
    """Columns of a table that is not plain, as indices among the collection's single and jagged ones."""

    single: list[int]
    jagged: list[int]


class _Lookup(NamedTuple):
    """What one table that is not plain wants: its ids, column by column, the rows that they ask for, and where these
    are found among the buffers' results."""

    ids_N: Tensor
    sizes: list[int]
    asks: list[Ask]
    found_at: list[tuple[int, int]]


class EmbeddingCollection(nn.Module):
    """Tables for all id features of a fitted schema, looked up together.

    Parts of tables of equal width lie behind one another in one buffer, so that a batch costs one gather and one update
    per width however many features there are.

    `requires_grad_(False)`, on the collection or on any module around it, makes the tables stand still whatever their
    optimiser: no update, no decay, no penalty.

    Args:
        tables: widths, start and kinds; kinds of tables that the schema does not have are left aside.
        backend: what updates rows in the fused kinds: `torch`, or FBGEMM's CPU kernels, whose results agree to float32
            rounding and which were no faster on any machine measured (benchmarks.embedding_backends).
        sequences: look up the events of sequences too.
        pool_sequences: give each id field of each sequence as one mean-pooled token in `flat` instead of `events`.
        check_ids: raise on an id outside its table, which costs one pass over the ids.

    Attributes:
        kinds: of the tables that are not plain, by the table's name.
        token_columns: the column that each token of `Embedded.flat` is of: each one once, and behind them again those
            whose ids have several vectors.

    Raises:
        ValueError: if a kind cannot be made at its table's size, or its ids have several vectors and events need one.
    """

    def __init__(
        self,
        schema: Schema,
        tables: Tables,
        *,
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
        width_of = {name: feature.embedding_dim or tables.embedding_dim for name, feature in self.columns.items()}
        self._width_of = {name: width_of[name] for name in (*self.single, *self.jagged)}
        self._rows_of = {name: rows_of[self.columns[name].table_name] for name in (*self.single, *self.jagged)}
        self.layout = Layout()
        self.kinds: dict[str, Table] = {}
        self._composed: dict[str, _Composed] = {}
        for name in (*self.single, *self.jagged):
            table = self.columns[name].table_name
            if table not in self.layout.places:
                self._add_table(table, rows_of[table], width_of[name], tables)
            index = (self.single if name in self.single else self.jagged).index(name)
            looked_up: Buffer | _Composed = (
                self._composed[table]
                if table in self._composed
                else self.layout.buffers[self.layout.places[table][0].buffer]
            )
            (looked_up.single if name in self.single else looked_up.jagged).append(index)
        several = {table: kind.tokens for table, kind in self.kinds.items() if kind.tokens > 1}
        for name in self.event_keys:
            if self.columns[name].table_name in several:
                raise ValueError(
                    f'table "{self.columns[name].table_name}": an id of it has several vectors, and one that is looked '
                    f'up for events ("{name}") needs one: choose another operation than features'
                )
        once = (*self.single, *self.pooled)
        further = [name for name in once for _ in range(several.get(self.columns[name].table_name, 1) - 1)]
        self._several = {name: width_of[name] for name in dict.fromkeys(further)}
        self.token_columns = (*once, *further)
        self.widths = tuple(width_of[name] for name in self.token_columns)
        names = [name for name, _ in self._part_names()]
        if len(set(names)) < len(names):
            raise ValueError(f"two parts of tables share a name in the state: {max(names, key=names.count)}")
        self.kind_modules = nn.ModuleList(self.kinds.values())
        self.buffers_ = nn.ModuleList(_made(buffer, backend) for buffer in self.layout.buffers)
        for index, buffer in enumerate(self.layout.buffers):
            for what, columns, own in (("single", buffer.single, self.single), ("jagged", buffer.jagged, self.jagged)):
                first = [self.layout.places[self.columns[own[i]].table_name][0].rows.start for i in columns]
                offset = torch.tensor(first, dtype=torch.int64)
                self.register_buffer(f"_{what}_offset_{index}", offset, persistent=False)
        limits = torch.tensor([self._rows_of[name] for name in self.single], dtype=torch.int64)
        self.register_buffer("_single_rows", limits, persistent=False)
        self.set_optimizer(optimizer or EmbeddingOptimizer())

    def _add_table(self, name: str, rows: int, width: int, tables: Tables) -> None:
        try:
            config = tables.kind_of(name, rows) or FullTable.Config()
            table = TABLE_KINDS.find(config.kind)(rows, width, tables.init_std, config)
        except ValueError as error:
            raise ValueError(f'table "{name}": {error}') from None
        stored = table.parts if config.store == "float32" else [part.stored(config.store) for part in table.parts]
        self.layout.place(name, stored)
        if not isinstance(table, FullTable):
            self.kinds[name] = table
            self._composed[name] = _Composed([], [])

    @property
    def flat_dim(self) -> int:
        """Width of `Embedded.flat`."""
        return sum(self.widths)

    def num_parameters(self) -> int:
        """Stored numbers, those in codes too, and what the kinds have beside them."""
        packed = sum(buffer.numbers() for buffer in self.buffers_ if isinstance(buffer, PackedRows))
        return packed + sum(parameter.numel() for parameter in self.parameters())

    def parts(self) -> Iterator[tuple[str, str, Packing | None]]:
        """Of each part of each table: the table, its name in the state, and how its rows are packed, if they are."""
        names = self._part_names()
        for table, places in self.layout.places.items():
            for place in places:
                buffer = self._buffer(place.buffer)
                yield table, f"{next(names)[0]}.weight", buffer.packing if isinstance(buffer, PackedRows) else None

    def packed_tables(self) -> list[str]:
        """Tables of which a part is stored as codes: they cannot learn."""
        return sorted({table for table, _, packing in self.parts() if packing is not None})

    def table_widths(self) -> dict[str, int]:
        """Width of the vectors of each table that is looked up here."""
        return {self.columns[name].table_name: width for name, width in self._width_of.items()}

    @torch.no_grad()
    def vectors(self, table: str, ids_N: Tensor) -> Tensor:
        """What ids of a table become, whatever its kind; shape (N, width).

        Raises:
            KeyError: if there is no such table.
            IndexError: if an id is outside it.
            TypeError: if ids are no integers.
        """
        check_ids(ids_N, self._table_rows(table), f'table "{table}"')
        return self._vectors(table, ids_N)

    def materialize(self, table: str) -> Tensor:
        """The plain table that a table stands for, shape (rows, width): row i is what id i becomes.

        With optimiser `dense`, gradients go through it to what is stored.
        """
        ids_N = torch.arange(self._table_rows(table), device=self._buffer(0).stored.device)
        return self._vectors(table, ids_N)

    def _table_rows(self, table: str) -> int:
        (place, *_) = self.layout.places[table]
        return self.kinds[table].rows if table in self.kinds else place.rows.stop - place.rows.start

    def _vectors(self, table: str, ids_N: Tensor) -> Tensor:
        self.flush()
        places = self.layout.places[table]
        kind = self.kinds.get(table)
        asks = [Ask(0, ids_N)] if kind is None else kind.asks(ids_N)
        found = []
        for ask in asks:
            buffer, rows = places[ask.part]
            found.append(self._buffer(buffer).rows(ask.rows + rows.start))
        return found[0] if kind is None else kind.combine(ids_N, asks, found)

    def _learn(self, kind: Table, places: list[Place], ids_N: Tensor) -> Tensor:
        """Let a table take note of the ids of a step, if its rows learn; the ids to look up."""
        buffers = [self.buffers_[place.buffer] for place in places]
        if not all(isinstance(buffer, RowBuffer) and buffer.weight_RD.requires_grad for buffer in buffers):
            return ids_N
        ids_N, fresh = kind.learn(ids_N)
        for part, rows, like in fresh:
            buffer, first = buffers[part], places[part].rows.start
            assert isinstance(buffer, RowBuffer)
            buffer.start_anew(rows + first, like + first)
        return ids_N

    @torch.no_grad()
    def forget_fresh(self, state_of: Callable[[nn.Parameter], Mapping[str, Tensor]]) -> None:
        """Forget what the model's own optimiser knows of rows that have started anew; call it before its step. The
        fused kinds have forgotten it themselves.

        Args:
            state_of: its tensors of a parameter; those of the parameter's shape have a row for each of its rows.
        """
        for buffer in self._row_buffers():
            if buffer.fresh:
                rows, weight_RD = torch.cat(buffer.fresh), buffer.weight_RD
                for value in state_of(weight_RD).values():
                    if value.shape == weight_RD.shape:
                        value.index_fill_(0, rows, 0)
                buffer.fresh = []

    def weights(self) -> list[nn.Parameter]:
        """The rows of all tables, one parameter per buffer; what else kinds have is not in it."""
        return [buffer.weight_RD for buffer in self._row_buffers()]

    def weight_bytes(self) -> int:
        """Bytes of the rows of all tables in the optimiser's storage."""
        return sum(buffer.nbytes for buffer in self._row_buffers())

    def _row_buffers(self) -> Iterator[RowBuffer]:
        """Of rows that learn."""
        return (buffer for buffer in self.buffers_ if isinstance(buffer, RowBuffer))

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
            TypeError: if ids are no integers.
        """
        if self.check_ids:
            self._check(batch)
        counts, begins = self._jagged_places(batch)
        lengths = {key: batch.jagged_lengths_KB[batch.jagged_keys.index(key)] for key in self.event_keys}
        if len(self.layout.buffers) == 1 and not self.kinds:
            single, pieces, _ = self._gather(0, batch, counts, begins, [])
            pooled, events = self._place_jagged(pieces, batch)
            tokens = [*([] if single is None else [single.flatten(1)]), *pooled.values()]
            return Embedded(_side_by_side(tokens, batch), self.widths, events, lengths)
        wanted: list[list[Tensor]] = [[] for _ in self.layout.buffers]
        lookups = {table: self._ask(table, batch, counts, begins, wanted) for table in self.kinds}
        by_name: dict[str, Tensor] = {}
        events, found = {}, []
        for index, buffer in enumerate(self.layout.buffers):
            single, pieces, asked = self._gather(index, batch, counts, begins, wanted[index])
            if single is not None:
                by_name.update(zip((self.single[i] for i in buffer.single), single.unbind(1), strict=True))
            pooled, more = self._place_jagged(pieces, batch)
            by_name.update(pooled)
            events.update(more)
            found.append(asked)
        for table, lookup in lookups.items():
            single, pieces = self._combine(table, lookup, found, len(batch))
            if single is not None:
                names = (self.single[i] for i in self._composed[table].single)
                by_name.update(zip(names, single.unbind(1), strict=True))
            pooled, more = self._place_jagged(pieces, batch)
            by_name.update(pooled)
            events.update(more)
        further = [by_name[name][:, width:] for name, width in self._several.items()]
        by_name |= {name: by_name[name][:, :width] for name, width in self._several.items()}
        tokens = [*(by_name[name] for name in (*self.single, *self.pooled)), *further]
        return Embedded(_side_by_side(tokens, batch), self.widths, events, lengths)

    def _jagged_places(self, batch: Batch) -> tuple[list[int], list[int]]:
        """Number of values and place of the first of each of our jagged keys."""
        if not self.jagged:
            return [], []
        if batch.jagged_keys[: len(self.jagged)] != self.jagged:
            raise ValueError(f"the batch has jagged keys {batch.jagged_keys}, the model was built for {self.jagged}")
        counts = batch.jagged_lengths_KB[: len(self.jagged)].sum(1).tolist()
        begins = [sum(counts[:i]) for i in range(len(counts))]
        return counts, begins

    def _gather(
        self, index: int, batch: Batch, counts: list[int], begins: list[int], wanted: list[Tensor]
    ) -> tuple[Tensor | None, dict[int, Tensor], list[Tensor]]:
        """Vectors of one buffer: of its plain single columns, (B, columns, D), of each of its plain jagged columns, and
        of the rows that other tables want."""
        buffer = self.layout.buffers[index]
        ids, sizes = [], []
        if buffer.single:
            whole = len(buffer.single) == len(self.single)
            ids_BF = batch.ids_BF if whole else batch.ids_BF[:, buffer.single]
            single_offset: Tensor = getattr(self, f"_single_offset_{index}")  # five times cheaper than get_buffer
            ids.append((ids_BF + single_offset).view(-1))
            sizes.append(ids[0].numel())
        jagged_sizes = [counts[i] for i in buffer.jagged]
        if buffer.jagged:
            total = sum(jagged_sizes)
            if len(buffer.jagged) == len(self.jagged):
                whole = len(self.jagged) == len(batch.jagged_keys)
                values = batch.jagged_values if whole else batch.jagged_values[:total]
            else:
                values = torch.cat([batch.jagged_values[begins[i] : begins[i] + counts[i]] for i in buffer.jagged])
            offset: Tensor = getattr(self, f"_jagged_offset_{index}")
            if torch.compiler.is_exporting():
                offset = torch.cat([one.expand(size) for one, size in zip(offset, jagged_sizes, strict=True)])
            elif len(jagged_sizes) > 1:
                offset = offset.repeat_interleave(torch.tensor(jagged_sizes), output_size=total)
            ids.append(values + offset)
        ids += wanted
        sizes += [*jagged_sizes, *(rows.numel() for rows in wanted)]
        if not ids:
            return None, {}, []
        vectors = self.buffers_[index](ids[0] if len(ids) == 1 else torch.cat(ids))
        pieces = list(torch.split(vectors, sizes))
        single = pieces.pop(0).view(len(batch), len(buffer.single), buffer.width) if buffer.single else None
        jagged = dict(zip(buffer.jagged, pieces, strict=False))
        return single, jagged, pieces[len(jagged) :]

    def _ask(
        self, table: str, batch: Batch, counts: list[int], begins: list[int], wanted: list[list[Tensor]]
    ) -> _Lookup:
        """Add the rows that a table wants of each buffer to `wanted`."""
        columns = self._composed[table]
        ids = [batch.jagged_values[begins[i] : begins[i] + counts[i]] for i in columns.jagged]
        if columns.single:
            ids.insert(0, batch.ids_BF[:, columns.single].reshape(-1))
        ids_N = ids[0] if len(ids) == 1 else torch.cat(ids)
        kind, places = self.kinds[table], self.layout.places[table]
        if kind.learns_ids and self.training and torch.is_grad_enabled():
            ids_N = self._learn(kind, places, ids_N)
        asks = kind.asks(ids_N)
        found_at = []
        for ask in asks:
            place = places[ask.part]
            found_at.append((place.buffer, len(wanted[place.buffer])))
            wanted[place.buffer].append(ask.rows + place.rows.start)
        return _Lookup(ids_N, [part.numel() for part in ids], asks, found_at)

    def _combine(
        self, table: str, lookup: _Lookup, found: list[list[Tensor]], size: int
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """A table's vectors: of its single columns (B, columns, D), and of each of its jagged columns."""
        columns = self._composed[table]
        vectors = [found[buffer][place] for buffer, place in lookup.found_at]
        pieces = list(torch.split(self.kinds[table].combine(lookup.ids_N, lookup.asks, vectors), lookup.sizes))
        single = pieces.pop(0).view(size, len(columns.single), -1) if columns.single else None
        return single, dict(zip(columns.jagged, pieces, strict=True))

    def _place_jagged(self, pieces: dict[int, Tensor], batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Pooled vectors (B, D) of the columns that are pooled, and the vectors of the events of the others."""
        pooled: dict[str, Tensor] = {}
        events: dict[str, Tensor] = {}
        for place, piece in pieces.items():
            name = self.jagged[place]
            if name in self.pooled:
                feature = self.columns[name]
                mean = feature.pooling == "mean" if isinstance(feature, MultiCategorical) else True
                pooled[name] = segment_sum(piece, batch.jagged_lengths_KB[place], mean=mean)
            else:
                events[name] = piece
        return pooled, events

    def _check(self, batch: Batch) -> None:
        for what, ids in (("ids_BF", batch.ids_BF), ("jagged_values", batch.jagged_values)):
            check_integers(ids, what)
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

    # State: one entry per part of a table, whatever the backend and the layout.

    def _part_names(self) -> Iterator[tuple[str, Place]]:
        for table, places in self.layout.places.items():
            names = [f".{part.name}" for part in self.kinds[table].parts] if table in self.kinds else [""]
            for name, place in zip(names, places, strict=True):
                yield f"tables.{table}{name}", place

    def _parts(self) -> Iterator[tuple[str, RowBuffer | PackedRows, slice]]:
        """Each part's name in the state, its buffer and its rows there."""
        for name, place in self._part_names():
            yield name, self._buffer(place.buffer), place.rows

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.flush()
        for name, buffer, rows in self._parts():
            destination[f"{prefix}{name}.weight"] = buffer.state(rows)

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
        for name, buffer, rows in self._parts():
            key = f"{prefix}{name}.weight"
            if key not in state_dict:
                missing_keys.append(key)
                continue
            value = state_dict[key]
            expected = buffer.stored[rows].shape
            if value.shape != expected:
                error_msgs.append(f'"{key}" has shape {tuple(value.shape)}, expected {tuple(expected)}')
                continue
            misfit = buffer.misfit(value)
            if misfit is not None:
                error_msgs.append(f'"{key}" {misfit}')
                continue
            buffer.load(rows, value)
        for index, rows_of_buffer in enumerate(self.buffers_):  # nothing is missing under their own names
            if isinstance(rows_of_buffer, RowBuffer):
                state_dict[f"{prefix}buffers_.{index}.weight_RD"] = rows_of_buffer.stored

    def stored(self, place: Place) -> Tensor:
        """The rows of a part as they lie in memory: the upper plane of `split`, the bytes of codes."""
        return self._buffer(place.buffer).stored[place.rows]

    def _buffer(self, index: int) -> RowBuffer | PackedRows:
        buffer = self.buffers_[index]
        assert isinstance(buffer, RowBuffer | PackedRows)
        return buffer

    def _learning_parts(self) -> Iterator[tuple[str, RowBuffer, slice]]:
        return ((name, buffer, rows) for name, buffer, rows in self._parts() if isinstance(buffer, RowBuffer))

    def optimizer_state(self) -> dict[str, Tensor]:
        """State of the fused optimisers as `tables.<table>.<name>`, with `step` and the decay bookkeeping."""
        state: dict[str, Tensor] = {}
        self.flush()
        for index, buffer in enumerate(self._row_buffers()):
            state[f"groups.{index}.step"] = torch.tensor(buffer.step)
            state[f"groups.{index}.log_decay"] = torch.tensor(buffer.log_decay, dtype=torch.float64)
        for part, buffer, rows in self._learning_parts():
            for name in STATES[self.optimizer.kind]:
                state[f"{part}.{name}"] = buffer.states[name][rows]
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
        for part, buffer, rows in self._learning_parts():
            for name in STATES[self.optimizer.kind]:
                value = _entry(state, f"{part}.{name}")
                target = buffer.states[name][rows]
                if value.shape != target.shape:
                    raise ValueError(
                        f'the embedding state "{part}.{name}" has shape {tuple(value.shape)}, expected '
                        f"{tuple(target.shape)}"
                    )
                target.copy_(value)


def _made(buffer: Buffer, backend: Backend) -> RowBuffer | PackedRows:
    if buffer.store == "float32":
        return RowBuffer(buffer.start(), backend)
    return PackedRows(buffer.rows, Packing(buffer.width, BITS[buffer.store]))


def _side_by_side(tokens: list[Tensor], batch: Batch) -> Tensor:
    if not tokens:
        return batch.numeric_BN.new_zeros((len(batch), 0))
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens, 1)


def _entry(state: dict[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f'the embedding state has no entry "{key}"')
    return state[key]


def _refuse(feature: str, value: int, rows: int) -> None:
    raise IndexError(f'feature "{feature}": id {value} is outside its table of {rows} rows')
