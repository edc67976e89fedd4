"""What a leak looks like: a teacher that has learnt the days that it embeds, and a history that holds the event itself.

    python -m benchmarks.transfer.leak

The planted task `cross-domain`. Leaky: the teacher learns all 30 days, and the student's sequences, in training and in
the offline test, hold the current event's embedding. The same student is then served as of each event. Point-in-time:
the teacher learns 12 days, the student the next 12 with sequences of what was known before; both are tested on the last
6, and then with codes that are not rounded. The log refuses the leaky one as long as it is told the truth of the
cut-off and the times.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import torch

from benchmarks.machine import table, write
from fullrank.batch import Batch
from fullrank.data.planted import planted_dataset
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.metrics import auc, normalized_entropy
from fullrank.models import RankerSpec
from fullrank.training import Trainer, TrainerConfig
from fullrank.training.learner import batches_of
from fullrank.transfer.codec import MatryoshkaCodec
from fullrank.transfer.embedding_log import EmbeddingLog
from fullrank.transfer.histories import AGE, CODES, history_columns
from fullrank.transfer.lookup import SECOND
from fullrank.transfer.tap import EmbeddingTap

DIM, LENGTH = 16, 20
RANKER = {"name": "dcn_v2", "hidden": [64, 32], "num_cross_layers": 2, "embedding_dim": 8, "embedding_init": 0.1}
PRIVATE = [f"elsewhere_{k}" for k in range(4)]


def fitted(spec: dict[str, Any], schema: Any, batches: list[Batch], epochs: int) -> Any:
    torch.manual_seed(0)
    model = RankerSpec.of(spec).build(schema)
    config = TrainerConfig(epochs=epochs, batch_size=64, learning_rate=0.005)
    Trainer(config, EmbeddingOptimizer(learning_rate=0.02)).fit(model, batches)
    return model.eval()


def demonstrate(place: Path, seed: int, rows: int = 36_000, users: int = 400, epochs: int = 4) -> dict[str, Any]:
    """AUC and NE of the last fifth: of the leaky student offline and served, and of the other."""
    data = planted_dataset(place / "data", "cross-domain", rows, seed=seed, users=users)
    frame = pl.concat([data.scan(split).collect() for split in data.splits]).sort("__request_id")
    batches = list(batches_of(frame, data.schema, 64))
    begin, end = int(0.4 * rows), int(0.8 * rows)
    event, user = frame["__request_id"].to_numpy(), frame["__user_id"].to_numpy()
    time = frame["__timestamp"].to_numpy() * SECOND
    found = {}
    for name, known in {"leaky": rows, "point-in-time": begin}.items():
        teacher = fitted(RANKER, data.schema, batches[: known // 64], epochs)
        tap = EmbeddingTap(teacher, ["parallel.layers.1"])
        e_nI = torch.cat([tap(batch).embeddings_BE for batch in batches])
        codec = MatryoshkaCodec(e_nI.shape[1], DIM).fit(e_nI[:begin], epochs=5)
        log = EmbeddingLog(place / name, DIM)
        # A lie, of the leaky one: it has learnt from all of them.
        embedded = slice(0, rows) if name == "leaky" else slice(begin, rows)
        cutoff = int(time[embedded][0])
        log.append(user[embedded], event[embedded], time[embedded], codec.encode(e_nI[embedded]), time[embedded],
                   name, cutoff)  # fmt: skip
        past = {"event_times": time, "exclude": event}
        current = {"event_times": time + 1, "exclude": None}
        used = current if name == "leaky" else past

        def rows_with(as_of: dict[str, Any], part: slice, log: EmbeddingLog = log, name: str = name) -> list[Batch]:
            times, exclude = as_of["event_times"][part], as_of["exclude"]
            own = None if exclude is None else exclude[part]
            sequence = log.lookup(user[part], times, LENGTH, exclude_event_ids=own, fm_version=name)
            with_history = frame[part].with_columns(history_columns(sequence, LENGTH))
            return list(batches_of(with_history, data.schema, 64, (CODES, AGE)))

        history = {"pooling": "sum", "dim": DIM, "length": LENGTH}
        spec = {"name": "student", "backbone": RANKER, "without": [*PRIVATE, "history"], "history": history}
        student = fitted(spec, data.schema, rows_with(used, slice(begin, end)), 2)
        test = slice(end, rows)
        found[f"{name}, offline"] = judged(student, rows_with(used, test))
        if name == "leaky":
            found[f"{name}, served"] = judged(student, rows_with(past, test))
        else:
            # What rounding alone costs: the same student reads the codes of the same codec in float32.
            codec.bits, whole = 32, EmbeddingLog(place / "float32", DIM, 32)
            whole.append(user[embedded], event[embedded], time[embedded], codec.encode(e_nI[embedded]),
                         time[embedded], name, cutoff)  # fmt: skip
            wide = RankerSpec.of({**spec, "history": {**history, "bits": 32}}).build(data.schema).eval()
            wide.load_state_dict(student.state_dict())
            found[f"{name}, codes in float32"] = judged(wide, rows_with(past, test, whole))
    return found


def judged(model: Any, batches: list[Batch]) -> dict[str, float]:
    with torch.inference_mode():
        z = torch.cat([model(batch).logits_BT[:, 0] for batch in batches])
    y = torch.cat([batch.labels_BT[:, 0] for batch in batches])
    return {"auc": float(auc(z, y)), "ne": float(normalized_entropy(z, y))}


def main() -> None:
    torch.set_num_threads(1)
    seeds = []
    for seed in range(3):
        with tempfile.TemporaryDirectory() as scratch:
            seeds.append(demonstrate(Path(scratch), seed))
    rows = [
        {"what": what, **{m: statistics.mean(found[what][m] for found in seeds) for m in ("auc", "ne")}}
        for what in seeds[0]
    ]
    table(rows, ["what", "auc", "ne"])
    write("transfer_leak", {"rows": rows, "seeds": seeds})


if __name__ == "__main__":
    main()
