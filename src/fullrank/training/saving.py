"""A trained model as files: weights as safetensors, everything else as JSON and Parquet."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fullrank.data import atomic
from fullrank.data.encoders import Encoders
from fullrank.models import MODELS, Ranker
from fullrank.schema import Schema

FORMAT_VERSION = 1


def save_model(model: Ranker, directory: Path, encoders: Encoders | None = None, *, overwrite: bool = True) -> None:
    """Write a new directory, all or nothing: `weights.safetensors`, `model.json`, `schema.json`, `encoders/`.

    Args:
        encoders: what turned the raw log into the ids and numbers that the model was trained on; with them the
            directory is all that scoring raw rows needs.
    """
    with atomic.new_directory(directory, overwrite=overwrite) as partial:
        write_model(model, partial, encoders)


def write_model(model: Ranker, directory: Path, encoders: Encoders | None = None) -> None:
    """`save_model` into a directory that exists."""
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    save_file(state, directory / "weights.safetensors")
    about = {
        "format_version": FORMAT_VERSION,
        "name": model.name,
        "config": model.config.model_dump(mode="json"),
    }
    atomic.write_text(directory / "model.json", json.dumps(about, indent=2) + "\n")
    atomic.write_text(directory / "schema.json", model.schema.to_json())
    if encoders is not None:
        encoders.save(directory / "encoders")


def load_model(directory: Path) -> Ranker:
    """The model of `save_model`, in evaluation mode, with its schema as `.schema`. Runs no code from the files.

    Raises:
        ValueError: if a file is missing or damaged, or weights and configuration do not fit.
    """
    try:
        about = json.loads((directory / "model.json").read_text(encoding="utf-8"))
        version, name, config = about["format_version"], about["name"], about["config"]
        state = load_file(directory / "weights.safetensors")
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{directory} holds no readable model: {error}") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{directory}: format_version is {version!r}, this release reads {FORMAT_VERSION}")
    if name not in MODELS:
        raise ValueError(f'{directory / "model.json"}: model "{name}" is unknown; known are {", ".join(MODELS)}')
    with torch.random.fork_rng(devices=[]):
        model = MODELS[name].from_config(Schema.read(directory / "schema.json"), config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{directory / 'weights.safetensors'} does not fit its model: {error}") from None
    return model.eval()
