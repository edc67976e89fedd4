"""From the results of benchmarks to the plots of the docs pages; imported before pyplot, to draw without a screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "fullrank"  # names inside the file would be random

__all__ = ["plt", "results", "write_plot"]

ROOT = Path(__file__).parents[2]


def results(name: str) -> list[dict[str, Any]]:
    """Rows of a benchmark's result file."""
    return json.loads((ROOT / "benchmarks" / "results" / "randomized" / f"{name}.json").read_text())["results"]


def write_plot(figure: Any, name: str, **options: Any) -> None:
    """Write `docs/papers/<name>.svg`, the same bytes for the same plot."""
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "papers" / f"{name}.svg", metadata={"Date": None}, **options)
    print(f"written: docs/papers/{name}.svg")
