"""Checkpoints that survive a kill at any moment: each is a directory that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fullrank.data import atomic

_PREFIX = "step-"


def write(directory: Path, step: int, tensors: dict[str, Tensor], about: dict[str, Any], *, keep: int) -> Path:
    """Write checkpoint `step-<step>` and remove all but the `keep` newest.

    Files are written beside, synced to disk and renamed; `checkpoint.json` holds the SHA-256 of the tensors.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{_PREFIX}{step:010d}"
    with atomic.new_directory(path, overwrite=True) as partial:
        content = to_safetensors({key: value.detach().contiguous().clone() for key, value in tensors.items()})
        atomic.write_bytes(partial / "tensors.safetensors", content)
        record = {**about, "step": step, "sha256": hashlib.sha256(content).hexdigest()}
        atomic.write_text(partial / "checkpoint.json", json.dumps(record, indent=2) + "\n")
    for old in _paths(directory)[:-keep]:
        shutil.rmtree(old)
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of one checkpoint.

    Raises:
        ValueError: if a file is missing, or the checksum does not match.
    """
    try:
        about = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        content = (path / "tensors.safetensors").read_bytes()
        expected = about["sha256"]
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error!r}") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"{path / 'tensors.safetensors'} does not match its checksum: the file is damaged")
    return from_safetensors(content), about


def latest(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint; damaged ones are skipped with a warning. None if there is none."""
    for path in reversed(_paths(directory)):
        try:
            return read(path)
        except ValueError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
    return None


def _paths(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{_PREFIX}*")) if directory.is_dir() else []
