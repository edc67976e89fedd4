"""A trained ranker with its tables as codes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fullrank.compression.quantization import RANGE_METHODS, Method, QuantizedTable, quantize_table
from fullrank.embeddings import EmbeddingCollection
from fullrank.embeddings.packed import Bits, Packing
from fullrank.embeddings.table import BITS, Store
from fullrank.models import Ranker


@dataclass(frozen=True)
class PartReport:
    """What became of one part of a table.

    Attributes:
        name: in the state of the ranker.
        before, after: bytes.
        normalized_l2: of the error; 0 for a part that was left.
        left: why its rows are what they were; None if they are codes.
    """

    table: str
    name: str
    rows: int
    width: int
    before: int
    after: int
    normalized_l2: float = 0.0
    left: str | None = None


def quantize_ranker(
    ranker: Ranker,
    bits: Bits = 4,
    method: Method = "greedy",
    *,
    tables: Collection[str] | None = None,
    max_error: float | None = None,
    nbins: int = 200,
    ratio: float = 0.16,
    starts: int = 0,
) -> tuple[Ranker, list[PartReport]]:
    """The same ranker, in evaluation mode, with the rows of its tables as codes; the one given stays as it is.

    Every kind of table is quantised part by part; projections and all else stay in float32, and so do parts that would
    not become smaller, such as the weights of a linear term.

    Args:
        tables: names of those to quantise; default all.
        max_error: leave a table of which a part's normalised error would be larger.
        nbins, ratio, starts: see `quantize_table`.

    Raises:
        ValueError: if an argument is outside its range, a table is not known, the ranker has codes already, or the
            method is one of codebooks, which are not served.
    """
    if method not in RANGE_METHODS:
        raise ValueError(f"method {method} has no form that is served: expected one of {', '.join(RANGE_METHODS)}")
    if bits not in BITS.values():
        raise ValueError(f"bits is {bits!r}, expected 2, 4 or 8")
    known = ranker.schema.tables()
    for name in tables or ():
        if name not in known:
            raise ValueError(f'there is no table "{name}"; the model has {", ".join(known) or "none"}')
    if ranker.packed_tables():
        raise ValueError(f'table "{ranker.packed_tables()[0]}" is quantised already: start from the float32 model')
    store = next(store for store, number in BITS.items() if number == bits)
    wanted = [name for name in known if tables is None or name in tables]
    state = dict(ranker.state_dict())
    found: dict[str, QuantizedTable] = {}
    left: dict[str, str] = {}
    for table, key, packing in _parts(_with_store(ranker, wanted, store)):
        if packing is None or table in left:
            continue
        try:
            quantized = quantize_table(
                state[key], bits, method, nbins=nbins, ratio=ratio, starts=starts, name=f'table "{table}"'
            )
        except ValueError as refusal:
            left[table] = str(refusal).partition(": quantise with")[0]
            continue
        assert isinstance(quantized, QuantizedTable)
        error = quantized.normalized_l2(state[key])
        if max_error is not None and error > max_error:
            left[table] = f"its error would be {error:.4f}"
        found[key] = quantized
    smaller = _with_store(ranker, [name for name in wanted if name not in left], store)
    reports = []
    for table, key, packing in _parts(smaller):
        weight_RD = state[key]
        rows, width = weight_RD.shape
        if packing is None:
            why = left.get(table, "not chosen" if table not in wanted else f"{width} wide: codes would not be smaller")
            reports.append(PartReport(table, key, rows, width, weight_RD.nbytes, weight_RD.nbytes, left=why))
            continue
        quantized = found[key]
        error = quantized.normalized_l2(weight_RD)
        reports.append(PartReport(table, key, rows, width, weight_RD.nbytes, quantized.nbytes, error))
        state[key] = quantized.packed
    smaller.load_state_dict(state)
    return smaller.eval(), reports


def _parts(ranker: Ranker) -> Iterator[tuple[str, str, Packing | None]]:
    """Table, name in the ranker's state and packing of each part."""
    for name, module in ranker.named_modules():
        if isinstance(module, EmbeddingCollection):
            for table, key, packing in module.parts():
                yield table, f"{name}.{key}" if name else key, packing


def _with_store(ranker: Ranker, tables: Collection[str], store: Store) -> Ranker:
    """A new ranker of the same settings with these tables in another store."""
    config = _written(ranker.config.model_dump(mode="json"), tables, store)
    with torch.random.fork_rng(devices=[]):
        return type(ranker).from_config(ranker.schema, config)


def _written(config: Any, tables: Collection[str], store: Store) -> Any:
    """A config with the store of some tables written down; a ranker may hold rankers, whose configs lie in its own."""
    if isinstance(config, list):
        return [_written(item, tables, store) for item in config]
    if not isinstance(config, dict):
        return config
    config = {key: _written(value, tables, store) for key, value in config.items()}
    if isinstance(config.get("tables"), dict):
        kinds = config["tables"]
        config["tables"] = kinds | {name: {**kinds.get(name, {"kind": "full"}), "store": store} for name in tables}
    return config
