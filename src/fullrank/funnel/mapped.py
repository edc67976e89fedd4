"""The large arrays of an opened bundle in files that processes map: memory holds them once, however many read them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fullrank.batch import Batch, RowGather
from fullrank.data.tallies import is_hash_column
from fullrank.data.vocabulary import Vocabulary
from fullrank.funnel.catalogue import SEEN, Catalogue, times_column
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.stages import RETRIEVAL
from fullrank.retrieval.base import Retriever
from fullrank.schema import Schema

_TABLES, _MODULES = "vocabularies.json", "modules.safetensors"
_VECTORS, _COUNTERS = "item_vectors.safetensors", "counters.safetensors"
_INDEX = ("hashes", "ids", "first")


class MappedArrays:
    """What `write_arrays` wrote, mapped. Pages that are only read belong to all processes that map them; one that is
    written to becomes the writer's own.

    The files are trusted: a process of the same user wrote them, in a directory of its own.

    Args:
        directory: may be removed once all is read.

    Attributes:
        retriever: directory of what the retriever has written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.retriever = directory, directory / RETRIEVAL
        self.item_vectors = load_file(directory / _VECTORS)
        self._modules = load_file(directory / _MODULES)

    def vocabularies(self) -> dict[str, Vocabulary]:
        """Those of the encoders, by table."""
        found = {}
        for place, table in enumerate(json.loads((self.directory / _TABLES).read_text(encoding="utf-8"))):
            frame = _read_frame(self.directory / f"vocabulary-{place}.arrow")
            index = load_file(self.directory / f"vocabulary-{place}.safetensors")
            hashes, ids, first = (index[name].numpy() for name in _INDEX)
            found[table] = Vocabulary(frame["value"], frame["count"], (hashes.view(np.uint64), ids, first))
        return found

    def catalogue(self, name: str, schema: Schema) -> Catalogue:
        """That of `items` or `users`."""
        tensors: dict[str, Any] = load_file(self.directory / f"{name}.safetensors")
        starts = {key.removeprefix("starts."): tensors.pop(key) for key in list(tensors) if key.startswith("starts.")}
        keys_I = tensors.pop("keys")
        batch = Batch(jagged_keys=schema.jagged_keys, event_keys=schema.event_number_keys, **tensors)
        return Catalogue(_read_frame(self.directory / f"{name}.arrow"), keys_I, RowGather(batch, starts))

    def counters(self) -> dict[str, Tensor]:
        """The sums that counters go on from."""
        found: dict[str, Tensor] = load_file(self.directory / _COUNTERS)
        return found

    def hold(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the mapped tensors in the place of the modules' own, which are equal."""
        for name, module in modules.items():
            for key, tensor in _tensors(module).items():
                tensor.data = self._modules[f"{name}.{key}"]


def write_arrays(content: Funnel | Scorer, directory: Path) -> None:
    """Write what `MappedArrays` reads; the directory appears whole or not at all.

    It is no copy of the bundle, but what opening it makes of it, and is of use to this release and machine only.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    vocabularies = content.encoders.vocabularies
    (partial / _TABLES).write_text(json.dumps(list(vocabularies)), encoding="utf-8")
    for place, vocabulary in enumerate(vocabularies.values()):
        hashes, ids, first = vocabulary.index
        arrays = dict(zip(_INDEX, (hashes.view(np.int64), ids, first), strict=True))
        frame = pl.DataFrame({"value": vocabulary.values, "count": vocabulary.counts})
        _write_frame(frame, partial / f"vocabulary-{place}.arrow")
        _write({key: torch.from_numpy(value) for key, value in arrays.items()}, partial / f"vocabulary-{place}")
    vectors: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = {**content.rankers}
    if isinstance(content, Funnel):
        modules |= modules_of(content.retriever)
        (partial / RETRIEVAL).mkdir()
        content.retriever.write_arrays(partial / RETRIEVAL)
        if content.counters is not None:
            _write(content.counters.state.tensors, partial / _COUNTERS)
        vectors = {stage: seen.whole() for stage, (_, seen) in content.prepared.items()}
        _write_catalogue(content.items, content.items.frame, partial / "items")
        if content.users is not None:
            _write_catalogue(content.users, _of_users(content.users.frame), partial / "users")
    _write(vectors, partial / _VECTORS)
    _write(
        {f"{name}.{key}": tensor for name, each in modules.items() for key, tensor in _tensors(each).items()},
        partial / _MODULES,
    )
    os.rename(partial, directory)


def modules_of(retriever: Retriever) -> dict[str, nn.Module]:
    """The networks of a retriever, by names that no stage has."""
    return {f"{RETRIEVAL}.{name}": part for name, part in vars(retriever).items() if isinstance(part, nn.Module)}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _write_catalogue(catalogue: Catalogue, frame: pl.DataFrame, path: Path) -> None:
    """A catalogue; of users only the columns of its frame that are read while it is served, and numbers no wider than
    they have to be."""
    rows = catalogue.rows
    tensors = {name: value for name, value in vars(rows.batch).items() if isinstance(value, Tensor)}
    starts = {f"starts.{name}": value for name, value in rows.starts.items()}
    narrow = {name: _narrow(tensor) for name, tensor in {**tensors, **starts}.items()}
    _write({"keys": catalogue.keys_I, **narrow}, path)
    _write_frame(frame, path.with_suffix(".arrow"))


def _narrow(tensor: Tensor) -> Tensor:
    fits = tensor.dtype == torch.int64 and (not tensor.numel() or int(tensor.abs().max()) < 2**31)
    return tensor.int() if fits else tensor


def _of_users(frame: pl.DataFrame) -> pl.DataFrame:
    """What is read of it beside the features: ids, what counters count by, when somebody was last seen, and when events
    happened, in seconds that fit into 32 bits."""
    id_column, times = frame.columns[0], [name for name in frame.columns if name.startswith(times_column(""))]
    small = [
        pl.col(name).cast(pl.List(pl.UInt32)) for name in times if frame[name].explode().is_between(0, 2**32 - 1).all()
    ]
    others = [name for name in frame.columns if is_hash_column(name) or name == SEEN]
    return frame.select(id_column, *others, *times).with_columns(small)


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    apart = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(apart, path.with_suffix(".safetensors"))


def _write_frame(frame: pl.DataFrame, path: Path) -> None:
    # As polars has it in memory, so that it need not be changed when it is mapped.
    table = frame.rechunk().to_arrow(compat_level=pl.CompatLevel.newest()).combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)


def _read_frame(path: Path) -> pl.DataFrame:
    frame = pl.from_arrow(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
    assert isinstance(frame, pl.DataFrame)
    return frame
