"""The memory plan of a model for a dataset."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from fullrank.data.dataset import Dataset
from fullrank.data.lookups import lookup_counts
from fullrank.embeddings import EmbeddingCollection
from fullrank.embeddings.memory import table_memory
from fullrank.embeddings.planning import OFFERS, MemoryPlan, TableUse, bytes_of, plan_memory
from fullrank.models import RankerSpec
from fullrank.schema import RAW_IDS

# Stands for every table that is to be planned while we look where the model has it: made at any size and width.
_PROBE = {"kind": "quotient_remainder", "collisions": 1}


def plan_tables(
    model: Mapping[str, Any] | str, dataset: Dataset, budget: int | str, *, kinds: Collection[str] | None = None
) -> MemoryPlan:
    """Choose kinds of a ranker's tables by how often their ids are looked up in the training rows of a dataset.

    What cannot be planned is counted as it is: tables of which `model.tables` says another kind than those to choose
    among, those of raw ids, and small vectors beside the tables, such as those of first-order terms.

    Args:
        model: as in a recipe: `name` and the fields of its Config.
        budget: bytes of all tables, as a number or a text: 200MB, 1.5GiB, 25% of what they take when all are plain.
        kinds: to choose among; default all of `OFFERS`.

    Raises:
        ValueError: as `plan_memory`, or if the model is wrong.
    """
    values: dict[str, Any] = {"name": model} if isinstance(model, str) else dict(model)
    known = dataset.schema.tables()
    given = dict(values.get("tables") or {})
    raw = {table for table, rows in known.items() if rows >= RAW_IDS}
    kept = {table: settings for table, settings in given.items() if _kind(settings) not in OFFERS or table in raw}
    planned = [table for table in known if table not in kept and table not in raw]
    probe = {**values, "tables": {**kept, **dict.fromkeys(planned, _PROBE)}}
    with torch.device("meta"):
        ranker = RankerSpec.of(probe).fitted(dataset.encoders).build(dataset.schema)
    widths: dict[str, list[int]] = {}
    fixed = 0
    for collection in ranker.modules():
        if not isinstance(collection, EmbeddingCollection):
            continue
        for table, memory in table_memory(collection).items():
            if table in planned and table in collection.kinds:
                widths.setdefault(table, []).append(memory.width)
            else:
                fixed += memory.bytes
    counts = lookup_counts(dataset)
    uses = {table: TableUse(counts[table], tuple(widths[table])) for table in planned if table in widths}
    if isinstance(budget, str):
        plain = fixed + sum(4 * use.rows * sum(use.widths) for use in uses.values())
        budget = bytes_of(budget, plain)
    return plan_memory(uses, budget, fixed=fixed, kinds=kinds)


def _kind(settings: Any) -> object:
    return settings.get("kind") if isinstance(settings, Mapping) else settings
