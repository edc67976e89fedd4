"""Tables in fewer bits after training: size, error, speed of search and lookups, and what a trained ranker loses.

    python -m benchmarks.tables --data DIR --out tables --tables ml1m_ctr
    python -m benchmarks.embeddings.quantization --tables tables

Peers: PyTorch's `embedding_bag_4bit_prepack`, plain and with its greedy search; FBGEMM's fused row-wise operator, which
TorchRec's inference tables are made by. Errors are the norm of the difference over that of the weights. Times are CPU
seconds of one thread, the least of three runs. Trained tables are those of MovieLens-1M as binary CTR (users and items)
after one epoch: rankers with vectors of 16, three seeds, and DCN-V2 with a head of 64 for wider ones, one seed. Nothing
is chosen by test rows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor

from benchmarks.machine import table, write
from fullrank.compression import quantize_ranker, quantize_table
from fullrank.compression.quantization import Method
from fullrank.embeddings.packed import Packing
from fullrank.models import RankerSpec
from fullrank.schema import Categorical, Label, Schema
from fullrank.training.saving import save_model

RECIPES = Path(__file__).parents[2] / "recipes"
WIDTHS = (16, 32, 64, 128)
SEEDS = (0, 1, 2)
# Of a search in plain Python: rows that are timed, and then counted a million.
ROWS_IN_PYTHON = 20
# Opens a bundle, scores a batch, and says how many kilobytes the process holds, and held at most.
HOLD = """
import sys
from pathlib import Path
from fullrank.models.base import example_batch
from fullrank.training.saving import load_model
model = load_model(Path(sys.argv[1]))
model(example_batch(model.schema, 100))
lines = dict(line.split(":") for line in open("/proc/self/status"))
print(*(lines[name].split()[0] for name in ("VmRSS", "VmHWM")))
"""
# Looked up at once.
BAGS, LENGTH = 2048, 20
VARIANTS: dict[str, tuple[int, str]] = {
    "8 bits minmax": (8, "minmax"),
    "4 bits least_squares": (4, "least_squares"),
    "4 bits greedy": (4, "greedy"),
    "4 bits minmax": (4, "minmax"),
    "4 bits symmetric": (4, "symmetric"),
    "4 bits aciq": (4, "aciq"),
    "4 bits table": (4, "table"),
    "2 bits greedy": (2, "greedy"),
}


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return best


def error(weight_RD: Tensor, found_RD: Tensor) -> float:
    return float((found_RD - weight_RD).norm() / weight_RD.norm())


def sizes() -> list[dict[str, Any]]:
    """Bytes of a row as a share of float32; TorchRec's rows are multiples of 16 bytes unless told otherwise."""
    rows = []
    for width in (8, *WIDTHS, 72):
        ours = quantize_table(torch.randn(10, width)).nbytes // 10
        padded = -(-ours // 16) * 16
        rows.append({"width": width, "bytes": ours, "share": ours / (4 * width), "TorchRec default": padded})
    return sorted(rows, key=lambda row: row["width"])


def errors(name: str, weight_RD: Tensor) -> list[dict[str, Any]]:
    """Of each method, and of the peers."""
    rows, width = weight_RD.shape
    found = []
    for method in get_args(Method):
        quantized = quantize_table(weight_RD, 4, method)
        found.append({"method": method, "bytes": quantized.nbytes / rows, "error": quantized.normalized_l2(weight_RD)})
    more = quantize_table(weight_RD, 4, "least_squares", starts=64)
    found.append(
        {"method": "least_squares, 64 starts", "bytes": more.nbytes / rows, "error": more.normalized_l2(weight_RD)}
    )
    for label, packed in peers(weight_RD).items():
        found.append(
            {"method": label, "bytes": packed.nbytes / rows, "error": error(weight_RD, Packing(width).unpack(packed))}
        )
    return [{"table": name, "width": width, **row} for row in found]


def peers(weight_RD: Tensor) -> dict[str, Tensor]:
    prepack = torch.ops.quantized.embedding_bag_4bit_prepack
    found = {"PyTorch greedy": prepack(weight_RD, True, 200, 0.16)}
    try:
        import fbgemm_gpu  # noqa: F401

        found["FBGEMM row-wise"] = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(weight_RD, 4)
    except (ImportError, OSError):
        pass
    return found


def drawn(width: int, rows: int = 4000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width)
    normal = torch.randn(rows, width, generator=generator)
    chi = torch.randn(rows, width, 3, generator=generator).square().mean(2).sqrt()
    return {"normal": normal, "Student t, 3 degrees": torch.randn(rows, width, generator=generator) / chi}


def search_speed(rows: int = 1_000_000, width: int = 64) -> list[dict[str, Any]]:
    """CPU seconds for a million rows; of greedy also without Numba."""
    weight_RD = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    scale = 1_000_000 / rows
    found = [
        {"search": f"ours, {method}", "seconds": scale * seconds(lambda m=method: quantize_table(weight_RD, 4, m))}
        for method in ("minmax", "greedy", "least_squares")
    ]
    with mock.patch("fullrank.compression.greedy.compiled_sums", return_value=None):
        without = scale * seconds(lambda: quantize_table(weight_RD, 4, "greedy"))
    found.append({"search": "ours, greedy without Numba", "seconds": without})
    few_RD = weight_RD[:20_000]
    torch_greedy = seconds(lambda: torch.ops.quantized.embedding_bag_4bit_prepack(few_RD, True, 200, 0.16))
    found.append({"search": "PyTorch greedy", "seconds": 50 * torch_greedy})
    lines = weight_RD[:ROWS_IN_PYTHON].tolist()
    by_hand = seconds(lambda: [python_greedy(line) for line in lines], 1)
    found.append({"search": "Python, row by row", "seconds": by_hand * 1_000_000 / ROWS_IN_PYTHON})
    same = quantize_table(weight_RD).packed[:20_000].equal(peers(few_RD)["PyTorch greedy"])
    return [{**row, "rows": 1_000_000, "width": width, "bytes equal PyTorch's": same} for row in found]


def python_greedy(row: list[float], nbins: int = 200, ratio: float = 0.16) -> tuple[float, float]:
    """The search as one writes it down."""

    def loss(low: float, high: float) -> float:
        scale = (high - low) / 15 or 1.0
        return sum((x - low - scale * min(15, max(0, round((x - low) / scale)))) ** 2 for x in row)

    low, high = min(row), max(row)
    step, best, now = (high - low) / nbins, (low, high), loss(low, high)
    least = now
    while low + int(nbins * (1 - ratio)) * step < high:
        left, right = loss(low + step, high), loss(low, high - step)
        if now < left and now < right and now < least:
            least, best = now, (low, high)
        low, high, now = (low + step, high, left) if left < right else (low, high - step, right)
    return best


def lookup_speed() -> list[dict[str, Any]]:
    """Microseconds: rows one by one, and sums over bags, of a table that no cache holds."""
    found = []
    for width in (16, 64):
        for name, call in lookups(width).items():
            call()
            took = seconds(lambda call=call: [call() for _ in range(5)], 5) / 5
            found.append({"width": width, "lookup": name, "ids": BAGS * LENGTH, "microseconds": took * 1e6})
    return found


def lookups(width: int, rows: int = 1_000_000) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    weight_RD = torch.randn(rows, width, generator=generator)
    ids_N = torch.randint(0, rows, (BAGS * LENGTH,), generator=generator)
    offsets_B = torch.arange(0, len(ids_N), LENGTH)
    quantized = quantize_table(weight_RD, 4, "minmax")
    packing, packed = quantized.packing, quantized.packed
    unpack = torch.ops.quantized.embedding_bag_4bit_unpack
    return {
        "float32 rows": lambda: weight_RD.index_select(0, ids_N),
        "4-bit rows": lambda: packing.look_up(packed, ids_N),
        "4-bit rows, unpacked by PyTorch": lambda: unpack(packed.index_select(0, ids_N)),
        "float32 sums": lambda: torch.nn.functional.embedding_bag(ids_N, weight_RD, offsets_B, mode="sum"),
        "4-bit sums": lambda: packing.pool(packed, ids_N, offsets_B),
        **fbgemm_sums(quantized, ids_N, offsets_B, width),
    }


def fbgemm_sums(quantized: Any, ids_N: Tensor, offsets_B: Tensor, width: int) -> dict[str, Callable[[], object]]:
    """FBGEMM's table-batched kernel over the same bytes."""
    try:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
    except (ImportError, OSError):
        return {}
    rows, codes = len(quantized.packed), quantized.packing.code_bytes
    kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t", rows, width, SparseType.INT4, EmbeddingLocation.HOST)],
        device="cpu",
        row_alignment=1,
        output_dtype=SparseType.FP32,
    )
    kernel.initialize_weights()
    kernel.assign_embedding_weights(
        [(quantized.packed[:, :codes].contiguous(), quantized.packed[:, codes:].contiguous())]
    )
    ids, ends = ids_N.int(), torch.cat([offsets_B, torch.tensor([len(ids_N)])]).int()
    ours = quantized.packing.pool(quantized.packed, ids_N, offsets_B)
    torch.testing.assert_close(kernel(ids, ends), ours, rtol=1e-5, atol=1e-5)
    return {"4-bit sums, FBGEMM's table-batched kernel": lambda: kernel(ids, ends)}


