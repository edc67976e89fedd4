"""Time and memory of turning the comparison tables (CSV) into ids: ours, FuxiCTR's preprocessing, and by hand.

    python -m benchmarks.tables --data DIR --out tables
    python -m benchmarks.import_speed --tables tables --fuxictr-python P --deepctr-python P [--fuxictr-zoo DIR]

fullrank                `fullrank data import csv`: rows checked, encoders fitted on train, Parquet written
fuxictr                 FuxiCTR's `build_dataset`: encoders fitted on train, Parquet written
label-encoder, polars   arrays in memory, nothing checked or written (see peers/by_hand_import.py)

The programs take turns, `--repeats` times, and medians are reported. `cpu_s` counts every process that a program
starts, Ray's workers included (see `benchmarks.process_tree`). A program is measured as a whole, from its start to its
end; for the peers, `work_s` and `work_cpu_s` leave out the start of Python, the imports and the end. Ratios compare our
whole program with the peer's work alone, which favours the peer. FuxiCTR's preprocessing lies in its wheel: the
checkout named by --fuxictr-zoo is only needed for its commit to be recorded.

A run replaces the results of its tables in the JSON and keeps those of others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import process_tree
from benchmarks.machine import RESULTS, table, write

HERE = Path(__file__).parent
SCHEMAS = {"ml1m_ctr": "movielens-1m", "globo_seq": "globo"}
PROGRAMS = ("fullrank", "fuxictr", "label-encoder", "polars")


def command(program: str, name: str, args: argparse.Namespace, scratch: Path) -> list[str] | None:
    data = str(args.tables / name)
    if program == "fullrank":
        schema = HERE.parent / f"recipes/{SCHEMAS[name]}.schema.json"
        run = "from fullrank.cli.main import main; main()"
        return [sys.executable, "-c", run, "data", "import", "csv", data, str(scratch / "ours"), "--schema",
                str(schema), "--json"]  # fmt: skip
    if program == "fuxictr":
        if not args.fuxictr_python:
            return None
        return [args.fuxictr_python, str(HERE / "peers/fuxictr_import.py"), "--data", data, "--work", str(scratch)]
    if not args.deepctr_python:
        return None
    return [args.deepctr_python, str(HERE / "peers/by_hand_import.py"), "--data", data, "--how", program]


def measure(program: str, name: str, args: argparse.Namespace) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        line = command(program, name, args, Path(folder))
        if line is None:
            return None
        load = os.getloadavg()[0]
        usage = process_tree.run(line, {**os.environ, "PYTHONWARNINGS": "ignore"})
    report = json.loads([text for text in usage.output.splitlines() if text.startswith("{")][-1])
    record = {
        "table": name,
        "program": program,
        "wall_s": usage.wall_s,
        "cpu_s": usage.cpu_s,
        "work_s": usage.wall_s,
        "work_cpu_s": usage.cpu_s,
        "peak_mib_largest": usage.peak_mib_largest,
        "peak_mib_all": usage.peak_mib_all,
        "processes": usage.processes,
        "load_before": load,
    }
    if "begin" in report:
        record["work_s"] = report["end"] - report["begin"]
        record["work_cpu_s"] = usage.cpu_until(report["end"]) - usage.cpu_until(report["begin"])
    return record


def rows_of(path: Path) -> int:
    """Lines of the three files without their headers."""
    return sum((path / f"{part}.csv").read_bytes().count(b"\n") - 1 for part in ("train", "valid", "test"))


def summarise(runs: list[dict[str, Any]], rows: dict[str, int]) -> list[dict[str, Any]]:
    """Medians by table and program, rows per second, and ours over the peer's."""
    summary: list[dict[str, Any]] = []
    for name, program in dict.fromkeys((run["table"], run["program"]) for run in runs):
        mine = [run for run in runs if (run["table"], run["program"]) == (name, program)]
        row: dict[str, Any] = {"table": name, "program": program}
        for key in mine[0]:
            if key not in ("table", "program", "repeat", "load_before"):
                row[key] = statistics.median(run[key] for run in mine)
        row["rows_per_cpu_s"] = rows[name] / row["work_cpu_s"]
        row["rows_per_s"] = rows[name] / row["work_s"]
        summary.append(row)
    for row in summary:
        ours = next(other for other in summary if other["table"] == row["table"] and other["program"] == "fullrank")
        row["cpu_ratio"] = ours["rows_per_cpu_s"] / row["rows_per_cpu_s"]
        row["wall_ratio"] = ours["rows_per_s"] / row["rows_per_s"]
        row["memory_ratio"] = row["peak_mib_all"] / ours["peak_mib_all"]
    return summary


def commit_of(zoo: Path | None) -> str | None:
    if zoo is None:
        return None
    found = subprocess.run(["git", "-C", str(zoo), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--names", nargs="+", default=list(SCHEMAS), choices=list(SCHEMAS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fuxictr-python")
    parser.add_argument("--fuxictr-zoo", type=Path)
    parser.add_argument("--deepctr-python")
    args = parser.parse_args()
    args.tables = args.tables.resolve()
    rows = {name: rows_of(args.tables / name) for name in args.names}
    runs: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        for name in args.names:
            for program in PROGRAMS:
                record = measure(program, name, args)
                if record is not None:
                    runs.append({"repeat": repeat, **record})
                    print(json.dumps(runs[-1]), flush=True)
    earlier = RESULTS / "import_speed.json"
    if earlier.exists():
        stored = json.loads(earlier.read_text())
        runs = [run for run in stored["runs"] if run["table"] not in args.names] + runs
        rows = {**stored["settings"]["rows"], **rows}
    summary = summarise(runs, rows)
    print()
    table(summary, ["table", "program", "wall_s", "cpu_s", "work_s", "work_cpu_s", "rows_per_cpu_s", "cpu_ratio",
                    "wall_ratio", "peak_mib_largest", "peak_mib_all"])  # fmt: skip
    settings = {"repeats": args.repeats, "rows": rows, "fuxictr_commit": commit_of(args.fuxictr_zoo)}
    write("import_speed", {"settings": settings, "summary": summary, "runs": runs})


if __name__ == "__main__":
    main()
