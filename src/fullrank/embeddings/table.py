"""What a table is: which parts it stores, which of their rows an id asks for, how those become one vector."""

# Shapes: N ids looked up together, M rows asked of a part, D width of the table's vectors.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny
from torch import Tensor, nn

from fullrank.embeddings.packed import Packing
from fullrank.registry import Registry
from fullrank.schema import RAW_IDS

# How the numbers of a part lie in memory; a buffer holds parts of one store. Codes with a scale and a bias for each row
# (`fullrank quantize`) are for serving: they do not learn.
Store = Literal["float32", "int8", "int4", "int2"]
BITS: dict[Store, Literal[2, 4, 8]] = {"int8": 8, "int4": 4, "int2": 2}


@dataclass(frozen=True)
class Part:
    """Rows that a table stores.

    Attributes:
        name: within its table; empty for the only part of a plain table.
        init_std: standard deviation of the normal distribution around 0 that the rows start from.
        store: parts of equal width and store lie in one buffer.
    """

    name: str
    rows: int
    width: int
    init_std: float
    store: Store = "float32"

    def stored(self, store: Store) -> Part:
        """The same part in another store; as it is if that would not make it smaller."""
        is_smaller = store not in BITS or Packing(self.width, BITS[store]).row_bytes < 4 * self.width
        return replace(self, store=store) if is_smaller else self


class Ask(NamedTuple):
    """Rows that some ids want of one part.

    Attributes:
        part: index in `Table.parts`.
        rows: int64, shape (M,).
        of: int64, shape (M,): which of the N ids each row is for; None when it is one row for each id, in order.
    """

    part: int
    rows: Tensor
    of: Tensor | None = None


class Fresh(NamedTuple):
    """Rows of one part that have become those of other ids: they start anew, without optimiser state.

    Attributes:
        part: index in `Table.parts`.
        rows: int64, distinct, shape (M,).
        like: the row of the part that they start as.
    """

    part: int
    rows: Tensor
    like: int


class TableConfig(BaseModel):
    """Settings of one kind of table.

    Attributes:
        kind: its name; a subclass sets it to a literal.
        store: how its rows lie in memory. `fullrank quantize` writes down codes; a model with them cannot be trained.
        first_rows: ids that the table was made for, if it has grown since. A warm start writes it down.
        written: fields that training fills in, and a recipe leaves out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    written: ClassVar[tuple[str, ...]] = ("first_rows",)

    kind: str
    store: Store = "float32"
    first_rows: int | None = Field(default=None, ge=2)

    def fitted(self, counts: npt.NDArray[np.int64]) -> Self:
        """The settings for a table whose ids occur this often in training, if they depend on it.

        Args:
            counts: of each id of a vocabulary, shape (rows,); 0 of the reserved ids, then falling.
        """
        return self


class Table(nn.Module):
    """Base of the table kinds.

    A kind stores parts and says what of them makes the vector of an id. The collection around it keeps the parts, all
    those of one width in one buffer, looks rows up, pools bags and updates rows. A kind may have parameters of its own,
    which the model's optimiser moves.

    A table grows when a later log brings new ids: it is then made with more rows, and `config.first_rows` says how many
    it was made for. The vectors of the first ids must stay, and that of a new one be what the out-of-vocabulary id has
    if each added row of a part, and of a buffer with a row for each id, is a copy of what that id asks for.

    Args:
        rows: ids are 0 to rows - 1.
        width: D.
        init_std: standard deviation that an entry of an id's vector should start with.

    Attributes:
        parts: what is stored. Set by the subclass.
        first_rows: ids below it are laid out as if there were no others.
        tokens: vectors of width D that an id has, side by side in what `combine` gives.
        grows: whether it can grow; a subclass that obeys the above says so.
        learns_ids: whether which row an id asks for depends on the ids that training has looked up, through `learn`.
    """

    Config: ClassVar[type[TableConfig]]
    grows: ClassVar[bool] = False
    learns_ids: ClassVar[bool] = False
    parts: tuple[Part, ...]
    tokens: int = 1

    def __init__(self, rows: int, width: int, init_std: float, config: TableConfig) -> None:
        super().__init__()
        self.rows, self.width, self.init_std, self.config = rows, width, init_std, config
        self.first_rows = config.first_rows or rows
        if self.first_rows > rows:
            raise ValueError(f"first_rows is {self.first_rows}, and the table has {rows} rows")

    def asks(self, ids_N: Tensor) -> list[Ask]:
        """The stored rows that make the vectors of int64 ids, each in 0 to rows - 1."""
        raise NotImplementedError

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        """Vectors (N, tokens · D) of the ids that `asks` was called with, from the rows that it named, (M, width of the
        part) each."""
        raise NotImplementedError

    def learn(self, ids_N: Tensor) -> tuple[Tensor, list[Fresh]]:
        """Take note of the ids that a step of training looks up, before it does, if `learns_ids`.

        Returns:
            The ids that the step shall look up instead, each in its place, and the rows that are another id's now.
        """
        raise NotImplementedError

    def num_parameters(self) -> int:
        """Numbers that learn: those of the parts, and parameters of the kind's own."""
        return sum(part.rows * part.width for part in self.parts) + sum(own.numel() for own in self.parameters())

    def memory_bytes(self) -> int:
        """Bytes of the parts as they are stored, and of the kind's own parameters and buffers; no optimiser state."""
        own = (*self.parameters(), *self.buffers())
        bytes_of: dict[str, int] = {part.store: getattr(torch, part.store).itemsize for part in self.parts}
        stored = sum(part.rows * part.width * bytes_of[part.store] for part in self.parts)
        return stored + sum(tensor.numel() * tensor.element_size() for tensor in own)