def memory(rows: int = 1_000_000, width: int = 64) -> list[dict[str, Any]]:
    """Megabytes of a ranker with one such table: of its bundle, of the process that serves it, and of that process at
    most while it opens the bundle; the latter two above those of a ranker with ten rows."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        for name, count in {"ten rows": 10, "float32": rows, "4 bits": rows}.items():
            schema = Schema(features=(Categorical(name="item", num_embeddings=count),), labels=(Label(name="y"),))
            ranker = RankerSpec.of({"name": "dcn_v2", "embedding_dim": width, "hidden": [8]}).build(schema)
            ranker = quantize_ranker(ranker, 4, "minmax")[0] if name == "4 bits" else ranker
            bundle = Path(place) / name
            save_model(ranker, bundle)
            said = subprocess.run([sys.executable, "-c", HOLD, bundle], capture_output=True, text=True, check=True)
            held, peak = (int(number) / 1e3 for number in said.stdout.split())
            size = sum(file.stat().st_size for file in bundle.iterdir()) / 1e6
            found.append({"table": name, "bundle MB": size, "held MB": held, "peak MB": peak})
    nothing = found.pop(0)
    for row in found:
        row |= {name: row[name] - nothing[name] for name in ("held MB", "peak MB")}
    return found


def quality(dataset: Any) -> tuple[list[dict[str, Any]], dict[int, list[Tensor]]]:
    """NE on test rows by variant, relative to float32; and the user and item tables by width."""
    from fullrank.data.loader import Loader
    from fullrank.embeddings import EmbeddingOptimizer
    from fullrank.training import TrainerConfig, evaluate
    from fullrank.training.run import train_ranker

    found: list[dict[str, Any]] = []
    trained: dict[int, list[Tensor]] = {}
    for name in ("dcn_v2", "dlrm"):
        for seed in SEEDS:
            training = TrainerConfig(seed=seed, epochs=1, batch_size=4096)
            model, _ = train_ranker({"name": name, "hidden": [128, 64]}, dataset, training, EmbeddingOptimizer())

            def ne(model: Any) -> float:
                return evaluate(model, Loader(dataset, "test", 8192))["label"]["ne"]

            full = ne(model)
            found.append({"model": name, "seed": seed, "variant": "float32", "ne": full, "change": 0.0})
            for variant, (bits, method) in VARIANTS.items():
                smaller, parts = quantize_ranker(model, bits, method)
                share = sum(part.after for part in parts) / sum(part.before for part in parts)
                now = ne(smaller)
                found.append(
                    {
                        "model": name,
                        "seed": seed,
                        "variant": variant,
                        "ne": now,
                        "change": now / full - 1,
                        "share": share,
                    }
                )
            print(name, seed, full, flush=True)
            if name == "dcn_v2" and seed == 0:
                trained[16] = big_tables(model)
    for width in WIDTHS[1:]:
        training = TrainerConfig(seed=0, epochs=1, batch_size=4096)
        spec = {"name": "dcn_v2", "hidden": [64], "embedding_dim": width}
        trained[width] = big_tables(train_ranker(spec, dataset, training, EmbeddingOptimizer())[0])
        print("trained", width, flush=True)
    return found, trained


def big_tables(model: Any) -> list[Tensor]:
    state = model.state_dict()
    return [
        next(value for key, value in state.items() if key.endswith(f"tables.{name}.weight"))
        for name in ("user_id", "item_id")
    ]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, least and largest relative change of NE over the seeds, in per cent."""
    found = []
    for model in ("dcn_v2", "dlrm"):
        for variant in ("float32", *VARIANTS):
            of = [row for row in rows if (row["model"], row["variant"]) == (model, variant)]
            change = [100 * row["change"] for row in of]
            found.append(
                {
                    "model": model,
                    "variant": variant,
                    "share": of[0].get("share", 1.0),
                    "NE": sum(row["ne"] for row in of) / len(of),
                    "change %": sum(change) / len(change),
                    "least %": min(change),
                    "largest %": max(change),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, help="of benchmarks.tables; without it nothing is trained")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"sizes": sizes(), "search": search_speed(), "lookup": lookup_speed()}
    result |= {"memory": memory(), "errors": []}
    table(result["sizes"], ["width", "bytes", "share", "TorchRec default"])
    table(result["search"], ["search", "seconds", "rows", "width", "bytes equal PyTorch's"])
    table(result["lookup"], ["width", "lookup", "ids", "microseconds"])
    table(result["memory"], ["table", "bundle MB", "held MB", "peak MB"])
    for width in WIDTHS:
        for name, weight_RD in drawn(width).items():
            result["errors"] += errors(name, weight_RD)
    if args.tables is not None:
        from fullrank.data.importing import import_dataset

        with tempfile.TemporaryDirectory() as scratch:
            schema = Schema.read(RECIPES / "movielens-1m.schema.json")
            dataset = import_dataset("csv", args.tables / "ml1m_ctr", Path(scratch) / "dataset", schema=schema)
            runs, trained = quality(dataset)
        result |= {"quality": summary(runs), "runs": runs}
        for users, items in trained.values():
            result["errors"] += errors("trained users", users) + errors("trained items", items)
        table(result["quality"], ["model", "variant", "share", "NE", "change %", "least %", "largest %"])
    table(result["errors"], ["table", "width", "method", "bytes", "error"])
    write("embedding_quantization", result)


if __name__ == "__main__":
    main()
