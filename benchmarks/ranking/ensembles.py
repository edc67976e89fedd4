"""CETNet against what it must beat: its members alone, twice as wide, and an average of members trained apart.

    python -m benchmarks.tables --data DIR --out tables
    python -m benchmarks.ranking.ensembles --set ml1m_ctr --tables tables
    python -m benchmarks.ranking.ensembles --set globo_time --tables tables

Protocol of `benchmarks.ranking.compare`: one epoch, batch 4096, dim 16, Adam 1e-3, several seeds; batch norm where the
member alone is better with it on validation. "Member in CETNet" is the member's own prediction inside the ensemble;
"+ intercept" fits one number to the fused logit on the validation rows, after training. Calibration is predicted clicks
over clicks.

Finished runs are kept in `--work` and not repeated, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write
from benchmarks.ranking import compare

HIDDEN = compare.HIDDEN
MEMBERS: dict[str, dict[str, dict[str, Any]]] = {
    "tables": {
        "dcn_v2": {"name": "dcn_v2", "hidden": HIDDEN, "batch_norm": True},
        "dlrm": {"name": "dlrm", "hidden": HIDDEN, "batch_norm": True},
    },
    "histories": {
        "interformer": {"name": "interformer", "hidden": HIDDEN, "batch_norm": True},
        "din": {"name": "din", "hidden": HIDDEN, "batch_norm": True},
    },
}


def logits_of(model: Any, dataset: Any, part: str) -> Any:
    """Fused logits and the members' (none for a single model), shape (1 + M, rows), and the labels."""
    import torch

    from fullrank.data.loader import Loader

    model.eval()
    found, labels = [], []
    with torch.no_grad():
        for batch in Loader(dataset, part, 8192):
            output = model(batch)
            members = [own.logits_BT for own in getattr(output, "members", ())]
            found.append(torch.stack([output.logits_BT, *members])[:, :, 0])
            labels.append(batch.labels_BT[:, 0])
    return torch.cat(found, 1).double(), torch.cat(labels).double()


def metrics(logit: Any, label: Any) -> dict[str, float]:
    from fullrank.metrics import BinaryMetrics

    measure = BinaryMetrics()
    measure.update(logit, label)
    found = measure.compute()
    return {key: found[key] for key in ("auc", "ne", "calibration")}


def intercept(logit: Any, label: Any) -> float:
    """The number that, added to the logits, makes predicted clicks equal to clicks."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (logit + middle).sigmoid().sum() < label.sum() else (low, middle)
    return (low + high) / 2


def run(dataset: Any, members: dict[str, dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    import torch

    from fullrank.training import TrainerConfig
    from fullrank.training.run import train_ranker

    records: list[dict[str, Any]] = []
    alone: dict[str, list[Any]] = {"valid": [], "test": []}
    jobs: dict[str, dict[str, Any]] = {}
    for name, values in members.items():
        jobs[f"{name} alone"] = values
        jobs[f"{name} alone, dim 32"] = {**values, "embedding_dim": 32}
    jobs["cetnet"] = {"name": "cetnet", "members": list(members.values())}
    labels: dict[str, Any] = {}

    def record(label: str, valid: Any, test: Any, model: Any = None) -> None:
        sizes = {}
        if model is not None:
            sizes = {"parameters": model.num_parameters().total, "flops_per_example": model.flops_per_example()}
        scores = {f"{part}_{key}": value for part, logit in (("valid", valid), ("test", test))
                  for key, value in metrics(logit, labels[part]).items()}  # fmt: skip
        records.append({"label": label, "seed": seed, **sizes, **scores})
        print(json.dumps(records[-1]), flush=True)

    for label, spec in jobs.items():
        model, _ = train_ranker(spec, dataset, TrainerConfig(seed=seed))
        logits = {}
        for part in ("valid", "test"):
            logits[part], labels[part] = logits_of(model, dataset, part)
        record(label, logits["valid"][0], logits["test"][0], model)
        if label.endswith(" alone"):
            for part in ("valid", "test"):
                alone[part].append(logits[part][0])
        if label == "cetnet":
            for index, own in enumerate(members, 1):
                record(f"{own} in cetnet", logits["valid"][index], logits["test"][index])
            shift = intercept(logits["valid"][0], labels["valid"])
            record("cetnet + intercept", logits["valid"][0] + shift, logits["test"][0] + shift)
    apart = {part: torch.logit(torch.stack(each).sigmoid().mean(0)) for part, each in alone.items()}
    record("average of members trained apart", apart["valid"], apart["test"])
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="name", required=True, choices=("ml1m_ctr", "globo_seq", "globo_time"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", type=Path, default=Path("tables"))
    parser.add_argument("--work", type=Path, default=Path("runs/ensembles"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    members = MEMBERS["tables" if args.name == "ml1m_ctr" else "histories"]
    journal = args.work / f"{args.name}.jsonl"
    records = compare.read_journal(journal)
    with tempfile.TemporaryDirectory() as folder:
        dataset = compare.dataset_of(args.name, args, Path(folder))
        for seed in args.seeds:
            if seed not in {record["seed"] for record in records}:
                new = run(dataset, members, seed)
                records += new
                compare.append_journal(journal, new)
    rows = []
    for label in dict.fromkeys(record["label"] for record in records):
        mine = [record for record in records if record["label"] == label]
        row: dict[str, Any] = {"label": label, "seeds": len(mine)}
        for key in mine[0]:
            if key not in ("label", "seed"):
                row[key] = statistics.mean(record[key] for record in mine)
        row["standard_error"] = compare.standard_error([record["test_auc"] for record in mine])
        rows.append(row)
    rows.sort(key=lambda row: -row["test_auc"])
    shown = ["label", "seeds", "valid_auc", "test_auc", "standard_error", "test_ne", "test_calibration", "parameters"]
    print()
    table(rows, [*shown, "flops_per_example"])
    settings = {"members": members, "seeds": args.seeds, "threads": args.threads}
    write(f"ranking_ensembles_{args.name}", {"settings": settings, "summary": rows, "runs": records})


if __name__ == "__main__":
    main()
