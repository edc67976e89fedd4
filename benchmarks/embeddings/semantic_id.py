"""Semantic IDs against random hashing and a row for each item: entropy of head, torso, tail and new items.

    python -m benchmarks.embeddings.semantic_id [stream|latest|1m|quantizers] --data DIR

DIR has the folders movielens-latest-small and movielens-1m, with the tables of their releases as Parquet: ratings, and
movies or items. `stream` is planted (see `semantic_id_data`), `latest` MovieLens by time, `1m` MovieLens-1M with cold
items, each with codes fitted to the training rows' items; H rows are a third of the items. All arms of a seed have the
same rows, the same ranker (DCN-V2; DIN where there is a history) and one epoch. `quantizers` holds residual k-means
against FAISS on 100,000 vectors of 64 numbers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import table, write

DIM, BATCH, LEVELS = 16, 1024, 3
SEGMENTS = ("all", "head", "torso", "tail", "new")
SIZES = {"stream": 32, "latest": 32, "1m": 24}


def arms(codes: str, shuffled: str, rows: int) -> dict[str, tuple[str, Any]]:
    """Of each arm, which dataset it trains on and how its items' table is stored."""
    prefix = {"kind": "prefix", "codes": codes, "stored_rows": rows}
    return {
        "random hash, H rows": ("identity", {"kind": "random_hash", "stored_rows": rows}),
        "individual, I rows": ("identity", "full"),
        "individual + unknown, I rows": ("vocabulary", {"kind": "individual"}),
        "individual + unknown, H rows": ("frequent", {"kind": "individual"}),
        "content as numbers": ("content", None),
        "individual + content": ("both", {"kind": "individual"}),
        "flat": ("identity", {**prefix, "scheme": "flat"}),
        "per level": ("identity", {**prefix, "scheme": "per_level"}),
        "all bigrams": ("identity", {**prefix, "scheme": "all_bigrams"}),
        "prefix-1": ("identity", {**prefix, "n": 1}),
        "prefix-3": ("identity", prefix),
        "prefix-3, codes shuffled": ("identity", {**prefix, "codes": shuffled}),
    }


def vectors_of(log: Any) -> Any:
    """Content vectors of the items: of films from their genres, by n-grams that training items taught to weigh.

    With titles too, new items were worse on validation rows, cut from the training rows: the rare words of a title
    outweigh its genres, and say nothing of who likes the film.
    """
    import polars as pl

    from fullrank.embeddings.semantic_id import Content

    if not isinstance(log.content_ID, pl.DataFrame):
        return log.content_ID
    seen = log.frame.filter(pl.col("part") == "train")["item"].unique().sort()
    content = Content(text=("genres",)).fit(log.content_ID[seen])
    return content(log.content_ID).numpy()


def make_codes(vectors: Any, train_items: Any, size: int, place: Path, seed: int) -> tuple[str, str]:
    """Files of codes of all items and of their copies, fitted to the training rows' items, and of shuffled ones."""
    import numpy as np
    import polars as pl
    import torch

    from fullrank.embeddings.semantic_id import ItemCodes, RQKMeans

    quantizer = RQKMeans(LEVELS, size, seed=seed).fit(vectors[train_items])
    codes = quantizer.encode(vectors)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(codes)))
    numbers = pl.Series("item", range(2 * len(codes)))
    names = []
    for name, found in (("codes", codes), ("shuffled", codes[order])):
        ItemCodes.of(numbers, torch.cat([found, found]), quantizer).write(place / f"{name}.parquet")
        names.append(str(place / f"{name}.parquet"))
    return names[0], names[1]


