"""What a bundle holds, and how many bytes each part takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fullrank.data.encoders import Encoders
from fullrank.embeddings import EmbeddingCollection
from fullrank.embeddings.memory import TableMemory, table_memory
from fullrank.embeddings.packed import PackedRows
from fullrank.funnel.bundle import load_bundle
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.stages import FINAL, RETRIEVAL
from fullrank.training.manifest import MANIFEST, read_manifest
from fullrank.training.saving import load_model


def bundle_contents(path: Path) -> dict[str, Any]:
    """Sizes of a bundle of a ranker or a funnel, measured from what it stores.

    Returns:
        `bytes` of all files; `stages`, each with its `kind`, the bytes of its `files`, `parameters` and bytes of
        `tables` and of the rest, `dense`, and for each table its kind, store, ids, width, parameters and bytes; and the
        number of values in each of the `vocabularies`.

    Raises:
        ValueError: if it is no bundle, or damaged.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if [stage.stage for stage in manifest.stages] == [FINAL]:  # it may be without encoders
        modules: dict[str, list[nn.Module]] = {FINAL: [load_model(path)]}
        with_encoders = "encoders/encoders.json" in manifest.files
        vocabularies = Encoders.load(path / "encoders").vocabularies if with_encoders else {}
    else:
        funnel = load_bundle(path)
        assert isinstance(funnel, Funnel)
        parts = vars(funnel.retriever).values()
        modules = {RETRIEVAL: [part for part in parts if isinstance(part, nn.Module)]}
        modules |= {name: [ranker] for name, ranker in funnel.rankers.items()}
        vocabularies = funnel.encoders.vocabularies
    stages = []
    for stage in manifest.stages:
        own = "weights.safetensors" if len(manifest.stages) == 1 else f"{stage.stage}.safetensors"
        inside = f"{stage.stage}/"
        files = sum(file.bytes for name, file in manifest.files.items() if name == own or name.startswith(inside))
        stages.append({"stage": stage.stage, "kind": stage.kind, "files": files, **_sizes(modules[stage.stage])})
    return {
        "bytes": sum(file.bytes for file in manifest.files.values()) + (path / MANIFEST).stat().st_size,
        "stages": stages,
        "vocabularies": {table: len(vocabulary.values) for table, vocabulary in vocabularies.items()},
    }


def _sizes(modules: list[nn.Module]) -> dict[str, Any]:
    """Of all tables, also those of models inside, and of the rest of the state."""
    tables: dict[tuple[str, str, int], TableMemory] = {}
    for module in modules:
        for part in module.modules():
            if isinstance(part, EmbeddingCollection):
                for name, memory in table_memory(part).items():
                    known = tables.setdefault((name, memory.kind, memory.width), memory)
                    if known is not memory:
                        known.parameters += memory.parameters
                        known.bytes += memory.bytes
                        known.plain_bytes += memory.plain_bytes
    state = [value for module in modules for value in module.state_dict().values()]
    parameters = sum(parameter.numel() for module in modules for parameter in module.parameters())
    inside = [part for module in modules for part in module.modules()]
    parameters += sum(part.numbers() for part in inside if isinstance(part, PackedRows))
    in_tables = sum(memory.parameters for memory in tables.values())
    bytes_of_tables = sum(memory.bytes for memory in tables.values())
    return {
        "parameters": {"tables": in_tables, "dense": parameters - in_tables},
        "table_bytes": bytes_of_tables,
        "dense_bytes": sum(value.nbytes for value in state) - bytes_of_tables,
        "tables": [{"table": name, **vars(memory)} for (name, *_), memory in tables.items()],
    }