TABLE_KINDS: Registry[type[Table]] = Registry(
    "table kind",
    "fullrank.table_kinds",
    {
        "full": "fullrank.embeddings.full:FullTable",
        "hash": "fullrank.embeddings.hashed:HashedTable",
        "quotient_remainder": "fullrank.embeddings.quotient_remainder:QuotientRemainderTable",
        "chinese_remainder": "fullrank.embeddings.chinese_remainder:ChineseRemainderTable",
        "custom_partitions": "fullrank.embeddings.custom_partitions:CustomPartitionsTable",
        "mixed_dimension": "fullrank.embeddings.mixed_dimension:MixedDimensionTable",
        "individual": "fullrank.embeddings.individual:IndividualTable",
        "prefix": "fullrank.embeddings.prefix:PrefixTable",
        "pruned": "fullrank.embeddings.pruned:PrunedTable",
        "admitted": "fullrank.embeddings.admitted:AdmittedTable",
    },
)


def register(kind: type[Table]) -> type[Table]:
    """List a kind of table under the `kind` of its Config; usable as a decorator.

    Raises:
        ValueError: if the name is taken.
    """
    name = kind.Config.model_fields["kind"].default
    if not isinstance(name, str):
        raise ValueError(f'{kind.__name__}.Config needs a default for "kind", such as: kind: Literal["mine"] = "mine"')
    return TABLE_KINDS.register(name, kind)


def _config(value: Any) -> Any:
    if isinstance(value, TableConfig):
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping) or "kind" not in value:
        raise ValueError(f"expected a mapping with kind: {', '.join(TABLE_KINDS)}")
    return TABLE_KINDS.find(value["kind"]).Config.model_validate(dict(value))


# In a recipe: {kind: quotient_remainder, collisions: 8}, or the name of a kind alone.
AnyTable = Annotated[SerializeAsAny[TableConfig], BeforeValidator(_config)]


class Tables(BaseModel):
    """How a model stores its tables: handed as one object to every layer that has some.

    Attributes:
        embedding_dim: width of every table that the schema does not size itself.
        init_std: standard deviation that the entries of an id's vector start with.
        kinds: by the table's name; those not named are plain.
        only_raw: whether `kinds` are for tables of raw ids alone, which cannot be plain.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    embedding_dim: int = Field(default=16, ge=1)
    init_std: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    kinds: dict[str, AnyTable] = {}
    only_raw: bool = False

    def of_width(self, embedding_dim: int) -> Tables:
        """Plain tables of another width, started alike; those of raw ids are of the same kind."""
        return Tables(embedding_dim=embedding_dim, init_std=self.init_std, kinds=self.kinds, only_raw=True)

    def kind_of(self, table: str, rows: int) -> TableConfig | None:
        """What a table of so many ids is, None for plain.

        Raises:
            ValueError: if it has raw ids and no kind.
        """
        found = None if self.only_raw and rows < RAW_IDS else self.kinds.get(table)
        if rows >= RAW_IDS and (found is None or found.kind == "full"):
            raise ValueError(
                "its ids are raw, and a table cannot have a row for each: say what it is in the model's tables, such "
                f"as {table}: {{kind: admitted, capacity: 100000}}, or {{kind: hash, stored_rows: 100000}}"
            )
        return found
