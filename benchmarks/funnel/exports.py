"""Which rankers can be exported, in which format, and how far their logits are from the model's.

    python -m benchmarks.funnel.exports

Every registered ranker with its default Config on the simulated log's schema, its parameters perturbed so that no logit
is trivial. ONNX needs the extra `onnx`; without it only the other format is tried.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from fullrank.data.simulate import simulate_dataset
from fullrank.extras import EXTRAS
from fullrank.funnel.exporting import FILES, export_ranker
from fullrank.models import RANKERS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rankers", nargs="*", default=list(RANKERS))
    arguments = parser.parse_args()
    formats = [name for name in FILES if name != "onnx" or not EXTRAS["onnx"].missing()]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        schema = simulate_dataset(Path(directory) / "data", 4000, seed=0).schema
        for name in arguments.rankers:
            row: dict[str, Any] = {"ranker": name}
            for format_ in formats:
                torch.manual_seed(0)
                model = RANKERS[name].from_config(schema, {})
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.add_(0.05 * torch.randn_like(parameter))
                try:
                    said = export_ranker(model, Path(directory) / f"{name}-{format_}", format_)  # type: ignore[arg-type]
                    row[format_] = said["max_difference"]
                except ValueError as error:
                    row[format_], row[f"{format_} refused"] = None, str(error)
            rows.append(row)
            print(row, flush=True)
    shown = [{"ranker": row["ranker"], **{name: _shown(row[name]) for name in formats}} for row in rows]
    machine.table(shown, ["ranker", *formats])
    machine.write("exports", {"seed": 0, "rows": rows})


def _shown(difference: float | None) -> str:
    return "refused" if difference is None else f"{difference:.1e}"


if __name__ == "__main__":
    main()
