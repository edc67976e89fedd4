"""What a delta costs: comparing, writing and applying, with two tables of a million rows.

    python -m benchmarks.stream_deltas

A ranker has two tables of 1,000,000 rows of width 16. Between deltas 60,000 rows of each change, as many as 1,000
events a second could touch in a minute, and all dense weights. CPU time, the best of five; wall time, the median,
beside whatever else runs on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from fullrank.models import RankerSpec
from fullrank.schema import Categorical, Label, Schema
from fullrank.training import load_model, save_model
from fullrank.training.deltas import apply_delta, changes, position_of, write_delta

TOUCHED, TIMES = 60_000, 5


def measured(what: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, CPU seconds and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = what()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    torch.set_num_threads(1)
    torch.manual_seed(0)
    schema = Schema(
        features=tuple(Categorical(name=name, encoding="identity", num_embeddings=rows) for name in ("user", "item")),
        labels=(Label(name="click"),),
    )
    model = RankerSpec.of({"name": "dcn_v2", "embedding_dim": 16, "hidden": [128, 64]}).build(schema)
    times: dict[str, list[tuple[float, float]]] = {"compare": [], "compare and write": [], "apply": []}
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        save_model(model, base)
        served = load_model(base)
        position = here = position_of(base)
        for number in range(TIMES):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    if name.rpartition("tables.")[1]:
                        value[torch.randperm(rows)[:TOUCHED]] += 0.1
                    elif value.is_floating_point():
                        value += 0.01
            after, path = model.state_dict(), Path(place) / f"{number}"
            _, *took = measured(lambda before=before, after=after: changes(before, after))
            times["compare"].append((took[0], took[1]))
            here, *took = measured(
                lambda path=path, before=before, after=after, here=here: write_delta(
                    path, before, after, here, schema=schema, until=0
                )
            )
            times["compare and write"].append((took[0], took[1]))
            position, *took = measured(lambda path=path, position=position: apply_delta(served, path, position))
            times["apply"].append((took[0], took[1]))
            assert position == here
        size = sum(file.stat().st_size for file in path.iterdir())
        whole = sum(file.stat().st_size for file in base.iterdir())
        assert all(torch.equal(value, served.state_dict()[name]) for name, value in model.state_dict().items())
    table = [
        {
            "what": what,
            "CPU ms": 1000 * min(cpu for cpu, _ in found),
            "wall ms": 1000 * statistics.median(wall for _, wall in found),
        }
        for what, found in times.items()
    ]
    machine.table(table, ["what", "CPU ms", "wall ms"])
    print(f"delta {size / 1e6:.1f} MB, bundle {whole / 1e6:.1f} MB")
    about = {"rows": rows, "width": 16, "touched": TOUCHED, "delta_bytes": size, "bundle_bytes": whole}
    machine.write("stream_deltas", {**about, "table": table})


if __name__ == "__main__":
    main()
