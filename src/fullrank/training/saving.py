"""A trained model as files: weights as safetensors, everything else as JSON and Parquet."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from fullrank.data import atomic
from fullrank.models import MODELS, Ranker
from fullrank.schema import Schema


def save_model(model: Ranker, directory: Path, *, overwrite: bool = True) -> None:
    """Write `weights.safetensors`, `model.json` and `schema.json` to a new directory, all or nothing."""
    with atomic.new_directory(directory, overwrite=overwrite) as partial:
        state = {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}
        atomic.write_bytes(partial / "weights.safetensors", to_safetensors(state))
        config = {"name": model.name, "config": json.loads(model.config.model_dump_json())}
        atomic.write_text(partial / "model.json", json.dumps(config, indent=2) + "\n")
        atomic.write_text(partial / "schema.json", model.schema.to_json())


def load_model(directory: Path) -> Ranker:
    """The model of `save_model`, in evaluation mode. Runs no code from the files.

    Raises:
        ValueError: if a file is missing or damaged, or weights and configuration do not fit.
    """
    try:
        about = json.loads((directory / "model.json").read_text(encoding="utf-8"))
        name, config = about["name"], about["config"]
        state = load_file(directory / "weights.safetensors")
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{directory} holds no readable model: {error}") from None
    if name not in MODELS:
        raise ValueError(f'{directory / "model.json"}: model "{name}" is unknown; known are {", ".join(MODELS)}')
    with torch.random.fork_rng(devices=[]):
        model = MODELS[name].from_config(Schema.read(directory / "schema.json"), config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{directory / 'weights.safetensors'} does not fit its model: {error}") from None
    return model.eval()
