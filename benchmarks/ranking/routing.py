"""Do HiLoMoE's experts find the segments of the planted task? Paths of the trained router against the true segments.

    python -m benchmarks.ranking.routing

DCN-V2 with experts in every hidden layer, hierarchical and flat routing of as many experts, and both again without the
three stages; protocol of `benchmarks.ranking.compare`. A row's path in a layer is its first choice at every level. NMI
is the mutual information of path and segment over the mean of their entropies, on the test rows, for the layer where it
is largest; "chance" is the same with the segments shuffled. Path entropy is a share of that of as many equally frequent
paths as there are segments (4), cut at 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write
from benchmarks.ranking import compare

KINDS: dict[str, dict[str, Any]] = {
    "hierarchical": {},
    "flat": {"hierarchical": False},
    "hierarchical, no stages": {"warm_up": 0, "growth": 0},
    "flat, no stages": {"hierarchical": False, "warm_up": 0, "growth": 0},
}


def run(dataset: Any, options: dict[str, Any], seed: int) -> dict[str, Any]:
    import torch
    from sklearn.metrics import normalized_mutual_info_score as nmi

    from fullrank.data.loader import Loader
    from fullrank.models.hilomoe import expert_usage
    from fullrank.training import evaluate
    from fullrank.training.run import train_ranker

    backbone = {"name": "dcn_v2", "hidden": compare.HIDDEN, "batch_norm": True}
    training = compare.training_config(dataset, seed, compare.EPOCHS["segments"])
    model: Any
    model, _ = train_ranker({"name": "hilomoe", "backbone": backbone, **options}, dataset, training)
    test = Loader(dataset, "test", 8192)
    scores: dict[str, list[Any]] = {}
    for batch in test:
        for layer, found in model.routing(batch).items():
            scores.setdefault(layer, []).append(found)
    segment = dataset.scan("test").collect()["__true_segment"].to_numpy().astype(int)
    shuffled = segment[torch.randperm(len(segment), generator=torch.Generator().manual_seed(0)).numpy()]
    best: dict[str, Any] = {"nmi": -1.0}
    for layer, parts in scores.items():
        scores_NLK = torch.cat(parts)
        _, path = torch.unique(scores_NLK.argmax(2), dim=0, return_inverse=True)
        here = float(nmi(segment, path.numpy()))
        if here > best["nmi"]:
            entropy = expert_usage(scores_NLK)[1] / math.log(4)
            chance = float(nmi(shuffled, path.numpy()))
            best = {"nmi": here, "chance": chance, "layer": layer, "path_entropy": min(1.0, entropy)}
    return {**best, "test_auc": next(iter(evaluate(model, test).values()))["auc"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    from fullrank.data.planted import planted_dataset

    records = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = planted_dataset(Path(folder) / "dataset", "segments")
        for seed in args.seeds:
            for label, options in KINDS.items():
                records.append({"label": label, "seed": seed, **run(dataset, options, seed)})
                print(json.dumps(records[-1]), flush=True)
    rows = []
    for label in KINDS:
        mine = [record for record in records if record["label"] == label]
        row: dict[str, Any] = {"label": label, "seeds": len(mine)}
        for key in ("nmi", "chance", "path_entropy", "test_auc"):
            row[key] = statistics.mean(record[key] for record in mine)
            row[f"{key}_error"] = compare.standard_error([record[key] for record in mine])
        rows.append(row)
    table(rows, ["label", "seeds", "nmi", "nmi_error", "chance", "path_entropy", "test_auc", "test_auc_error"])
    write(
        "hilomoe_routing",
        {"settings": {"seeds": args.seeds, "threads": args.threads}, "summary": rows, "runs": records},
    )


if __name__ == "__main__":
    main()