def datasets(log: Any, vectors: Any, rows: int, place: Path) -> dict[str, Any]:
    """The log with items as numbers, as a vocabulary, as one of `rows` frequent ones, and with content as numbers."""
    import numpy as np
    import polars as pl

    from fullrank.data.dataset import Dataset
    from fullrank.data.splits import SplitSpec
    from fullrank.schema import Schema

    counts = log.frame.filter(pl.col("part") == "train")["item"].value_counts(sort=True)["count"]
    least = int(counts[min(rows, len(counts)) - 1]) if len(counts) > rows else 1
    # All of the stream's content; of a text's 128 numbers the 32 principal ones.
    centred = vectors - vectors.mean(0)
    dense = centred @ np.linalg.svd(centred, full_matrices=False)[2][:32].T
    names = [f"c{place}" for place in range(dense.shape[1])]
    wide = pl.from_numpy(dense.astype(np.float32), schema=names).with_columns(item=pl.int_range(len(vectors)))
    identity = {"encoding": "identity", "num_embeddings": 2 * log.items}
    found = {}
    for kind, item in (
        ("identity", identity),
        ("vocabulary", {}),
        ("frequent", {"min_count": least + 1}),
        ("content", None),
        ("both", {}),
    ):
        features: list[dict[str, Any]] = [{"kind": "categorical", "name": "user", "role": "user"}]
        if item is not None:
            features.append({"kind": "categorical", "name": "item", "role": "item", **item})
            if log.history:
                features.append({"kind": "sequence", "name": "history", "of": ["item"], "where": "click", "length": 20})
        frame = log.frame.with_columns(number=pl.col("item"))
        if kind in ("content", "both"):
            features += [{"kind": "numeric", "name": name, "encoding": "scalar"} for name in names]
            frame = frame.join(wide, on="item", how="left", maintain_order="left")
        if kind == "content" and log.history:
            continue
        keys = {"user_id": "user", "item_id": "item"} | ({"timestamp": "time"} if log.history else {})
        schema = Schema.model_validate({"features": features, "labels": [{"name": "click"}], "keys": keys})
        split = SplitSpec(kind="given", column="part")
        found[kind] = Dataset.from_frame(frame, schema, split=split, keep=["number"], path=place / kind)
    return found


def measure(log: Any, dataset: Any, kind: Any, impressions: Any, seed: int) -> dict[str, Any]:
    import torch

    from fullrank.data.loader import Loader
    from fullrank.embeddings.semantic_id import aar, segment_report
    from fullrank.training import TrainerConfig
    from fullrank.training.run import train_ranker

    tables = {} if kind is None else {"item": kind}
    name = "din" if log.history else "dcn_v2"
    spec = {"name": name, "hidden": [64, 32], "embedding_dim": DIM, "tables": tables}
    begin = time.process_time()
    config = TrainerConfig(batch_size=BATCH, learning_rate=2e-3, seed=seed)
    model, _ = train_ranker(spec, dataset, config)
    seconds = time.process_time() - begin
    model.eval()
    logits, labels, change = [], [], []
    single = [feature.name for feature in dataset.schema.categorical]
    encoded = dataset.schema.embedded().get("item")
    with torch.no_grad():
        for batch in Loader(dataset, "test", 8192):
            logits.append(model(batch).logits_BT[:, 0])
            labels.append(batch.labels_BT[:, 0])
            if encoded is not None and encoded.encoding == "identity":
                batch.ids_BF[:, single.index("item")] += log.items  # a copy: the same content under another id
                pair = [torch.sigmoid(part) for part in (logits[-1], model(batch).logits_BT[:, 0])]
                change.append(aar(*pair))
    items = torch.from_numpy(dataset.scan("test").collect()["number"].to_numpy().copy())
    report = segment_report(torch.cat(logits), torch.cat(labels), items, impressions)
    parameters = model.num_parameters().embedding
    return {
        **{segment: report[segment]["ne"] for segment in SEGMENTS},
        "aar": float(torch.cat(change).mean()) if change else None,
        "numbers": parameters,
        "seconds": seconds,
        "rows": {segment: report[segment]["rows"] for segment in SEGMENTS},
    }


