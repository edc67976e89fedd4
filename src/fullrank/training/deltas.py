"""What changed in a model since a bundle: rows of tables and whole weights, to be put into a served model in place.

A delta is a directory of two files. `delta.json` names the bundle that it is for, the delta before it, and the hash of
`tensors.safetensors`, in which `rows|<name>` and `values|<name>` are the rows of a tensor of the model's state that are
others now, and `whole|<name>` is all of one. A bundle and its deltas, in order, are the model that was trained, bit for
bit, whatever kinds of tables it has. Of a funnel, a delta has the tensors of all its rankers, each under
`<stage>|<name>`.
"""

# Shapes: R rows of a tensor, M changed ones.

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fullrank.data import atomic
from fullrank.embeddings import EmbeddingCollection
from fullrank.models import Ranker
from fullrank.schema import Schema, describe_errors
from fullrank.training.manifest import MANIFEST, File, describe_file

ABOUT, TENSORS = "delta.json", "tensors.safetensors"
# Integers as wide as the numbers of a tensor, to compare all bits of them.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Position(NamedTuple):
    """Which state of a stream's model a model has.

    Attributes:
        base: identity of the bundle that it was loaded from.
        number: of the last delta that was applied, counted from 1; 0 for none.
        last: identity of that delta.
    """

    base: str
    number: int = 0
    last: str | None = None


class Delta(BaseModel):
    """The content of `delta.json`.

    Attributes:
        base: identity of the bundle: the SHA-256 of its manifest.
        number: 1 for the first delta after the bundle.
        previous: identity of the delta before: the SHA-256 of its `delta.json`; None for the first.
        table_schema: SHA-256 of the schema of the model, or of all rankers of the funnel.
        until: events up to this second are learnt.
        rows: how many rows of each tensor changed.
        tensors: what `tensors.safetensors` has to be.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["fullrank-delta"] = "fullrank-delta"
    version: Literal[1] = 1
    base: str
    number: int = Field(ge=1)
    previous: str | None
    table_schema: str
    until: int
    rows: dict[str, int]
    tensors: File


def position_of(bundle: Path) -> Position:
    """Where a model is that was loaded from a bundle and has had no delta."""
    return Position(describe_file(bundle / MANIFEST).sha256)


def state_of(model: Ranker | Mapping[str, Ranker]) -> dict[str, Tensor]:
    """The state of a ranker, or of rankers by the names of their stages: what deltas are about."""
    if isinstance(model, Ranker):
        return dict(model.state_dict())
    return {f"{stage}|{name}": value for stage, own in model.items() for name, value in own.state_dict().items()}


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What makes the state `after` of the state `before`, as tensors of a delta.

    Every bit of every tensor is compared, so that nothing depends on what a kind of table, an optimiser or a decay
    touched: Adam moves rows that no event looked up, and an admitted table its counts.

    Raises:
        ValueError: if a tensor came, went or has another shape: the model grew, and needs a bundle.
    """
    found: dict[str, Tensor] = {}
    if before.keys() != after.keys():
        raise ValueError(f"the model has other tensors than before: {sorted(before.keys() ^ after.keys())}")
    for name, new in after.items():
        old = before[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ValueError(f"{name} had shape {tuple(old.shape)} and has {tuple(new.shape)}: it grew")
        if new.ndim == 0 or not new.numel():
            if new.numel() and bool(_differs(old.reshape(1, 1), new.reshape(1, 1))):
                found[f"whole|{name}"] = new.detach().clone()
            continue
        rows_M = _differs(old.reshape(len(old), -1), new.reshape(len(new), -1)).nonzero().squeeze(1)
        if 2 * len(rows_M) > len(new):
            found[f"whole|{name}"] = new.detach().contiguous().clone()
        elif len(rows_M):
            found[f"rows|{name}"] = rows_M
            found[f"values|{name}"] = new.detach().index_select(0, rows_M)
    return found


def _differs(old_RD: Tensor, new_RD: Tensor) -> Tensor:
    """Which rows differ in any bit."""
    bits = _BITS[new_RD.element_size()]
    return (old_RD.detach().contiguous().view(bits) != new_RD.detach().contiguous().view(bits)).any(1)


def write_delta(
    path: Path,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    position: Position,
    *,
    schema: Schema,
    until: int,
) -> Position:
    """Write the delta from one state to the next; it appears whole or not at all. The position after it.

    Args:
        path: the directory to make. One that is there, of a stream that was killed, is kept if it says the same, else
            replaced.
        position: of `before`.

    Raises:
        ValueError: as `changes`.
    """
    tensors = changes(before, after)
    content = to_safetensors(tensors)
    about = Delta(
        base=position.base,
        number=position.number + 1,
        previous=position.last,
        table_schema=_schema_hash(schema),
        until=until,
        rows={name.removeprefix("rows|"): len(rows) for name, rows in tensors.items() if name.startswith("rows|")},
        tensors=File(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)),
    )
    text = about.model_dump_json(indent=1) + "\n"
    if not _is_there(path, about, text):
        with atomic.new_directory(path, overwrite=True) as partial:
            atomic.write_bytes(partial / TENSORS, content)
            atomic.write_text(partial / ABOUT, text)
    return Position(position.base, position.number + 1, hashlib.sha256(text.encode("utf-8")).hexdigest())


