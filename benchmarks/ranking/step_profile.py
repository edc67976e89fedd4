"""Forward and backward of each ranker: time, share of the measured matrix-product peak, torch.compile, top costs.

    python -m benchmarks.ranking.step_profile
    python -m benchmarks.ranking.step_profile --models wukong dhen
    python -m benchmarks.ranking.step_profile --models wukong --eager

One batch of B=1024 rows, dim 16, 39 id fields of 1,000 rows each and a history of 50 events of the same table. The
optimiser's step is not in it. FLOPs are PyTorch's count of the matrix products of forward and backward; the peak is
the best of 1024³ float32 products with as many threads, measured in the same process. "Compiled" is `torch.compile`
of the whole model; its difference is the largest over the logits and all gradients, relative to each one's largest
number (or 1e-5 of the largest of all, where a gradient is zero but for rounding). Models that were not asked for keep
their rows in the result file, with the date of their measurement.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.machine import RESULTS, table, write

ROWS, WIDTH, FIELDS, TABLE_ROWS, EVENTS = 1024, 16, 39, 1000, 50
# label -> model and what to change of its defaults; every model of `fullrank models` that is not here runs as it is.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "wukong attentive": ("wukong", {"attentive": True}),
    "dhen all modules": (
        "dhen",
        {"layers": [["dlrm", "attention", "convolution", "linear", "dcn"]] * 3, "options": {"dcn": {"rank": 16}}},
    ),
}
RESULT = "step_profile"


def example() -> tuple[Any, Any]:
    """The schema and a batch of random ids; histories have between 0 and 50 events."""
    import torch

    from fullrank.batch import Batch
    from fullrank.schema import Categorical, EventId, Label, Schema, Sequence

    schema = Schema(
        features=(
            *(Categorical(name=f"field{i}", num_embeddings=TABLE_ROWS) for i in range(FIELDS)),
            Sequence(
                name="history",
                max_length=EVENTS,
                fields=(EventId(name="id", table="field0", num_embeddings=TABLE_ROWS),),
            ),
        ),
        labels=(Label(name="click"),),
    )
    lengths_1B = torch.randint(0, EVENTS + 1, (1, ROWS))
    batch = Batch(
        numeric_BN=torch.zeros(ROWS, 0),
        ids_BF=torch.randint(0, TABLE_ROWS, (ROWS, FIELDS)),
        jagged_keys=schema.jagged_keys,
        jagged_values=torch.randint(0, TABLE_ROWS, (int(lengths_1B.sum()),)),
        jagged_lengths_KB=lengths_1B,
        event_keys=(),
        event_values=torch.zeros(0),
        event_lengths_EB=torch.zeros(0, ROWS, dtype=torch.int64),
        labels_BT=(torch.rand(ROWS, 1) < 0.2).float(),
    )
    return schema, batch


def median_ms(work: Callable[[], object], seconds: float) -> float:
    """Median time of a call, over at least 5 calls and as many as fit into `seconds`, after 3 that do not count."""
    for _ in range(3):
        work()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def peak_gflops() -> float:
    """Best of repeated 1024³ float32 products, in GFLOP/s."""
    import torch

    size, best = 1024, float("inf")
    a, b = torch.randn(size, size), torch.randn(size, size)
    for _ in range(50):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9


def top_costs(step: Callable[[], object]) -> list[list[Any]]:
    """The operations with the most time of their own: name, share of the step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            step()
    events = sorted(profiled.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    return [[event.key, round(event.self_cpu_time_total / total, 3)] for event in events[:6]]


def measure(label: str, *, compiled: bool, seconds: float) -> dict[str, Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from fullrank.models import RankerSpec
    from fullrank.models.base import RankerOutput

    torch.manual_seed(0)
    schema, batch = example()
    name, changes = CONFIGS.get(label, (label, {}))
    model = RankerSpec.of({"name": name, "embedding_dim": WIDTH, **changes}).build(schema).train()
    # A start at zero output weights would leave most gradients zero.
    for parameter in model.parameters():
        if parameter.dim() > 1 and not bool(parameter.any()):
            torch.nn.init.xavier_normal_(parameter)

    def step(forward: Callable[[Any], RankerOutput] = model) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        output = forward(batch)
        model.loss(output, batch).backward()
        return output.logits_BT.detach()

    def results(forward: Callable[[Any], RankerOutput]) -> list[torch.Tensor]:
        torch.manual_seed(1)
        logits_BT = step(forward)
        return [logits_BT, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    flops = counter.get_total_flops()
    milliseconds = median_ms(step, seconds)
    peak = peak_gflops()
    row: dict[str, Any] = {
        "model": label,
        "changes": changes,
        "dense_parameters": model.num_parameters().dense,
        "forward_flops_per_row": model.train().flops_per_example(),
        "step_flops": flops,
        "ms": milliseconds,
        "rows_per_second": ROWS / milliseconds * 1e3,
        "gflops": flops / milliseconds / 1e6,
        "peak_gflops": peak,
        "share_of_peak": flops / milliseconds / 1e6 / peak,
        "top_costs": top_costs(step),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }
    if compiled:
        before = results(model)
        begin = time.perf_counter()
        fast: Any = torch.compile(model)
        after = results(fast)
        row["compile_seconds"] = time.perf_counter() - begin
        # Some gradients are zero but for rounding: a bias in front of a softmax.
        least = 1e-5 * max(float(a.abs().max()) for a in before)
        row["compiled_difference"] = max(
            float((a - b).abs().max() / a.abs().max().clamp_min(least)) for a, b in zip(before, after, strict=True)
        )
        row["compiled_ms"] = median_ms(lambda: step(fast), seconds)
        row["compiled_gain"] = milliseconds / row["compiled_ms"]
    return row


def main() -> None:
    from fullrank.models import RANKERS

    labels = list(dict.fromkeys([*RANKERS, *CONFIGS]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=labels, choices=labels)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per variant")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    file = RESULTS / f"{RESULT}.json"
    kept = {row["model"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}
    for label in args.models:
        kept[label] = measure(label, compiled=not args.eager, seconds=args.seconds)
        torch.compiler.reset()
        print(json.dumps(kept[label]), flush=True)
        rows = [kept[label] for label in labels if label in kept]
        write(RESULT, {"settings": {"rows": ROWS, "width": WIDTH, "fields": FIELDS, "events": EVENTS}, "rows": rows})
    table(rows, ["model", "dense_parameters", "forward_flops_per_row", "ms", "rows_per_second", "gflops",
                 "share_of_peak", "compiled_ms", "compiled_gain", "compiled_difference"])  # fmt: skip


if __name__ == "__main__":
    main()