def ranking(which: str, place_of_data: Path, seeds: list[int], only: list[str] | None) -> dict[str, Any]:
    import numpy as np
    import polars as pl
    import torch

    from benchmarks.embeddings import random_hash  # noqa: F401 (registers the kind)
    from benchmarks.embeddings import semantic_id_data as data

    runs: dict[str, list[dict[str, Any]]] = {}
    log: Any = None
    for seed in seeds:
        log = data.LOGS[which](seed, place_of_data)
        vectors = vectors_of(log)
        train = log.frame.filter(pl.col("part") == "train")["item"].to_numpy()
        impressions = torch.from_numpy(np.bincount(train, minlength=log.items))
        rows = log.items // 3
        with tempfile.TemporaryDirectory() as place:
            files = make_codes(vectors, np.unique(train), SIZES[which], Path(place), seed)
            made = datasets(log, vectors, rows, Path(place))
            for arm, (dataset, kind) in arms(*files, rows).items():
                if dataset not in made or (only and arm not in only):
                    continue
                found = measure(log, made[dataset], kind, impressions, seed)
                runs.setdefault(arm, []).append(found)
                print(seed, arm, {name: round(found[name], 4) for name in SEGMENTS}, flush=True)
    measured = (*SEGMENTS, "aar", "numbers", "seconds")
    summary = {arm: {name: mean_of([run[name] for run in of]) for name in measured} for arm, of in runs.items()}
    reference = runs.get("prefix-3", [])
    differences = {
        arm: {name: paired([run[name] for run in of], [run[name] for run in reference]) for name in SEGMENTS}
        for arm, of in runs.items()
        if reference and arm != "prefix-3"
    }
    lines = [{"arm": arm, **values} for arm, values in summary.items()]
    table(lines, ["arm", *measured])
    return {
        "items": log.items,
        "rows": log.items // 3,
        "codebook_size": SIZES[which],
        "test_rows": next(iter(runs.values()))[0]["rows"],
        "seeds": seeds,
        "mean": summary,
        "less_prefix_3": differences,
        "runs": runs,
    }


def mean_of(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def paired(values: list[float], reference: list[float]) -> dict[str, float]:
    """Mean of the differences and its standard error."""
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return {"mean": statistics.fmean(differences), "standard_error": error}


def ours(x: Any, seed: int) -> Any:
    from fullrank.embeddings.semantic_id import RQKMeans

    quantizer = RQKMeans(LEVELS, 256, seed=seed).fit(x)
    return lambda: quantizer.decode(quantizer.encode(x)).numpy()


def faiss_k_means(x: Any, seed: int) -> Any:
    import faiss

    rest = x.numpy().copy()
    for _ in range(LEVELS):
        means = faiss.Kmeans(64, 256, niter=20, seed=seed + 1)
        means.train(rest)
        rest = rest - means.centroids[means.index.search(rest, 1)[1][:, 0]]
    return lambda: x.numpy() - rest


def faiss_residual(beam: int) -> Any:
    def fit(x: Any, seed: int) -> Any:
        import faiss

        quantizer = faiss.ResidualQuantizer(64, LEVELS, 8)
        quantizer.max_beam_size = beam
        quantizer.train(x.numpy())
        return lambda: quantizer.decode(quantizer.compute_codes(x.numpy()))

    return fit


QUANTIZERS = {
    "RQKMeans": ours,
    "FAISS k-means of residuals": faiss_k_means,
    "FAISS ResidualQuantizer, beam 1": faiss_residual(1),
    "FAISS ResidualQuantizer, beam 5": faiss_residual(5),
}


def quantizers(seeds: list[int]) -> list[dict[str, Any]]:
    """‖X - X̂‖² / ‖X - mean‖² and CPU seconds of fitting, three levels of 256 codes; mean of the seeds."""
    import faiss
    import numpy as np
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    errors: dict[str, list[float]] = {name: [] for name in QUANTIZERS}
    seconds: dict[str, list[float]] = {name: [] for name in QUANTIZERS}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        scale = torch.arange(1, 65).float() ** -0.5
        centres = torch.randn(20_000, 64, generator=generator) * scale
        x = centres[torch.randint(0, 20_000, (100_000,), generator=generator)]
        x = x + 0.5 * torch.randn(100_000, 64, generator=generator) * scale
        spread = float((x - x.mean(0)).square().sum())
        for name, fit in QUANTIZERS.items():
            begin = time.process_time()
            reached = fit(x, seed)
            seconds[name].append(time.process_time() - begin)
            errors[name].append(float(np.square(x.numpy() - reached()).sum()) / spread)
    found = [
        {
            "quantizer": name,
            "rel_mse": statistics.fmean(errors[name]),
            "fit_seconds": statistics.fmean(seconds[name]),
            "rel_mse_by_seed": errors[name],
            "fit_seconds_by_seed": seconds[name],
        }
        for name in QUANTIZERS
    ]
    table(found, ["quantizer", "rel_mse", "fit_seconds"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["stream", "latest", "1m", "quantizers"])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", help="arms to run")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    for what in args.what:
        print(what)
        found = quantizers(args.seeds) if what == "quantizers" else ranking(what, args.data, args.seeds, args.only)
        if args.only is None:
            write(f"semantic_id_{what}", {"threads": args.threads, "result": found})


if __name__ == "__main__":
    main()
