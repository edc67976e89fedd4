"""Mixed dimensions by field and by popularity against plain tables: NE and parameters on two logs.

    python -m benchmarks.tables --data DIR --out tables --tables ml1m_ctr
    python -m benchmarks.embeddings.mixed_dimension --set ml1m_ctr --tables tables
    python -m benchmarks.embeddings.mixed_dimension --set avazu --avazu avazu.csv.gz

DLRM with a head of 64-32 and tables of width 32, the same seeds for every entry. `uniform`: plain tables of a smaller
width. `field`: one width for each table by the popularity rule, under a budget of a share of the plain tables' numbers.
`popularity`: four blocks of about equal counts in each table, widths by a temperature.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.embeddings.memory_quality import arguments, dataset_of, evaluated, summary
from benchmarks.machine import table, write

WIDTH = 32
UNIFORM = (16, 8, 2)
SHARES = (2, 4, 16)
TEMPERATURES = (0.1, 0.3, 0.6)


def entries(dataset: Any) -> dict[str, dict[str, Any]]:
    """Label -> the model's fields; a budget that no temperature meets is left out."""
    from fullrank.embeddings.dimensions import mixed_dimensions

    sizes = dataset.schema.tables()
    found: dict[str, dict[str, Any]] = {"full": {"embedding_dim": WIDTH}}
    found |= {f"uniform {width}": {"embedding_dim": width} for width in UNIFORM}
    for share in SHARES:
        try:
            dims = mixed_dimensions([*sizes.values()], WIDTH, budget=WIDTH * sum(sizes.values()) // share)
        except ValueError as error:
            print(f"field 1/{share}: {error}")
            continue
        tables = {name: {"kind": "mixed_dimension", "dim": dim} for name, dim in zip(sizes, dims, strict=True)}
        found[f"field 1/{share}"] = {"embedding_dim": WIDTH, "tables": tables}
    for temperature in TEMPERATURES:
        settings = {"kind": "mixed_dimension", "temperature": temperature}
        found[f"popularity {temperature}"] = {"embedding_dim": WIDTH, "tables": dict.fromkeys(sizes, settings)}
    return found


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with dataset_of(args.name, args.tables, args.avazu) as dataset:
        full: list[dict[str, float]] = []
        for label, model in entries(dataset).items():
            found = [evaluated(dataset, args.name, model, seed) for seed in args.seeds]
            full = full or found
            rows.append(summary(label, found, full))
            print(rows[-1], flush=True)
        about = {"rows": {split: dataset.rows(split) for split in dataset.splits}, "ids": dataset.schema.tables()}
    table(rows, list(rows[0]))
    write(f"mixed_dimension_{args.name}", {"seeds": args.seeds, "width": WIDTH, **about, "results": rows})


if __name__ == "__main__":
    main()
