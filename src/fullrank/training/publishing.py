"""What a stream has published: bundles, the deltas after them, and the pointer that says which are served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fullrank.data import atomic
from fullrank.models import Ranker
from fullrank.schema import describe_errors
from fullrank.training.deltas import Position, apply_delta, position_of
from fullrank.training.saving import load_model

POINTER, BUNDLES, DELTAS = "current.json", "bundles", "deltas"


class Pointer(BaseModel):
    """The content of `current.json`.

    Attributes:
        number: grows with every change of the pointer.
        bundle: directory of the bundle, within the stream's.
        base: its identity; see `deltas.Position`.
        deltas: directories of the deltas after it, in order.
        until: events up to this second are learnt.
        reason: why it points here.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["fullrank-stream"] = "fullrank-stream"
    version: Literal[1] = 1
    number: int = Field(ge=1)
    bundle: str
    base: str
    deltas: tuple[str, ...] = ()
    until: int
    reason: str


def read_pointer(directory: Path) -> Pointer | None:
    """Where a stream's pointer points; None if nothing has been published.

    Raises:
        ValueError: if it is damaged.
    """
    path = directory / POINTER
    try:
        pointer = Pointer.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except ValidationError as error:
        raise ValueError(describe_errors(error, str(path)).splitlines()[0]) from None
    for name in (pointer.bundle, *pointer.deltas):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f'{path}: "{name}" lies outside the stream')
    return pointer


def write_pointer(directory: Path, pointer: Pointer) -> None:
    """Let the pointer point elsewhere, in one step. One that a stream which is being repeated has passed is left."""
    now = read_pointer(directory)
    if now is None or now.number < pointer.number:
        atomic.write_text(directory / POINTER, pointer.model_dump_json(indent=1) + "\n")


def open_current(directory: Path) -> tuple[Ranker, Pointer, Position]:
    """The ranker that a stream serves now: its bundle with all deltas; for `apply_delta` also its position.

    Raises:
        ValueError: if nothing is published, a file is missing or damaged, or the bundle is not of a single ranker.
    """
    pointer = read_pointer(directory)
    if pointer is None:
        raise ValueError(f"{directory} has published nothing: it has no {POINTER}")
    bundle = directory / pointer.bundle
    model = load_model(bundle)
    position = position_of(bundle)
    if position.base != pointer.base:
        raise ValueError(f"{bundle} is another bundle than the one that the pointer means: it was changed")
    for delta in pointer.deltas:
        position = apply_delta(model, directory / delta, position)
    return model, pointer, position


def prune(directory: Path, keep: int, needed: Collection[str]) -> None:
    """Remove all but the newest bundles and those of `needed`, by name, and the deltas of those that go."""
    names = sorted(path.name for path in (directory / BUNDLES).iterdir() if not path.name.startswith("."))
    kept = {*names[-keep:], *needed}
    for name in names:
        if name not in kept:
            atomic.remove(directory / BUNDLES / name)
    deltas = directory / DELTAS
    for path in sorted(deltas.iterdir()) if deltas.is_dir() else []:
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def clear_leftovers(directory: Path) -> None:
    """Remove what a killed stream was building; the lock is ours."""
    atomic.clear_leftovers(directory, "*", alone=True)
    for place in (directory / BUNDLES, *(directory / DELTAS).glob("*")):
        if place.is_dir():
            atomic.clear_leftovers(place, "*", alone=True)
