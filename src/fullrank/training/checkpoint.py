"""Checkpoints that survive a kill at any moment: each is a directory that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fullrank.data import atomic
from fullrank.training.manifest import describe_file

FORMAT_VERSION = 1
_PREFIX = "step-"
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "checkpoint.json"


class Checkpoint(NamedTuple):
    """A checkpoint whose files have the checksums that it promises."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, prefix: str = "", *, without: str | None = None) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix` and not with `without`, under the rest of their names."""
        with safe_open(self.path / _TENSORS, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a mapping)
            if without is not None:
                names = [name for name in names if not name.startswith(without)]
            return {name[len(prefix) :]: file.get_tensor(name) for name in names}


def write(
    directory: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    *,
    keep: int,
    protect: Collection[int] = (),
) -> Path:
    """Write checkpoint `step-<step>`, then remove all but the `keep` newest and those of the steps in `protect`.

    The files are written beside, synced to disk and renamed, and `checkpoint.json` holds the SHA-256 of the others, so
    that the older checkpoints are valid until this one is. Checkpoints of later steps are of a run that is being
    repeated from an earlier one (they were damaged): they are removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{_PREFIX}{step:010d}"
    with atomic.new_directory(path, overwrite=True) as partial:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / _TENSORS)
        (partial / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        files = {name: describe_file(partial / name).sha256 for name in (_TENSORS, _STATE)}
        # safetensors lets only its owner read the file.
        shutil.copymode(partial / _STATE, partial / _TENSORS)
        manifest = {"format_version": FORMAT_VERSION, "step": step, "sha256": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    steps = list_steps(directory)
    kept = {old for old in steps if old <= step}
    kept = set(sorted(kept)[-keep:]) | set(protect)
    for old in steps:
        if old not in kept:
            atomic.remove(directory / f"{_PREFIX}{old:010d}")
    clear_leftovers(directory)
    return path


def clear_leftovers(directory: Path, *, alone: bool = False) -> None:
    """Remove what killed processes left in a directory of checkpoints; see `atomic.clear_leftovers`."""
    atomic.clear_leftovers(directory, f"{_PREFIX}*", alone=alone)


def read(path: Path) -> Checkpoint:
    """Open one checkpoint and verify its checksums.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        version, step, sums = manifest["format_version"], manifest["step"], manifest["sha256"]
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error!r}") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version!r}, this release reads {FORMAT_VERSION}")
    for name in (_TENSORS, _STATE):
        try:
            found = describe_file(path / name).sha256
        except OSError as error:
            raise ValueError(f"{path} is not a whole checkpoint: {error}") from None
        if found != sums.get(name):
            raise ValueError(f"{path / name} does not match its checksum: the file is damaged")
    try:
        with safe_open(path / _TENSORS, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path / _TENSORS} cannot be read: {error}") from None
    return Checkpoint(path, step, json.loads((path / _STATE).read_text(encoding="utf-8")))


def latest(directory: Path) -> Checkpoint | None:
    """The newest valid checkpoint; damaged ones are skipped with a warning. None if there is none."""
    for step in reversed(list_steps(directory)):
        try:
            return read(directory / f"{_PREFIX}{step:010d}")
        except ValueError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
    return None


def of_step(directory: Path, step: int) -> Checkpoint:
    """The checkpoint of one step.

    Raises:
        ValueError: if it is missing or damaged.
    """
    return read(directory / f"{_PREFIX}{step:010d}")


def list_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, valid or not, in order."""
    names = (path.name.removeprefix(_PREFIX) for path in directory.glob(f"{_PREFIX}*"))
    return sorted(int(name) for name in names if name.isdigit())
