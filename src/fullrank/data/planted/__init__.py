"""Synthetic tasks with a planted structure and a known best answer, one file per task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.planted.cascade import Cascade
from fullrank.data.planted.cross_domain import CrossDomain
from fullrank.data.planted.heterogeneous import Heterogeneous
from fullrank.data.planted.interactions import Interactions
from fullrank.data.planted.segments import Segments
from fullrank.data.planted.task import PlantedTask
from fullrank.data.planted.timed import Timed
from fullrank.schema import describe_errors

# Names on the command line, and what each fixes.
TASKS: dict[str, tuple[type[PlantedTask], dict[str, Any]]] = {
    **{f"order-{order}": (Interactions, {"order": order}) for order in (1, 2, 3, 4)},
    **{task.name: (task, {}) for task in (Heterogeneous, Segments, Timed, Cascade, CrossDomain)},
}


def planted_task(name: str, rows: int | None = None, seed: int = 0, **options: Any) -> PlantedTask:
    """A task by its name.

    Args:
        rows: of all parts together; default the task's own.
        options: further fields of the task's class.

    Raises:
        ValueError: if there is no such task, or an option is unknown or impossible.
    """
    if name not in TASKS:
        raise ValueError(f'no planted task "{name}", expected one of {", ".join(TASKS)}')
    task, fixed = TASKS[name]
    size = {} if rows is None else {"rows": rows}
    try:
        return task.model_validate({**fixed, **size, "seed": seed, **options})
    except ValidationError as error:
        raise ValueError(describe_errors(error, f"task {name}").splitlines()[0]) from None


def planted_dataset(
    out: Path,
    name: str,
    rows: int | None = None,
    seed: int = 0,
    *,
    true_probabilities: bool = True,
    overwrite: bool = False,
    **options: Any,
) -> Dataset:
    """Write a task's log as a dataset directory, for the ordinary `Loader`.

    Args:
        name, rows, seed, options: of `planted_task`.
        true_probabilities: keep the columns `__true_<label>`.

    Raises:
        ValueError: as `planted_task`, or if `out` exists and `overwrite` is not set.
    """
    task = planted_task(name, rows, seed, **options)

    def frames(part: str) -> Any:
        for frame in task.frames(part):
            yield frame if true_probabilities else frame.select(c for c in frame.columns if not c.startswith("__true_"))

    source = f"planted task {name}, {task.model_dump_json()}"
    parts = {part: frames(part) for part in task.part_rows()}
    return write_dataset(out, task.log_schema(), parts, source=source, overwrite=overwrite)


__all__ = [
    "TASKS",
    "Cascade",
    "CrossDomain",
    "Heterogeneous",
    "Interactions",
    "PlantedTask",
    "Segments",
    "Timed",
    "planted_dataset",
    "planted_task",
]
