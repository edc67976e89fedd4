"""A ranker as a program of its own: plain tensors in, logits out, for a runtime that knows nothing of this library."""

# Shapes: B rows, K jagged keys, E event-number keys, T tasks.

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fullrank
from fullrank.batch import Batch
from fullrank.data import atomic
from fullrank.extras import needs
from fullrank.funnel.scorer import trust_ids
from fullrank.models.base import Ranker
from fullrank.schema import Schema

Format = Literal["torch-export", "onnx"]
FILES: dict[str, str] = {"torch-export": "model.pt2", "onnx": "model.onnx"}
METADATA = "model.json"
OUTPUT = "logits"
# Logits of the program and of the model may differ by so much.
TOLERANCE = 1e-5
# Rows of the batches on which they are compared; the last has empty lists only.
CHECKED = (1, 2, 5, 64, 300, 3)
# Rows of the batch that the program is traced with: no other dimension has this size by chance.
_TRACED = 11
_LARGEST_ID = 1 << 31


class Program(nn.Module):
    """A ranker of named plain tensors instead of a `Batch`.

    Attributes:
        inputs: names, in order; what the schema has nothing of is left out.
    """

    def __init__(self, model: Ranker) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(_tensors(random_batch(model.schema, 1, seed=0), model.schema))

    def forward(self, *tensors: Tensor) -> Tensor:
        """logits_BT."""
        given, schema = dict(zip(self.inputs, tensors, strict=True)), self.model.schema
        some = tensors[0]
        rows = some.shape[1] if self.inputs[0] == "list_lengths" else some.shape[0]
        none, no_ids = some.new_zeros(0, dtype=torch.float32), some.new_zeros(0, dtype=torch.int64)
        batch = Batch(
            numeric_BN=given.get("numbers", none.new_zeros(rows, 0)),
            ids_BF=given.get("ids", no_ids.new_zeros(rows, 0)),
            jagged_keys=schema.jagged_keys,
            jagged_values=_those_of(given, "list", no_ids),
            jagged_lengths_KB=given.get("list_lengths", no_ids.new_zeros(0, rows)),
            event_keys=schema.event_number_keys,
            event_values=_those_of(given, "event", none),
            event_lengths_EB=given.get("event_lengths", no_ids.new_zeros(0, rows)),
            labels_BT=none.new_zeros(rows, len(schema.labels)),
        )
        logits_BT: Tensor = self.model(batch).logits_BT
        return logits_BT


def _those_of(given: Mapping[str, Tensor], kind: str, none: Tensor) -> Tensor:
    """The values that the lengths speak of."""
    if f"{kind}_values" not in given:
        return none
    values, count = given[f"{kind}_values"], int(given[f"{kind}_lengths"].sum())
    torch._check(count >= 0)  # type: ignore[no-untyped-call]
    torch._check(count <= values.shape[0])  # type: ignore[no-untyped-call]
    return values.narrow(0, 0, count)


def _tensors(batch: Batch, schema: Schema) -> dict[str, Tensor]:
    """The inputs of a program, of a batch."""
    found: dict[str, Tensor] = {}
    if schema.numeric_columns:
        found["numbers"] = batch.numeric_BN
    if schema.categorical:
        found["ids"] = batch.ids_BF
    if schema.jagged_keys:
        found |= {"list_lengths": batch.jagged_lengths_KB, "list_values": batch.jagged_values}
    if schema.event_number_keys:
        found |= {"event_lengths": batch.event_lengths_EB, "event_values": batch.event_values}
    return found


def random_batch(schema: Schema, rows: int, seed: int, *, empty: bool = False) -> Batch:
    """A valid batch of random numbers, ids and lists.

    Args:
        empty: all lists are.
    """
    generator = torch.Generator().manual_seed(seed)
    tables, columns = schema.tables(), schema.embedded()

    def ids(name: str, count: int) -> Tensor:
        return torch.randint(min(tables[columns[name].table_name], _LARGEST_ID), (count,), generator=generator)

    longest = {bag.name: bag.max_length for bag in schema.bags}
    event_lengths: dict[str, Tensor] = {}
    for sequence in schema.sequences:
        # Fields of a sequence are of the same events.
        lengths_B = torch.randint(min(sequence.max_length, 20) + 1, (rows,), generator=generator)
        event_lengths |= {sequence.column(part): lengths_B for part in sequence.fields}
    lengths = {
        name: event_lengths[name]
        if name in event_lengths
        else torch.randint(min(longest[name], 20) + 1, (rows,), generator=generator)
        for name in (*schema.jagged_keys, *schema.event_number_keys)
    }
    if empty:
        lengths = {name: torch.zeros_like(lengths_B) for name, lengths_B in lengths.items()}

    def stacked(keys: tuple[str, ...]) -> Tensor:
        return torch.stack([lengths[key] for key in keys]) if keys else torch.zeros(0, rows, dtype=torch.int64)

    single = [ids(feature.name, rows) for feature in schema.categorical]
    values = [ids(key, int(lengths[key].sum())) for key in schema.jagged_keys]
    numbers = [3 * torch.rand(int(lengths[key].sum()), generator=generator) for key in schema.event_number_keys]
    return Batch(
        numeric_BN=torch.randn(rows, len(schema.numeric_columns), generator=generator),
        ids_BF=torch.stack(single, 1) if single else torch.zeros(rows, 0, dtype=torch.int64),
        jagged_keys=schema.jagged_keys,
        jagged_values=torch.cat(values) if values else torch.zeros(0, dtype=torch.int64),
        jagged_lengths_KB=stacked(schema.jagged_keys),
        event_keys=schema.event_number_keys,
        event_values=torch.cat(numbers) if numbers else torch.zeros(0),
        event_lengths_EB=stacked(schema.event_number_keys),
        labels_BT=torch.zeros(rows, len(schema.labels)),
    )


