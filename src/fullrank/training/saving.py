"""A trained ranker as a bundle: weights as safetensors, everything else as JSON and Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from fullrank.data import atomic
from fullrank.data.encoders import Encoders
from fullrank.models import RANKERS, Ranker
from fullrank.schema import Schema, describe_errors
from fullrank.training.codes import without_files
from fullrank.training.manifest import MANIFEST, Manifest, Stage, read_manifest, write_manifest

WEIGHTS = "weights.safetensors"


def save_model(
    model: Ranker,
    directory: Path,
    encoders: Encoders | None = None,
    *,
    value: str | None = None,
    about: dict[str, Any] | None = None,
    overwrite: bool = True,
) -> None:
    """Write a bundle of one ranker, all or nothing: `manifest.json`, `weights.safetensors`, `schema.json`, `encoders/`.

    Args:
        encoders: what turned the raw log into the ids and numbers that the model was trained on; with them the
            directory is all that scoring raw rows needs.
        value: the value formula, for serving.
        about: where it comes from, for people: data, seed, metrics.

    Raises:
        ValueError: if the model could not be loaded again, because its class is not registered; or if `directory`
            exists and `overwrite` is not set.
    """
    stage = stage_of("final", model)
    with atomic.new_directory(directory, overwrite=overwrite) as partial:
        write_weights(model, partial / WEIGHTS)
        atomic.write_text(partial / "schema.json", model.schema.to_json())
        if encoders is not None:
            encoders.save(partial / "encoders")
        write_manifest(partial, [stage], value=value, about=about)


def load_model(directory: Path) -> Ranker:
    """The model of `save_model`, in evaluation mode, with its schema as `.schema`. Runs no code from the files.

    Raises:
        ValueError: if a file is missing or damaged, the ranker is not known here, or weights and configuration do not
            fit.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if [stage.stage for stage in manifest.stages] != ["final"]:
        raise ValueError(
            f"{directory} is a funnel, not a single ranker, which alone can be trained on: to use it as it is, open it "
            "with fullrank.funnel.load_bundle"
        )
    require_files(directory, manifest, ["schema.json", WEIGHTS])
    return load_ranker(directory, manifest.stages[0], Schema.read(directory / "schema.json"), directory / WEIGHTS)


def require_files(directory: Path, manifest: Manifest, names: list[str]) -> None:
    """Raises:
    ValueError: if the manifest does not list one of the files.
    """
    for name in names:
        if name not in manifest.files:
            raise ValueError(f"{directory / MANIFEST}: no file {name}")


def stage_of(name: str, model: Ranker) -> Stage:
    """How a manifest describes a model.

    Raises:
        ValueError: if its class is not the one that is registered under its name: what cannot be loaded is not saved.
    """
    kind = type(model)
    if model.name not in RANKERS or RANKERS[model.name] is not kind:
        taken = f"another class is registered as {model.name!r}" if model.name in RANKERS else "it is not registered"
        raise ValueError(
            f"{kind.__module__}.{kind.__qualname__} could not be loaded again, {taken}: give it a name of its own and "
            "register it with fullrank.models.register"
        )
    config = without_files(model.config.model_dump(mode="json"))
    return Stage(stage=name, kind=model.name, config=config, defined_in=kind.__module__)


def write_weights(model: Ranker, path: Path) -> None:
    """The state of a model as safetensors."""
    state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    atomic.write_bytes(path, to_safetensors(state))


def load_ranker(bundle: Path, stage: Stage, schema: Schema, weights: Path) -> Ranker:
    """The ranker of a stage of a bundle, in evaluation mode.

    Raises:
        ValueError: if it is not known here, its configuration is wrong, or the weights do not fit it.
    """
    place = f"{bundle / MANIFEST}: stage {stage.stage}"
    try:
        kind = RANKERS.find(stage.kind, stage.defined_in)
        # Built without memory first: a schema that promises a table of a terabyte is found out by the weights' sizes.
        with torch.device("meta"):
            blank = kind.from_config(schema, stage.config)
    except ValidationError as error:
        raise ValueError(describe_errors(error, place).splitlines()[0]) from None
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{place}: {last_line(error)}") from None
    misfit = f"{weights} does not fit the {stage.kind} of the manifest"
    try:
        expected = {name: list(tensor.shape) for name, tensor in blank.state_dict().items()}
        with safe_open(weights, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(f"{misfit}: {name} has shape {found.get(name)}, expected {expected.get(name)}")
        with torch.random.fork_rng(devices=[]):
            model = kind.from_config(schema, stage.config)
        state = load_file(weights)
        types = {name: tensor.dtype for name, tensor in blank.state_dict().items()}
        for name, tensor in state.items():
            if tensor.dtype != types[name]:
                raise ValueError(f"{weights}: {name} has {tensor.dtype}, expected {types[name]}")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{weights}: {name} has a NaN or infinite number")
        model.load_state_dict(state)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{misfit}: {last_line(error)}") from None
    return model.eval()


def last_line(error: Exception) -> str:
    """Of its message: what long errors of libraries come down to."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
