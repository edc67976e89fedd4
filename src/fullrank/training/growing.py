"""A trained ranker for a schema with more ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fullrank.embeddings import TABLE_KINDS, EmbeddingCollection
from fullrank.embeddings.growing import grown_state
from fullrank.models import Ranker, RankerSpec
from fullrank.schema import Schema


def grown(model: Ranker, schema: Schema) -> Ranker:
    """The same ranker with the tables of a schema that has more ids, each of which starts as the out-of-vocabulary id.

    So it says of every row what `model` says of it. A table that is not plain keeps the layout of its first ids, which
    its config remembers as `first_rows`.

    Raises:
        ValueError: if a table, or another part of the model that has a row for each id, cannot grow.
    """
    before, after = model.schema.tables(), schema.tables()
    grows = {table: rows for table, rows in before.items() if after[table] > rows}

    def written(name: str, table: dict[str, Any]) -> dict[str, Any]:
        if table["kind"] == "full":
            return table
        return {**table, "first_rows": table["first_rows"] or grows.get(name)}

    config = with_tables(model.config.model_dump(mode="json"), written)
    with torch.random.fork_rng(devices=[]):
        larger = type(model).from_config(schema, config)
    state, modules = model.state_dict(), dict(model.named_modules())
    for name, module in larger.named_modules():
        if isinstance(module, EmbeddingCollection):
            small = modules[name]
            assert isinstance(small, EmbeddingCollection)
            prefix = f"{name}." if name else ""
            state.update({f"{prefix}{key}": value for key, value in grown_state(small, module).items()})
    for name, value in larger.state_dict().items():
        if state[name].shape != value.shape:
            raise ValueError(f"{model.name} cannot grow: its {name} depends on the number of ids; train anew")
    larger.load_state_dict(state)
    return larger.train(model.training)


def same_settings(model: Ranker, spec: RankerSpec) -> bool:
    """Whether a ranker is what a recipe asks for; it may have grown since, and codes may come from another file."""

    def asked(_: str, table: dict[str, Any]) -> dict[str, Any]:
        return {**table, **dict.fromkeys(TABLE_KINDS.find(table["kind"]).Config.written), "codes": None}

    written = (with_tables(config.model_dump(mode="json"), asked) for config in (model.config, spec.config))
    return model.name == spec.name and next(written) == next(written)


def with_tables(config: Any, change: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Any:
    """A config whose tables are what `change` makes of the name and the config of each.

    A ranker may hold rankers, whose configs lie somewhere in its own.
    """
    if isinstance(config, list):
        return [with_tables(item, change) for item in config]
    if not isinstance(config, dict):
        return config
    config = {key: with_tables(value, change) for key, value in config.items()}
    tables = config.get("tables")
    if isinstance(tables, dict):
        config["tables"] = {name: change(name, table) for name, table in tables.items()}
    return config


def grown_optimizers(
    state: Mapping[str, Tensor], small: Ranker, large: Ranker, fresh: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a local engine knows of `small`, for `large`, which `grown` made of it: rows that are new start fresh.

    Args:
        state: `LocalEngine.state()` of `small`.
        fresh: the same of `large` before its first step.
    """
    result = {**fresh, **state}
    collections = {
        name: (module, other)
        for (name, module), other in zip(large.named_modules(), small.modules(), strict=True)
        if isinstance(module, EmbeddingCollection) and isinstance(other, EmbeddingCollection)
    }
    for key, value in state.items():
        what, _, rest = key.partition("|")
        name, _, _ = rest.partition("|")
        if what == "tables" and key in fresh and fresh[key].shape != value.shape:
            longer = fresh[key].clone()
            longer[: len(value)] = value
            result[key] = longer
        elif what == "optimizer" and value.ndim:
            for prefix, (new, old) in collections.items():
                before = f"{prefix}.buffers_." if prefix else "buffers_."
                if name.startswith(before):
                    result[key] = _moved(value, int(name.removeprefix(before).split(".")[0]), old, new)
    return result


def _moved(value_RD: Tensor, buffer: int, small: EmbeddingCollection, large: EmbeddingCollection) -> Tensor:
    """What goes by rows of a buffer of `small`, for the same buffer of `large`, in which parts lie elsewhere."""
    moved = value_RD.new_zeros(large.layout.buffers[buffer].rows, *value_RD.shape[1:])
    for table, places in large.layout.places.items():
        for old, new in zip(small.layout.places[table], places, strict=True):
            if new.buffer == buffer:
                count = old.rows.stop - old.rows.start
                moved[new.rows.start : new.rows.start + count] = value_RD[old.rows]
    return moved
