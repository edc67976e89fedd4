"""CPU time of searches for the 100 largest inner products: all indexes of vectors, at a recall of .95.

python -m benchmarks.retrieval.dot_products [--items 1000000] [--graph-items 100000]

Vectors of 64 numbers around 20,000 centres of Zipf popularity whose spectrum falls as j^-1/2; queries from the same
mixture. "raw" keeps log-normal norms (coefficient of variation .24), "unit" has none. Every index chooses its effort by
500 queries apart from those that are timed. The others are measured at a million items, graphs, which take long to
build, at 100,000, with the rest beside them once more.

Process CPU time on one thread. Indexes of a set take turns; each number is the median of five rounds of 100 single
queries, or of 4 batches of 64. "alone" is what the library's own search takes of it: the rest is scoring again in
float32. Bytes are those of the library's index; beside it stand 256 a vector in float32, and 128 more where all items
may be scored in bfloat16. Libraries that are not installed are left out.

Written to benchmarks/results/retrieval_dot_products.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write

WIDTH, CENTRES, K = 64, 20_000, 100
TUNING, QUERIES, BATCH, ROUNDS = 500, 300, 64, 5
FAISS = ("faiss_ivf_sq8", "faiss_ivf_pq", "faiss_4bit", "faiss_ivf_4bit")
PLAIN = ("exact float32", "exact", "ivf", *FAISS, "scann", "auto")
GRAPHS = ("exact", "faiss_ivf_sq8", "faiss_ivf_4bit", "scann", "auto", "faiss_hnsw", "hnswlib", "usearch")
OURS = ("exact float32", "exact", "ivf", "auto")


def vectors(items: int, *, unit: bool, seed: int = 0) -> tuple[Any, Any]:
    """Vectors of items and of queries."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, WIDTH + 1).float() ** -0.5
    centres = torch.randn(CENTRES, WIDTH, generator=generator) * scale
    popularity = torch.arange(1, CENTRES + 1).float() ** -0.8

    def draw(count: int) -> Any:
        of = torch.multinomial(popularity, count, replacement=True, generator=generator)
        drawn = centres[of] + 0.5 * torch.randn(count, WIDTH, generator=generator) * scale
        drawn = drawn / drawn.norm(dim=1, keepdim=True)
        return drawn if unit else drawn * torch.exp(0.24 * torch.randn(count, 1, generator=generator))

    return draw(items), draw(TUNING + QUERIES)


def seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def library_bytes(name: str, index: Any) -> int | None:
    """Bytes of the library's index as it writes it."""
    if name.startswith("exact") or index.snapshot is None:
        return 0
    if name == "auto":
        parts = [library_bytes(of, index.indexes[of]) for of in index.snapshot.library]
        return sum(part or 0 for part in parts)
    library = index.snapshot.library
    if name == "faiss_ivf_4bit":
        library = library.index
    if name == "ivf":
        held = (library.centroids_CD, library.order_S, library.vectors_SD)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
    if name == "usearch":
        return int(library.serialized_length)
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("faiss"):
            index.faiss.write_index(library, f"{folder}/index")
        elif name == "hnswlib":
            library.save_index(f"{folder}/index")
        else:
            library.serialize(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def measured(names: tuple[str, ...], kind: str, drawn: tuple[Any, Any], k: int = K) -> list[dict[str, Any]]:
    """A line for each index.

    Args:
        kind: what the vectors are called.
        drawn: vectors of items, and queries: first those for tuning.
    """
    import torch

    from fullrank.retrieval.exact import ExactIndex
    from fullrank.retrieval.vectors import VECTOR_INDEXES

    vectors_ID, queries_BD = drawn
    items, width = vectors_ID.shape
    tuning_BD, queries_BD = queries_BD[:TUNING], queries_BD[TUNING:]
    keys_I = torch.arange(items)
    indexes: dict[str, Any] = {}
    lines: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            if name == "exact float32":
                index: Any = ExactIndex(width, ExactIndex.Config(bfloat16=False))
            elif name == "exact":
                index = ExactIndex(width)
            else:
                index = VECTOR_INDEXES[name](width, VECTOR_INDEXES[name].Config.model_validate({"results": k}))
        except ImportError as error:
            print(f"left out: {error}")
            continue
        index.typical_QD = tuning_BD
        build = seconds(lambda index=index: index.add(keys_I, vectors_ID))  # type: ignore[misc]
        if hasattr(index, "tune"):
            index.tune(tuning_BD)
        indexes[name] = index
        size = library_bytes(name, index)
        lines[name] = {"set": kind, "items": items, "index": name, "build_s": build, "bytes": size}
        if name == "auto":
            lines[name]["ways"] = index.ways
        print(f"{name}: built in {build:.0f} s", flush=True)
    exact_BK = indexes["exact"].search(queries_BD, k).item_keys_BK
    singles = [queries_BD[row : row + 1] for row in range(100)]
    batches = [queries_BD[row : row + BATCH] for row in range(0, 4 * BATCH, BATCH)]
    for name, index in indexes.items():
        found_BK = torch.cat([index.search(queries_BD[row : row + 1], k).item_keys_BK for row in range(QUERIES)])
        share_B = (found_BK[:, :, None] == exact_BK[:, None, :]).any(1).double().mean(1)
        effort = getattr(index, "effort", None)
        lines[name] |= {"effort": effort, "recall": float(share_B.mean()), "single_ms": [], "batch_ms": []}
        if name not in OURS:
            lines[name]["alone_single_ms"], lines[name]["alone_batch_ms"] = [], []

    def searches(index: Any, parts: list[Any]) -> float:
        taken = seconds(lambda: [index.search(part_BD, k) for part_BD in parts])
        return 1000 * taken / sum(len(part_BD) for part_BD in parts)

    def alone(index: Any, parts: list[Any]) -> float:
        library, count = index.snapshot.library, index._asked(k)
        taken = seconds(lambda: [index._find(library, part_BD, count, index.effort) for part_BD in parts])
        return 1000 * taken / sum(len(part_BD) for part_BD in parts)

    for _ in range(ROUNDS):
        for name, index in indexes.items():
            lines[name]["single_ms"].append(searches(index, singles))
            lines[name]["batch_ms"].append(searches(index, batches))
            if name not in OURS:
                lines[name]["alone_single_ms"].append(alone(index, singles))
                lines[name]["alone_batch_ms"].append(alone(index, batches))
    for line in lines.values():
        for key in [key for key in line if key.endswith("_ms")]:
            line[key] = statistics.median(line[key])
    return list(lines.values())


def comparisons(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`auto` against the fastest of the others, and against ScaNN's own search."""
    compared = []
    for kind in dict.fromkeys((line["set"], line["items"]) for line in lines):
        of = {line["index"]: line for line in lines if (line["set"], line["items"]) == kind}
        for how in ("single_ms", "batch_ms"):
            fastest = min((name for name in of if name != "auto"), key=lambda name: of[name][how])
            compared.append(
                {
                    "set": kind[0],
                    "items": kind[1],
                    "queries": how.removesuffix("_ms"),
                    "auto_ms": of["auto"][how],
                    "fastest": fastest,
                    "auto_over_fastest": of["auto"][how] / of[fastest][how],
                    "auto_over_scann_alone": of["auto"][how] / of["scann"][f"alone_{how}"] if "scann" in of else None,
                    "ivf_over_scann_alone": of["ivf"][how] / of["scann"][f"alone_{how}"]
                    if "scann" in of and "ivf" in of
                    else None,
                }
            )
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--graph-items", type=int, default=100_000)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    for names, items in ((PLAIN, args.items), (GRAPHS, args.graph_items)):
        for kind in ("unit", "raw"):
            lines += measured(names, kind, vectors(items, unit=kind == "unit"))
            columns = ["set", "items", "index", "build_s", "bytes", "effort", "recall", "single_ms", "batch_ms"]
            table(lines, [*columns, "alone_single_ms", "alone_batch_ms"])
            table(comparisons(lines), list(comparisons(lines)[0]))
            setting = {"threads": 1, "width": WIDTH, "centres": CENTRES, "k": K, "recall_asked_for": 0.95}
            write("retrieval_dot_products", {**setting, "result": lines, "compared": comparisons(lines)})


if __name__ == "__main__":
    main()
