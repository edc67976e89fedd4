"""An index in a file."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fullrank.data import atomic

FORMAT_VERSION = 1
_KIND, _HEADER = "hierarchical_index", "fullrank"


def write(path: Path, state: dict[str, Tensor], version: str | None) -> None:
    """One file of safetensors, with the versions of format and model in its metadata."""
    about = {"kind": _KIND, "format": FORMAT_VERSION, "version": version}
    atomic.write_bytes(path, to_safetensors(state, {_HEADER: json.dumps(about)}))


def read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors and version of the model that `write` wrote.

    Raises:
        ValueError: if the file is missing, damaged or of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[_HEADER])
            kind, found, version = about["kind"], about["format"], about["version"]
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error!r}") from None
    if kind != _KIND or found != FORMAT_VERSION:
        raise ValueError(f'{path} is "{kind}" of format {found}, expected "{_KIND}" of format {FORMAT_VERSION}')
    return state, version
