"""A trained ranker without the rows of rare ids, or of those whose vectors are small."""

# Shapes: R rows of a table.

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fullrank.embeddings import EmbeddingCollection
from fullrank.embeddings.memory import table_memory
from fullrank.embeddings.pruned import DROPPED, PrunedTable
from fullrank.models import Ranker
from fullrank.schema import FIRST_VOCABULARY_ID

By = Literal["count", "norm"]


@dataclass(frozen=True)
class PruneReport:
    """What became of one table.

    Attributes:
        rows, kept: before and after.
        before, after: bytes, those of the remap included.
        left: why it is what it was; None if it is pruned.
    """

    table: str
    rows: int
    kept: int
    before: int
    after: int
    left: str | None = None


def prune_ranker(
    ranker: Ranker,
    counts: Mapping[str, Tensor],
    *,
    by: By = "count",
    min_count: int | None = None,
    share: float | None = None,
    tables: Collection[str] | None = None,
) -> tuple[Ranker, list[PruneReport]]:
    """The same ranker, in evaluation mode, with plain tables that store the rows of some ids only; the one given stays.

    A dropped id has the zero vector. The missing and the unknown id are always kept. A table stays as it is if it is
    not plain, if no id would be dropped, or if it would not become smaller by it: the remap takes 4 bytes an id.

    Args:
        counts: by table, how often each id was seen in training, int64 (R,).
        by: what ids are ordered by: their count, or the norm of their row.
        min_count: drop ids that were seen less often; or
        share: drop this share of the ids, from the least on.
        tables: names of those to prune; default all.

    Raises:
        ValueError: if an argument is outside its range, a table is not known, or the ranker has codes already.
    """
    if by not in get_args(By):
        raise ValueError(f"by is {by!r}, expected count or norm")
    if (min_count is None) == (share is None):
        raise ValueError("expected either a minimum count or a share")
    if min_count is not None and (by != "count" or min_count < 0):
        raise ValueError(f"a minimum count is at least 0 and goes by count, got {min_count} by {by}")
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"share is {share}, expected 0 to 1")
    known = ranker.schema.tables()
    for name in tables or ():
        if name not in known:
            raise ValueError(f'there is no table "{name}"; the model has {", ".join(known) or "none"}')
    if ranker.packed_tables():
        raise ValueError(f'table "{ranker.packed_tables()[0]}" is quantised already: prune first, then quantise')
    left = dict.fromkeys((name for name in known if tables is not None and name not in tables), "not chosen")
    for _, collection in _collections(ranker):
        left = {name: f"of kind {kind.config.kind}" for name, kind in collection.kinds.items()} | left
    state = ranker.state_dict()
    kept: dict[str, Tensor] = {}
    candidates = {name: rows for name, rows in known.items() if name not in left}
    places = _places(_with_pruned(ranker, candidates), candidates)
    left |= dict.fromkeys(candidates.keys() - places.keys(), "the ranker has it plain")
    for name, keys in places.items():
        weights = [state[old] for old, *_ in keys]
        if by == "count" and len(counts.get(name, ())) != candidates[name]:
            left[name] = "has no counts: its ids are not those of a vocabulary"
            continue
        score_R = counts[name] if by == "count" else torch.cat(weights, 1).norm(dim=1)
        kept[name] = _kept(score_R, min_count, share)
        saved = sum((len(w) - len(kept[name])) * w.shape[1] * w.itemsize - 4 * len(w) for w in weights)
        if len(kept[name]) == candidates[name]:
            left[name] = "no id would be dropped"
        elif saved <= 0:
            left[name] = "would not be smaller"
    kept = {name: ids for name, ids in kept.items() if name not in left}
    smaller = _with_pruned(ranker, {name: len(ids) for name, ids in kept.items()})
    before = _bytes(ranker)
    state = _renumbered(ranker, smaller)
    for name, keys in _places(smaller, kept).items():
        for old, new, remap in keys:
            weight_RD = state.pop(old)
            state[new] = weight_RD.index_select(0, kept[name])
            state[remap] = torch.full((len(weight_RD),), DROPPED, dtype=torch.int32)
            state[remap][kept[name]] = torch.arange(len(kept[name]), dtype=torch.int32)
    smaller.load_state_dict(state)
    after = _bytes(smaller)
    reports = [
        PruneReport(name, rows, len(kept.get(name, range(rows))), before[name], after[name], left.get(name))
        for name, rows in known.items()
        if name in before
    ]
    return smaller.eval(), reports


