"""Training steps on large tables: our collection against `nn.Embedding` with PyTorch's own optimisers.

    python -m benchmarks.embedding_backends

A step is DeepFM on single-id fields (dim 16, hidden 256-128-64, batch 4096): forward, backward, update. The dense rows
(`nn.Embedding`, Adam over all parameters) are what FuxiCTR and RecBole do with their tables; the sparse row is
PyTorch's best answer without fused kernels. Ids follow a power law. The median step is reported.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import table, write
from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer
from fullrank.layers.factorization import pairwise_term
from fullrank.layers.mlp import MLP
from fullrank.models import RankerSpec
from fullrank.schema import Categorical, Label, Schema

CASES = {"26 tables of 100k rows": (26, 100_000), "8 tables, one of 10M rows": (8, 10_000_000)}


def sizes(fields: int, rows: int) -> list[int]:
    return [rows] * fields if rows <= 1_000_000 else [rows] + [1_000] * (fields - 1)


def make_ids(rows: list[int], batch: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(steps, batch, len(rows), generator=generator) ** 3
    return list((draws * torch.tensor(rows)).long())


class PlainDeepFM(nn.Module):
    """The usual way: one `nn.Embedding` for each field and term."""

    def __init__(self, rows: list[int], sparse: bool) -> None:
        super().__init__()
        self.vectors = nn.ModuleList(nn.Embedding(n, 16, sparse=sparse) for n in rows)
        self.weights = nn.ModuleList(nn.Embedding(n, 1, sparse=sparse) for n in rows)
        for embedding in (*self.vectors, *self.weights):
            nn.init.normal_(embedding.weight, std=1e-4)
        self.mlp = MLP(16 * len(rows), (256, 128, 64), 1)

    def forward(self, ids_BF: Tensor) -> Tensor:
        tokens = torch.stack([e(ids_BF[:, i]) for i, e in enumerate(self.vectors)], 1)
        first = torch.cat([e(ids_BF[:, i]) for i, e in enumerate(self.weights)], 1).sum(1)
        return first + pairwise_term(tokens) + self.mlp(tokens.flatten(1)).squeeze(1)


def plain(rows: list[int], sparse: bool) -> Callable[[Tensor, Tensor], None]:
    torch.manual_seed(0)
    model = PlainDeepFM(rows, sparse)
    tables = [p for m in (*model.vectors, *model.weights) for p in m.parameters()]
    if sparse:
        optimizers: list[Any] = [torch.optim.SparseAdam(tables), torch.optim.Adam(model.mlp.parameters())]
    else:
        optimizers = [torch.optim.Adam(model.parameters())]

    def step(ids_BF: Tensor, labels_B: Tensor) -> None:
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids_BF), labels_B)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def ours(rows: list[int], kind: str, backend: str, precision: str) -> Callable[[Tensor, Tensor], None]:
    torch.manual_seed(0)
    schema = Schema(
        features=tuple(Categorical(name=f"f{i}", num_embeddings=n) for i, n in enumerate(rows)),
        labels=(Label(name="click"),),
    )
    model = RankerSpec.of("deepfm").build(schema).train()
    for module in model.modules():
        if isinstance(module, EmbeddingCollection):
            for buffer in module._row_buffers():
                buffer.backend = backend if buffer.weight_RD.shape[1] % 4 == 0 else "torch"
            module.set_optimizer(EmbeddingOptimizer.model_validate({"kind": kind}))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)
    empty = torch.zeros(0)

    def step(ids_BF: Tensor, labels_B: Tensor) -> None:
        n = len(ids_BF)
        none = torch.zeros(0, n, dtype=torch.int64)
        batch = Batch(torch.zeros(n, 0), ids_BF, (), empty.long(), none, (), empty, none, labels_B[:, None])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = model(batch)
        model.loss(output, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


PROGRAMS: dict[str, Callable[[list[int]], Callable[[Tensor, Tensor], None]]] = {
    "fullrank row_wise_adagrad, fbgemm, bf16": lambda rows: ours(rows, "row_wise_adagrad", "fbgemm", "bfloat16"),
    "fullrank row_wise_adagrad, fbgemm": lambda rows: ours(rows, "row_wise_adagrad", "fbgemm", "float32"),
    "fullrank row_wise_adagrad, torch, bf16": lambda rows: ours(rows, "row_wise_adagrad", "torch", "bfloat16"),
    "fullrank row_wise_adagrad, torch": lambda rows: ours(rows, "row_wise_adagrad", "torch", "float32"),
    "fullrank adam, torch": lambda rows: ours(rows, "adam", "torch", "float32"),
    "nn.Embedding, dense Adam": lambda rows: plain(rows, False),
    "nn.Embedding, SparseAdam": lambda rows: plain(rows, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for case, (fields, rows) in CASES.items():
        ids = make_ids(sizes(fields, rows), args.batch, args.steps + 2)
        labels = (torch.rand(args.batch, generator=torch.Generator().manual_seed(1)) < 0.3).float()
        for program, build in PROGRAMS.items():
            step = build(sizes(fields, rows))
            times = []
            for number, batch in enumerate(ids):
                begin = time.perf_counter()
                step(batch, labels)
                if number >= 2:
                    times.append(time.perf_counter() - begin)
            median = statistics.median(times)
            results.append({"case": case, "program": program, "step_ms": 1e3 * median,
                            "samples_per_s": args.batch / median})  # fmt: skip
            print(results[-1], flush=True)
            del step
            gc.collect()
    for row in results:
        dense = next(r for r in results if r["case"] == row["case"] and r["program"] == "nn.Embedding, dense Adam")
        row["speed_over_dense_adam"] = row["samples_per_s"] / dense["samples_per_s"]
    print()
    table(results, list(results[0]))
    write("embedding_backends", {"settings": vars(args), "results": results})


if __name__ == "__main__":
    main()
