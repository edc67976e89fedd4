"""Training speed, CSV-to-tested-model time and memory, against FuxiCTR, RecBole and DeepCTR-Torch.

    python -m benchmarks.tables --data DIR --out tables
    python -m benchmarks.ctr_throughput --tables tables --fuxictr-python P --fuxictr-zoo CHECKOUT/model_zoo \
        --recbole-python P --deepctr-python P

Each program reads the CSV files, encodes them, trains one epoch at batch 4096 (dim 16, hidden 256-128-64) and tests.
Runs are interleaved, `--repeats` times, and medians are reported. Ours is `fullrank train` with the recipe of the
same name; the peers run Adam 1e-3, batch norm as in `CASES` (the better setting of each, by the quality benchmark).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write

HERE = Path(__file__).parent
# case -> recipe, FuxiCTR model and its batch norm, RecBole model, DeepCTR-Torch model
CASES: dict[str, tuple[str, str, int, str | None, str | None]] = {
    "ml1m_ctr deepfm": ("movielens-1m-deepfm", "DeepFM", 1, "DeepFM", "DeepFM"),
    "ml1m_ctr dcn_v2": ("movielens-1m-dcn_v2", "DCNv2", 1, "DCNV2", "DCN"),
    "ml1m_ctr dlrm": ("movielens-1m-dlrm", "DLRM", 0, None, None),
    "ml1m_ctr finalmlp": ("movielens-1m-finalmlp", "FinalMLP", 0, None, None),
    "globo_seq din": ("globo-din", "DIN", 1, None, "DIN"),
}


def run(command: list[str], environment: dict[str, str]) -> tuple[str, float, int]:
    """Standard output, wall seconds and peak memory (MiB) of the largest process."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{errors.read()[-3000:]}")
        return output.read(), time.perf_counter() - begin, usage.ru_maxrss // 1024


def ours(case: str, args: argparse.Namespace, environment: dict[str, str], scratch: Path) -> dict[str, Any]:
    name, recipe = case.split()[0], CASES[case][0]
    for made in ("dataset", "run"):
        shutil.rmtree(scratch / made, ignore_errors=True)
    command = [
        sys.executable, "-c", "from fullrank.cli.main import main; main()", "train",
        str(HERE.parent / f"recipes/{recipe}.yaml"),
        "--set", f"data.dataset={scratch / 'dataset'}", "--set", f"data.source.path={args.tables / name}",
        "--set", f"data.source.schema_file={HERE.parent / 'recipes'}/{recipe.rsplit('-', 1)[0]}.schema.json",
        "--set", f"threads={args.threads}", "--out", str(scratch / "run"), "--json",
    ]  # fmt: skip
    text, wall, memory = run(command, environment)
    report = json.loads(text)

    return {
        "program": "fullrank",
        "samples_per_s": report["samples_per_second"],
        "csv_to_tested_s": wall,
        "peak_main_mib": memory,
        "peak_all_mib": memory,
        "test_auc": report["test"]["auc"],
        "parameters": report["parameters"]["total"],
        "precision": report["precision"],
    }


def peer(
    case: str, program: str, args: argparse.Namespace, environment: dict[str, str], scratch: Path
) -> dict[str, Any] | None:
    name = case.split()[0]
    _, fuxictr, norm, recbole, deepctr = CASES[case]
    data = str(args.tables / name)
    threads = ["--threads", str(args.threads)]
    if program == "fuxictr" and args.fuxictr_python:
        command = [args.fuxictr_python, str(HERE / "peers/fuxictr_peer.py"), "--jobs", f"{fuxictr}:0.001:{norm}:2024",
                   "--data", data, "--zoo", args.fuxictr_zoo, "--work", str(scratch / "fuxictr"), *threads]  # fmt: skip
    elif program == "recbole" and args.recbole_python and recbole:
        command = [args.recbole_python, str(HERE / "peers/recbole_peer.py"), "--model", recbole, "--data", data,
                   "--work", str(scratch / "recbole"), *threads]  # fmt: skip
    elif program == "deepctr-torch" and args.deepctr_python and deepctr:
        command = [args.deepctr_python, str(HERE / "peers/deepctr_torch_peer.py"), "--model", deepctr, "--data", data,
                   *threads, *(["--bn"] if norm else [])]  # fmt: skip
    else:
        return None
    text, wall, memory = run(command, environment)
    report = json.loads([line for line in text.splitlines() if line.startswith("{")][-1])
    return {
        "program": program,
        "samples_per_s": report["samples_per_s_steady_wall"],
        "csv_to_tested_s": wall,
        "peak_main_mib": memory,
        "peak_all_mib": report["peak_pss_tree_mib"],
        "test_auc": report["test_auc"],
        "parameters": report["parameters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--journal", type=Path, help="file of finished runs: a broken benchmark goes on from it")
    parser.add_argument("--fuxictr-python")
    parser.add_argument("--fuxictr-zoo")
    parser.add_argument("--recbole-python")
    parser.add_argument("--deepctr-python")
    args = parser.parse_args()
    args.tables = args.tables.resolve()
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONWARNINGS": "ignore"}
    environment.pop("OMP_WAIT_POLICY", None)
    runs: list[dict[str, Any]] = []
    if args.journal and args.journal.exists():
        runs = [json.loads(line) for line in args.journal.read_text().splitlines()]
    done = {(run["case"], run["repeat"], run["program"]) for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for case in args.cases:
                for program in ("fullrank", "fuxictr", "recbole", "deepctr-torch"):
                    if (case, repeat, program) in done:
                        continue
                    scratch = Path(folder)
                    if program == "fullrank":
                        record = ours(case, args, environment, scratch)
                    else:
                        found = peer(case, program, args, environment, scratch)
                        if found is None:
                            continue
                        record = found
                    runs.append({"case": case, "repeat": repeat, **record})
                    line = json.dumps(runs[-1])
                    print(line, flush=True)
                    if args.journal:
                        with args.journal.open("a") as journal:
                            journal.write(line + "\n")
    summary = summarise(runs)
    print()
    columns = [
        "case",
        "program",
        "samples_per_s",
        "csv_to_tested_s",
        "peak_main_mib",
        "peak_all_mib",
        "test_auc",
        "speed_ratio",
    ]
    table(summary, columns)
    write(
        "ctr_throughput",
        {"settings": {"repeats": args.repeats, "threads": args.threads}, "summary": summary, "runs": runs},
    )


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians by case and program; `speed_ratio` is ours over the program's samples/s."""
    summary: list[dict[str, Any]] = []
    for case, program in dict.fromkeys((run["case"], run["program"]) for run in runs):
        mine = [run for run in runs if (run["case"], run["program"]) == (case, program)]
        row: dict[str, Any] = {"case": case, "program": program}
        for key in mine[0]:
            if key == "precision":
                row[key] = mine[0][key]
            elif key not in ("case", "program", "repeat"):
                row[key] = statistics.median(run[key] for run in mine)
        summary.append(row)
    for row in summary:
        base = next(r for r in summary if r["case"] == row["case"] and r["program"] == "fullrank")
        row["speed_ratio"] = base["samples_per_s"] / row["samples_per_s"]
    return summary


if __name__ == "__main__":
    main()