def _is_there(path: Path, about: Delta, text: str) -> bool:
    try:
        return (path / ABOUT).read_text(encoding="utf-8") == text and describe_file(path / TENSORS) == about.tensors
    except OSError:
        return False


def read_delta(path: Path) -> tuple[Delta, str]:
    """What a delta says of itself, and its identity.

    Raises:
        ValueError: if it is missing or damaged.
    """
    try:
        text = (path / ABOUT).read_bytes()
        about = Delta.model_validate(json.loads(text))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole delta: {error}") from None
    except ValidationError as error:
        raise ValueError(describe_errors(error, str(path / ABOUT)).splitlines()[0]) from None
    return about, hashlib.sha256(text).hexdigest()


@torch.no_grad()
def apply_delta(model: Ranker | Mapping[str, Ranker], path: Path, position: Position) -> Position:
    """Put a delta into a ranker, or the rankers of a funnel by stage, in place; their position after it.

    A delta that the model has had already changes nothing. Nothing is changed either when one is refused.

    Args:
        position: of the model: `position_of` its bundle, or what the last call gave.

    Raises:
        ValueError: if the delta is damaged, of another bundle or another schema, or not the next one.
    """
    about, identity = read_delta(path)
    if about.base != position.base:
        raise ValueError(f"{path} is for another bundle than the one that the model was loaded from")
    rankers = {"": model} if isinstance(model, Ranker) else model
    if any(about.table_schema != _schema_hash(ranker.schema) for ranker in rankers.values()):
        raise ValueError(f"{path} is for a model with another schema")
    if identity == position.last or about.number < position.number:
        return position
    if about.number != position.number + 1 or about.previous != position.last:
        raise ValueError(
            f"{path} is delta {about.number}, and the model has had {position.number}: expected number "
            f"{position.number + 1}, made after the model's last one"
        )
    state = state_of(model)
    tensors = _read_tensors(path, about, state)
    for key, value in tensors.items():
        what, _, name = key.partition("|")
        if what == "whole":
            state[name].copy_(value)
        elif what == "rows":
            state[name].index_copy_(0, value, tensors[f"values|{name}"])
    for stage, ranker in rankers.items():
        collections = [module for module in ranker.modules() if isinstance(module, EmbeddingCollection)]
        if any(collection.optimizer.storage != "float32" for collection in collections):
            start = f"{stage}|" if stage else ""
            # Which is a copy of what is stored.
            ranker.load_state_dict({key[len(start) :]: state[key] for key in state if key.startswith(start)})
            continue
        for collection in collections:
            for kind in collection.kinds.values():
                kind.load_state_dict(kind.state_dict())  # so that it looks at what it keeps beside its rows
    return Position(position.base, about.number, identity)


def _read_tensors(path: Path, about: Delta, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Raises:
    ValueError: if the file is damaged, or a tensor does not fit the model.
    """
    file = path / TENSORS
    try:
        if describe_file(file) != about.tensors:
            raise ValueError(f"{file} does not match its hash in {ABOUT}: it was changed or damaged")
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or damaged: {error}") from None
    for key, value in tensors.items():
        what, _, name = key.partition("|")
        target = state.get(name)
        if target is None or what not in ("rows", "values", "whole"):
            raise ValueError(f"{file}: the model has no tensor for {key}")
        rows = tensors.get(f"rows|{name}")
        if what == "rows":
            fits = value.dtype == torch.int64 and value.ndim == 1 and f"values|{name}" in tensors and target.ndim > 0
            fits = fits and (not len(value) or 0 <= int(value.min()) <= int(value.max()) < len(target))
        elif what == "values":
            fits = rows is not None and value.shape == (len(rows), *target.shape[1:]) and value.dtype == target.dtype
        else:
            fits = value.shape == target.shape and value.dtype == target.dtype
        if not fits:
            raise ValueError(f"{file}: {key} does not fit the model")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{file}: {key} has a NaN or infinite number")
    return tensors


def _schema_hash(schema: Schema) -> str:
    return hashlib.sha256(schema.to_json().encode("utf-8")).hexdigest()
