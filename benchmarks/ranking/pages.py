"""Write the tables of the documentation from the committed results.

    python -m benchmarks.ranking.pages

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is a file of benchmarks/results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

DOCS = Path(__file__).parents[2] / "docs"
# heading -> key of a summary row, digits after the point
COLUMNS: dict[str, tuple[str, int]] = {
    "test AUC": ("test_auc", 4),
    "s.e.": ("standard_error", 4),
    "income": ("test_income_auc", 4),
    "never married": ("test_never_married_auc", 4),
    "test gAUC": ("test_gauc", 4),
    "test NE": ("test_ne", 4),
    "test logloss": ("test_logloss", 4),
    "calibration": ("test_calibration", 4),
    "valid AUC": ("valid_auc", 4),
    "share of peak": ("share_of_peak", 2),
    "ms": ("ms", 1),
    "compiled ms": ("compiled_ms", 1),
    "compiled is faster by": ("compiled_gain", 2),
    "compiled difference": ("compiled_difference", 7),
    "parameters": ("parameters", 0),
    "kFLOP": ("flops_per_example", -3),
    "samples/s": ("samples_per_s", 0),
}


def cell(value: Any, digits: int) -> str:
    if value is None or value != value:
        return ""
    return f"{value / 1000:,.0f}" if digits < 0 else f"{value:,.{digits}f}"


def markdown(name: str) -> str:
    if not (RESULTS / f"{name}.json").exists():
        return "Not measured."
    result = json.loads((RESULTS / f"{name}.json").read_text())
    rows = result.get("summary") or result["rows"]
    columns = {head: spec for head, spec in COLUMNS.items() if any(row.get(spec[0]) is not None for row in rows)}
    lines = ["| model | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        cells = [cell(row.get(key), digits) for key, digits in columns.values()]
        lines.append(f"| {row.get('label') or row['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    marked = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    for page in DOCS.rglob("*.md"):
        old = page.read_text()
        new = marked.sub(lambda found: f"{found[1]}\n{markdown(found[2])}\n\n{found[3]}", old)
        if new != old:
            page.write_text(new)


if __name__ == "__main__":
    main()
