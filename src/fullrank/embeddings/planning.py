"""A kind and a size for every table of a model, within a budget of bytes."""

# Shapes: R rows of a table, K settings that there are for it.

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fullrank.embeddings.dimensions import DEFAULT_TEMPERATURE, equal_count_blocks
from fullrank.embeddings.full import FullTable
from fullrank.embeddings.memory import table_bytes
from fullrank.embeddings.mixed_dimension import MixedDimensionTable
from fullrank.embeddings.partitions import balanced_sizes, digits, quotient_remainder_sizes
from fullrank.embeddings.quotient_remainder import QuotientRemainderTable
from fullrank.embeddings.table import TableConfig
from fullrank.registry import Registry

NUM_BLOCKS = 4
# Smaller tables are not worth two parts.
LEAST_ROWS_TO_SHARE = 200
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class TableUse:
    """A table, and what is asked of it.

    Attributes:
        counts: lookups of each id in training, shape (R,).
        widths: of its vectors, one for each collection of the model that has the table.
    """

    counts: npt.NDArray[np.int64]
    widths: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.counts)

    def bytes(self, config: TableConfig) -> int:
        """What the table takes with these settings, in all collections."""
        return sum(table_bytes(config, self.rows, width) for width in self.widths)


class Choice(NamedTuple):
    """Settings that a table may have.

    Attributes:
        bytes: in all collections.
        loss: share of the variance of a looked-up vector that the settings are expected to lose, on average over the
            lookups; from 0, a plain table, to 1.
    """

    config: TableConfig
    bytes: int
    loss: float


# Kind -> what of it there is to choose for a table: settings and expected loss. A plain table loses 0.
Offers = Callable[[TableUse], Iterator[tuple[TableConfig, float]]]
OFFERS: Registry[Offers] = Registry(
    "kind to plan with",
    "fullrank.table_offers",
    {name: f"{__name__}:{name}_offers" for name in ("full", "mixed_dimension", "quotient_remainder")},
)


def full_offers(use: TableUse) -> Iterator[tuple[TableConfig, float]]:
    """The plain table."""
    yield FullTable.Config(), 0.0


def mixed_dimension_offers(use: TableUse) -> Iterator[tuple[TableConfig, float]]:
    """Blocks of about equal counts, all of width 1 first; then, again and again, the block wider by one that gains most
    per number stored.

    Width d keeps the first d of D directions, whose variances fall as k^(-1 / 0.3): the spectrum for which the paper's
    rule with its usual temperature is the best one.
    """
    width = min(use.widths)
    # An id that was never looked up counts a little: some later log may ask for it.
    sizes = equal_count_blocks(use.counts + 1e-3, NUM_BLOCKS)
    if sizes[-1] < len(sizes):  # too few for shares whose sum is below 1
        sizes = [use.rows]
    share_B = np.add.reduceat(use.counts, np.cumsum([0, *sizes[:-1]])) / max(use.counts.sum(), 1)
    variance_D = np.arange(1, width + 1) ** (-1 / DEFAULT_TEMPERATURE)
    lost = 1 - np.cumsum(variance_D) / variance_D.sum()  # with d directions: lost[d - 1]
    dims = [1] * len(sizes)
    while min(dims) < width:
        yield _blocks(sizes, dims, use.rows), float(share_B @ lost[np.array(dims) - 1])
        gains = [
            -1.0 if dim == width else share * (lost[dim - 1] - lost[dim]) / (size + width)
            for size, share, dim in zip(sizes, share_B, dims, strict=True)
        ]
        dims[int(np.argmax(gains))] += 1


def quotient_remainder_offers(use: TableUse) -> Iterator[tuple[TableConfig, float]]:
    """2, 4, 8, ... collisions, and three digits, of tables of more than 200 ids.

    A row that ids share is their mean by lookups: of id i, asked for in a share q_i of the lookups, it explains q_i / P
    of the variance, P being the share of the row. The rows of an id explain the sum, less what the mean of all ids does
    for each but one.
    """
    if use.rows <= LEAST_ROWS_TO_SHARE:
        return
    share_R = use.counts / max(use.counts.sum(), 1)
    mean = float((share_R**2).sum())

    def lost(sizes: Sequence[int]) -> float:
        kept = (1 - len(sizes)) * mean
        for digit_R in digits(torch.arange(use.rows), sizes, "remainder"):
            row_R = digit_R.numpy()
            shared = np.bincount(row_R, weights=share_R)[row_R]
            kept += float(np.divide(share_R**2, shared, out=np.zeros(use.rows), where=shared > 0).sum())
        return max(0.0, 1 - kept)

    collisions = 2
    while collisions * 2 <= use.rows:
        sizes = quotient_remainder_sizes(use.rows, collisions)
        yield QuotientRemainderTable.Config(collisions=collisions), lost(sizes)
        collisions *= 2
    yield QuotientRemainderTable.Config(num_partitions=3), lost(balanced_sizes(use.rows, 3))