def _kept(score_R: Tensor, min_count: int | None, share: float | None) -> Tensor:
    """Ids that keep their row, in order; of equal ids the first."""
    score_R = score_R[FIRST_VOCABULARY_ID:]
    if share is None:
        ids = (score_R >= (min_count or 0)).nonzero().squeeze(1)
    else:
        ids = score_R.argsort(descending=True, stable=True)[: len(score_R) - int(share * len(score_R))].sort().values
    return torch.cat([torch.arange(FIRST_VOCABULARY_ID), ids + FIRST_VOCABULARY_ID])


def _collections(ranker: Ranker) -> Iterator[tuple[str, EmbeddingCollection]]:
    for name, module in ranker.named_modules():
        if isinstance(module, EmbeddingCollection):
            yield f"{name}." if name else "", module


def _places(ranker: Ranker, tables: Collection[str]) -> dict[str, list[tuple[str, str, str]]]:
    """Of each of these tables that is pruned, wherever it lies: names of plain rows, kept ones and remap."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for prefix, collection in _collections(ranker):
        for number, (name, kind) in enumerate(collection.kinds.items()):
            if name in tables and isinstance(kind, PrunedTable):
                rows = f"{prefix}tables.{name}"
                remap = f"{prefix}kind_modules.{number}.remap_R"
                found.setdefault(name, []).append((f"{rows}.weight", f"{rows}.rows.weight", remap))
    return found


def _renumbered(ranker: Ranker, smaller: Ranker) -> dict[str, Tensor]:
    """The state of a ranker, what kinds of tables have of their own under the numbers that they have in another."""
    state: dict[str, Tensor] = dict(ranker.state_dict())
    moved: dict[str, Tensor] = {}
    for (prefix, old), (_, new) in zip(_collections(ranker), _collections(smaller), strict=True):
        numbers = {name: number for number, name in enumerate(new.kinds)}
        for number, (name, kind) in enumerate(old.kinds.items()):
            for key in kind.state_dict():
                value = state.pop(f"{prefix}kind_modules.{number}.{key}")
                moved[f"{prefix}kind_modules.{numbers[name]}.{key}"] = value
    return state | moved


def _bytes(ranker: Ranker) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, collection in _collections(ranker):
        for name, memory in table_memory(collection).items():
            found[name] = found.get(name, 0) + memory.bytes
    return found


def _with_pruned(ranker: Ranker, kept_rows: Mapping[str, int]) -> Ranker:
    """A new ranker of the same settings in which these tables are pruned to so many rows."""
    kinds = {name: {"kind": "pruned", "kept_rows": rows} for name, rows in kept_rows.items()}
    with torch.random.fork_rng(devices=[]):
        return type(ranker).from_config(ranker.schema, _written(ranker.config.model_dump(mode="json"), kinds))


def _written(config: Any, kinds: Mapping[str, Mapping[str, Any]]) -> Any:
    """A config with settings of some tables written down; a ranker may hold rankers, whose configs lie in its own."""
    if isinstance(config, list):
        return [_written(item, kinds) for item in config]
    if not isinstance(config, dict):
        return config
    config = {key: _written(value, kinds) for key, value in config.items()}
    if isinstance(config.get("tables"), dict):
        config["tables"] |= kinds
    return config
