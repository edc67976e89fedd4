"""FuxiCTR's own models under the protocol of `benchmarks.ranking.compare`, on the same tables.

    python -m benchmarks.ranking.fuxictr_zoo --set ml1m_ctr --tables tables --fuxictr-python P --fuxictr-zoo C/model_zoo
    python -m benchmarks.ranking.fuxictr_zoo --set amazon_beauty ...

Same epochs, batch, dim, widths and learning rate, and the same budget: batch norm off and on with the first seed, the
better one on validation with the others. On sets with histories its DIN runs, which reads them as ours does.

Finished runs are kept in `--work` and not repeated, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write
from benchmarks.ranking import compare

PEER = Path(__file__).parents[1] / "peers" / "fuxictr_peer.py"
# LR, FM, DeepFM, DCN-V2, DLRM, AutoInt+ and FinalMLP are in benchmarks.ctr_quality.
TABULAR = ("MaskNet", "FinalNet", "WuKong")
NO_CHOICE = ("MaskNet",)


def run(args: argparse.Namespace, jobs: list[tuple[str, bool, int]]) -> list[dict[str, Any]]:
    """One process for all jobs, which share FuxiCTR's preprocessing."""
    epochs, batch = compare.EPOCHS[args.name], 1024 if args.name.startswith("amazon") else 4096
    with tempfile.TemporaryDirectory() as scratch:
        command = [args.fuxictr_python, str(PEER), "--jobs", *(f"{m}:0.001:{int(n)}:{s}" for m, n, s in jobs)]
        command += ["--data", str(args.tables / args.name), "--zoo", args.fuxictr_zoo, "--work", scratch]
        command += ["--threads", str(args.threads), "--epochs", str(epochs), "--batch", str(batch)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(finished.stderr[-3000:])
    found = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    kept = ("batch_norm", "seed", "valid_auc", "test_auc", "test_logloss", "parameters", "version")
    return [{"label": record["model"], **{key: record[key] for key in kept}} for record in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set", dest="name", required=True, choices=[name for name in compare.SCHEMAS if name != "census"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", type=Path, default=Path("tables"))
    parser.add_argument("--fuxictr-python", required=True)
    parser.add_argument("--fuxictr-zoo", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/fuxictr"))
    args = parser.parse_args()
    journal = args.work / f"{args.name}.jsonl"
    records = compare.read_journal(journal)
    models = TABULAR if args.name == "ml1m_ctr" else ("DIN",)

    def missing(jobs: list[tuple[str, bool, int]]) -> None:
        done = {(r["label"], r["batch_norm"], r["seed"]) for r in records}
        if jobs := [job for job in jobs if job not in done]:
            new = run(args, jobs)
            records.extend(new)
            compare.append_journal(journal, new)

    first, *others = args.seeds
    missing([(m, n, first) for m in models for n in ((False,) if m in NO_CHOICE else (False, True))])
    missing([(m, compare.chosen_norm(records, m), seed) for m in models for seed in others])
    rows = compare.summarise(records)
    table(
        rows, ["label", "batch_norm", "seeds", "valid_auc", "test_auc", "standard_error", "test_logloss", "parameters"]
    )
    settings = {"seeds": args.seeds, "threads": args.threads, "epochs": compare.EPOCHS[args.name]}
    write(f"ranking_fuxictr_{args.name}", {"settings": settings, "summary": rows, "runs": records})


if __name__ == "__main__":
    main()