@dataclass(frozen=True)
class MemoryPlan:
    """What each table should be.

    Attributes:
        budget: bytes.
        rows: ids of each table.
        before: bytes of each table as it would be without a plan.
        choices: by table.
        fixed: bytes of tables that were not to be planned.
    """

    budget: int
    rows: dict[str, int]
    before: dict[str, int]
    choices: dict[str, Choice]
    fixed: int = 0

    @property
    def bytes(self) -> int:
        """Of all tables; never above the budget."""
        return self.fixed + sum(choice.bytes for choice in self.choices.values())

    def tables(self) -> dict[str, dict[str, object]]:
        """What `model.tables` of a recipe says of them; plain tables are left out."""
        return {
            table: {"kind": choice.config.kind, **choice.config.model_dump(mode="json", exclude_defaults=True)}
            for table, choice in self.choices.items()
            if choice.config.kind != "full"
        }


def plan_memory(
    uses: Mapping[str, TableUse],
    budget: int,
    *,
    fixed: int = 0,
    kinds: Collection[str] | None = None,
) -> MemoryPlan:
    """Choose kind and size of every table so that together they take at most `budget` bytes.

    Every table starts with the settings that take least. Then, again and again, the change of a table is made that
    saves most expected loss per byte, as long as one fits. Expected loss is summed over lookups, so a table counts by
    how often it is asked, and its popular ids by how often they are. Nothing is random; of equal changes the first
    table's is made.

    Args:
        uses: by table.
        fixed: bytes of the budget that other tables take.
        kinds: names in `OFFERS` to choose among; default all.

    Raises:
        ValueError: if the budget is below what the tables take at least; says how much that is.
    """
    offers = [OFFERS.find(kind) for kind in (OFFERS if kinds is None else kinds)]
    options: dict[str, list[Choice]] = {}
    for table, use in uses.items():
        found = [Choice(config, use.bytes(config), loss) for offer in offers for config, loss in offer(use)]
        if not found:
            found = [Choice(FullTable.Config(), use.bytes(FullTable.Config()), 0.0)]
        options[table] = sorted(found, key=lambda choice: (choice.bytes, choice.loss))
    chosen = {table: found[0] for table, found in options.items()}
    room = budget - fixed - sum(choice.bytes for choice in chosen.values())
    if room < 0:
        raise ValueError(f"a budget of {budget:,} bytes is too small: the tables take at least {budget - room:,}")

    def best(table: str) -> tuple[float, Choice] | None:
        """The change of a table that saves most per byte, of those that fit."""
        now, lookups = chosen[table], float(uses[table].counts.sum())
        better = [choice for choice in options[table] if choice.loss < now.loss and choice.bytes <= now.bytes + room]
        gains = [(lookups * (now.loss - choice.loss) / max(choice.bytes - now.bytes, 1), choice) for choice in better]
        return max(gains, key=lambda gain: gain[0], default=None)

    changes = {table: best(table) for table in options}
    while True:
        for table, change in changes.items():
            if change is not None and change[1].bytes > chosen[table].bytes + room:
                changes[table] = best(table)
        possible = {table: change for table, change in changes.items() if change is not None}
        if not possible:
            break
        table = max(possible, key=lambda name: possible[name][0])
        room -= possible[table][1].bytes - chosen[table].bytes
        chosen[table] = possible[table][1]
        changes[table] = best(table)
    rows = {table: use.rows for table, use in uses.items()}
    before = {table: use.bytes(FullTable.Config()) for table, use in uses.items()}
    return MemoryPlan(budget, rows, before, chosen, fixed)


def bytes_of(text: str, whole: int) -> int:
    """Bytes that a text stands for: 200MB, 1.5GiB, 4096, or 25%, of `whole`.

    Raises:
        ValueError: if it is no such text.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:(%)|([KMGT]?I?)B?)\s*", text.upper())
    if found is None:
        raise ValueError(f'expected a number of bytes, such as 200MB, 1.5GiB or 25%, got "{text}"')
    number, percent, unit = found.groups()
    if percent:
        return int(float(number) * whole / 100)
    if unit not in _UNITS:
        raise ValueError(f'expected a number of bytes, such as 200MB, 1.5GiB or 25%, got "{text}"')
    return int(float(number) * _UNITS[unit])


def _blocks(sizes: list[int], dims: list[int], rows: int) -> MixedDimensionTable.Config:
    """Blocks of these sizes, neighbours of one width together."""
    merged: list[list[int]] = []
    for size, dim in zip(sizes, dims, strict=True):
        if merged and merged[-1][1] == dim:
            merged[-1][0] += size
        else:
            merged.append([size, dim])
    if len(merged) == 1:
        return MixedDimensionTable.Config(dim=merged[0][1])
    shares = tuple(_share(size, rows) for size, _ in merged[:-1])
    return MixedDimensionTable.Config(dims=tuple(dim for _, dim in merged), shares=shares)


def _share(size: int, rows: int) -> float:
    """The shortest number which, times the rows, is this many whole ones."""
    exact = (size + 0.5) / rows
    short = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    return next((share for share in short if int(share * rows) == size), exact)