def export_ranker(
    model: Ranker, path: Path, format: Format = "torch-export", *, overwrite: bool = False
) -> dict[str, Any]:
    """Write a directory with the program and `model.json`, which says what goes in and what comes out.

    The file that is written is opened again and compared with the model on random batches before the directory is
    there.

    Returns:
        What `model.json` holds.

    Raises:
        ValueError: if the model cannot be exported, the program says something else, the extra `onnx` is missing, or
            `path` exists and `overwrite` is not set.
    """
    model.eval()
    trust_ids(model)
    write = _torch_export if format == "torch-export" else _onnx
    with atomic.new_directory(path, overwrite=overwrite) as partial:
        try:
            with _quiet(), torch.no_grad():
                run = write(Program(model), partial / FILES[format])
                difference = _difference(model, run)
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(f"{model.name} cannot be exported as {format}: {_first_line(error)}") from error
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{model.name} as {format} says something else: logits differ by up to {difference:.3g}, "
                f"more than {TOLERANCE:g}"
            )
        said = {**describe(model), "format": format, "file": FILES[format], "max_difference": difference}
        atomic.write_text(partial / METADATA, json.dumps(said, indent=1, allow_nan=False) + "\n")
    return said


def describe(model: Ranker) -> dict[str, Any]:
    """Inputs of the program in their order, with what each of their columns is; and the tasks of the logits."""
    schema = model.schema
    tensors = _tensors(random_batch(schema, 1, seed=0), schema)
    shapes = {
        "numbers": ["rows", len(schema.numeric_columns)],
        "ids": ["rows", len(schema.categorical)],
        "list_lengths": [len(schema.jagged_keys), "rows"],
        "list_values": ["values"],
        "event_lengths": [len(schema.event_number_keys), "rows"],
        "event_values": ["numbers of events"],
    }
    columns = {
        "numbers": list(schema.numeric_columns),
        "ids": [feature.name for feature in schema.categorical],
        **{name: list(schema.jagged_keys) for name in ("list_lengths", "list_values")},
        **{name: list(schema.event_number_keys) for name in ("event_lengths", "event_values")},
    }
    return {
        "made_by": f"fullrank {fullrank.__version__}",
        "model": model.name,
        "inputs": [
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": shapes[name],
                "columns": columns[name],
            }
            for name, tensor in tensors.items()
        ],
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["rows", len(schema.labels)]},
        "tasks": [{"name": label.name, "kind": label.kind} for label in schema.labels],
    }


# What a program says to inputs in their order.
Run = Callable[[Mapping[str, Tensor]], Tensor]


def _exported(program: Program) -> torch.export.ExportedProgram:
    batch = random_batch(program.model.schema, _TRACED, seed=1)
    tensors = _tensors(batch, program.model.schema)
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    dynamic: dict[str, dict[int, Any]] = {
        "numbers": {0: rows},
        "ids": {0: rows},
        "list_lengths": {1: rows},
        "list_values": {0: torch.export.Dim("values", min=0)},
        "event_lengths": {1: rows},
        "event_values": {0: torch.export.Dim("event_numbers", min=0)},
    }
    shapes = (tuple(dynamic[name] for name in tensors),)
    return torch.export.export(program, tuple(tensors.values()), dynamic_shapes=shapes, strict=True)


def _torch_export(program: Program, path: Path) -> Run:
    torch.export.save(_exported(program), path)
    loaded = torch.export.load(path).module()
    return lambda tensors: loaded(*tensors.values())


def _onnx(program: Program, path: Path) -> Run:
    with needs("onnx", "an ONNX file"):
        import onnxruntime
        import onnxscript  # noqa: F401

    written = torch.onnx.export(
        _exported(program), input_names=list(program.inputs), output_names=[OUTPUT], dynamo=True, verbose=False
    )
    assert written is not None
    written.save(str(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {name: tensor.numpy() for name, tensor in tensors.items()})[0])

    return run


def _difference(model: Ranker, run: Run) -> float:
    """The largest difference of two logits of the program and of the model; infinite if one is no number."""
    worst = 0.0
    for seed, rows in enumerate(CHECKED):
        batch = random_batch(model.schema, rows, seed=seed + 10, empty=seed == len(CHECKED) - 1)
        found = run(_tensors(batch, model.schema)) - model(batch).logits_BT
        worst = max(worst, float(found.abs().nan_to_num(torch.inf).max()))
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print on their way."""
    loud, level = logging.getLogger("torch"), logging.getLogger("torch").level
    loud.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        loud.setLevel(level)


def _first_line(error: Exception) -> str:
    """Of what began it: exporters wrap errors in advice."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
