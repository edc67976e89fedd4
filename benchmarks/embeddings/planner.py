"""What a memory plan is worth: NE and bytes against a smaller width, hashing, and one kind alone, on two logs.

    python -m benchmarks.tables --data DIR --out tables --tables ml1m_ctr
    python -m benchmarks.embeddings.planner --set ml1m_ctr --tables tables
    python -m benchmarks.embeddings.planner --set avazu --avazu avazu.csv.gz

DLRM with a head of 64-32, tables of width 16, budgets of a half to a fiftieth of their bytes, the same seeds for every
entry. `plan`: `plan_tables`. `quotient_remainder`, `mixed_dimension`: the same rule with that kind, or plain, alone.
`uniform`: plain tables of the largest width that fits. `hash`: every table of more than 200 ids in buckets, all by one
factor; an id's bucket is drawn by its number, as the encoding `hash` does by its text. What cannot meet a budget is
left out. An entry is on the front if no other one takes fewer bytes, or as many, and has a lower mean NE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from benchmarks.embeddings.memory_quality import arguments, dataset_of, evaluated, summary
from benchmarks.machine import table, write
from fullrank.embeddings import Ask, Part, Table, TableConfig, register

WIDTH = 16
BUDGETS = (50, 25, 10, 2)
PRIME = 2**31 - 1


@register
class BucketTable(Table):
    """e(i) = W[(a i mod p) mod m]: the hashing trick."""

    class Config(TableConfig):
        """Attributes:
        buckets: m.
        """

        kind: Literal["benchmark_buckets"] = "benchmark_buckets"
        buckets: int = Field(ge=1)

    config: Config

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        self.parts = (Part("buckets", config.buckets, width, init_std),)

    def asks(self, ids_N: Any) -> list[Ask]:
        return [Ask(0, ids_N * 1_103_515_245 % PRIME % self.config.buckets)]

    def combine(self, ids_N: Any, asks: Sequence[Ask], vectors: Sequence[Any]) -> Any:
        return vectors[0]


def hashed(sizes: dict[str, int], budget: int) -> dict[str, Any] | None:
    """Buckets for the larger tables, as many as fit; None if the others do not."""
    small = sum(rows for rows in sizes.values() if rows <= 200)
    large = {name: rows for name, rows in sizes.items() if rows > 200}
    share = (budget / (4 * WIDTH) - small) / sum(large.values())
    if share <= 0:
        return None
    return {name: {"kind": "benchmark_buckets", "buckets": max(1, int(share * rows))} for name, rows in large.items()}


def entries(dataset: Any, percent: int) -> dict[str, dict[str, Any]]:
    """Label -> the model's fields, of what there is for a budget."""
    from fullrank.training.table_plan import plan_tables

    sizes = dataset.schema.tables()
    whole = 4 * WIDTH * sum(sizes.values())
    budget = whole * percent // 100
    plain: dict[str, Any] = {"embedding_dim": WIDTH}
    found: dict[str, dict[str, Any]] = {}
    for label in ("plan", "mixed_dimension", "quotient_remainder"):
        kinds = None if label == "plan" else ("full", label)
        try:
            plan = plan_tables({"name": "dlrm", **plain}, dataset, budget, kinds=kinds)
        except ValueError as error:
            print(f"{label} {percent} %: {error}")
            continue
        found[label] = {**plain, "tables": plan.tables()}
    width = budget // (4 * sum(sizes.values()))
    if width:
        found["uniform"] = {"embedding_dim": width}
    buckets = hashed(sizes, budget)
    if buckets is not None:
        found["hash"] = {**plain, "tables": buckets}
    return found


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with dataset_of(args.name, args.tables, args.avazu) as dataset:
        full = [evaluated(dataset, args.name, {"embedding_dim": WIDTH}, seed) for seed in args.seeds]
        rows.append({"budget": 100, **summary("full", full, full)})
        print(rows[-1], flush=True)
        for percent in BUDGETS:
            for label, model in entries(dataset, percent).items():
                found = [evaluated(dataset, args.name, model, seed) for seed in args.seeds]
                rows.append({"budget": percent, **summary(label, found, full)})
                print(rows[-1], flush=True)
        about = {"rows": {split: dataset.rows(split) for split in dataset.splits}, "ids": dataset.schema.tables()}
    for row in rows:
        row["on_front"] = not any(
            other["bytes"] <= row["bytes"] and other["test_ne"] < row["test_ne"] for other in rows
        )
    table(rows, list(rows[0]))
    write(f"planner_{args.name}", {"seeds": args.seeds, "width": WIDTH, **about, "results": rows})


if __name__ == "__main__":
    main()
