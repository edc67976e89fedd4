"""What an early stage keeps of the final stage's best: tasks, distillation on candidates, losses of the value.

    python -m benchmarks.funnel.early_stage [--long] [--seeds 0 1 2 3 4]
    python -m benchmarks.funnel.early_stage --movielens DIR_OF_movielens-1m [--seeds 0 1 2]

Planted (task `cascade`): 500 users, 200 ads, value = bid · P(click) - 3 P(hide), baiting ads raise both, 30 impressions
of each user by a noisy policy that likes value. Ids are the only features. The final stage stands for one that knows
the true probabilities: what is measured is what of it gets into an early stage of 16-dimensional vectors that has seen
27 impressions of each user. All 200 ads are candidates of every user.

MovieLens-1M: two labels of a rating, like (4-5) and dislike (1-2), value = P(like) - 2 P(dislike). The final stage is a
DCN-V2 that has learnt from the ratings, the early one has half its embedding dimension and no crosses; all films are
candidates. Folds 1-4 train, of fold 5 even users validate. Of the real sets here it is the one with several labels,
users, items and enough rows: iPinYou's sample has 442 clicks, the census tables no items.

Settings were chosen on seed 100 of the planted task, the learning rate after a first run of the others at twice of it,
and once for MovieLens. With --long the planted task is trained out: twice the epochs and twice the learning rate, where
seed 100 no longer improves; a short budget says what a loss buys early, the long one what a model can hold.

Recall k/n: share of the best k by the final value among the best n by the early one, k = 10.
CPU seconds are of the process. Lists for the pair-wise loss are of 64 candidates, since its cost goes by their square.
With --keep a long measurement can be cut into parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from benchmarks.machine import RESULTS, table, write
from fullrank.batch import Batch
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.planted import Cascade
from fullrank.data.splits import PARTS
from fullrank.funnel import DistillConfig, Distilled, Funnel, StageSizes
from fullrank.funnel.catalogue import Catalogue, all_rows, usual_context, with_market
from fullrank.funnel.distillation import MixedBatches, candidate_lists
from fullrank.funnel.stages import FINAL
from fullrank.metrics import ads_recall, kendall_tau, pair_consistency, value_recall
from fullrank.models import Ranker, RankerSpec
from fullrank.models.base import RankerOutput
from fullrank.retrieval import Popularity
from fullrank.schema import Categorical, Keys, Label, MultiCategorical, Schema
from fullrank.training import TrainerConfig
from fullrank.training.run import fit_ranker, train_ranker

K = 10
Frames = Callable[[str], Iterable[pl.DataFrame]]


@dataclass(frozen=True)
class Setting:
    """One log, with all of its labels or some, and what stands above the early stage.

    Attributes:
        single, all_tasks: value formulas of the first label alone and of all labels.
        early: settings of the early-stage ranker.
        distill: of the arms that are distilled; `rank` is theirs.
    """

    schema: Schema
    frames: Frames
    scratch: Path
    single: str
    all_tasks: str
    early: dict[str, Any]
    training: TrainerConfig
    distill: DistillConfig
    seed: int

    def dataset(self, labels: tuple[str, ...]) -> Dataset:
        place = self.scratch / "-".join(labels)
        if place.exists():
            return Dataset.open(place)
        absent = [label.name for label in self.schema.labels if label.name not in labels]
        schema = self.schema.model_copy(
            update={"labels": tuple(label for label in self.schema.labels if label.name in labels)}
        )
        parts = {
            part: (
                frame.drop(*absent, *[f"__true_{name}" for name in absent], strict=False) for frame in self.frames(part)
            )
            for part in PARTS
        }
        return write_dataset(place, schema, parts)

    def funnel(self, labels: tuple[str, ...], final: Ranker, value: str, early: Ranker | None = None) -> Funnel:
        dataset = self.dataset(labels)
        items = Catalogue.of(with_market(all_rows(dataset, "item"), dataset, None), dataset.schema)
        funnel = Funnel(
            encoders=dataset.encoders,
            items=items,
            users=Catalogue.of(all_rows(dataset, "user"), dataset.schema),
            context=usual_context(dataset),
            retriever=Popularity(dataset.schema).fit(dataset),
            early={} if early is None else early,
            final=final,
            value=value,
            sizes=StageSizes(retrieve=len(items), keep=K),
        )
        funnel.index_active()
        return funnel

    def fitted(
        self, labels: tuple[str, ...], final: Ranker, value: str, rank: str | None = "", **changes: Any
    ) -> tuple[Ranker, float]:
        """An early stage and the CPU seconds that it took; with `rank` "" it learns from impressions alone."""
        dataset, began = self.dataset(labels), time.process_time()
        spec = RankerSpec.of({"name": "early_stage", **self.early})
        torch.manual_seed(self.seed)
        if rank == "":
            model = spec.build(dataset.schema)
            fit_ranker(model, dataset, self.training)
            return model, time.process_time() - began
        distill = self.distill.model_copy(update={"rank": rank, **changes})
        lists = candidate_lists(self.funnel(labels, final, value), dataset, distill, seed=self.seed)
        learner = Distilled(dataset.schema, Distilled.Config(student=spec, distill=distill, value=value))
        fit_ranker(
            learner,
            dataset,
            self.training,
            batches=lambda impressions: MixedBatches(impressions, lists, distill.lists_per_batch),
            validate=False,
        )
        return learner.student, time.process_time() - began


def early_values(funnel: Funnel, users: Batch) -> Tensor:
    """Of every item of the catalogue for each user, float64 of shape (U, I)."""
    items_UC, values = funnel.stage_values(users)
    return torch.full((len(users), len(funnel.items)), -torch.inf, dtype=torch.float64).scatter(
        1, items_UC, values["early"].double()
    )


def agreement(final_UI: Tensor, early_UI: Tensor, longer: int) -> dict[str, float]:
    return {
        f"recall {K}/{longer}": ads_recall(final_UI, early_UI, K, longer),
        f"recall {K}/{K}": ads_recall(final_UI, early_UI, K, K),
        f"value {K}/{longer}": value_recall(final_UI, early_UI, K, longer),
        "kendall": kendall_tau(final_UI, early_UI),
        "consistency": pair_consistency(final_UI, early_UI),
    }


def arms(
    setting: Setting, finals: dict[tuple[str, ...], Ranker], final_UI: Tensor, users: list[int], longer: int
) -> tuple[dict[str, dict[str, float]], dict[str, Ranker]]:
    """What each way of learning keeps, and the models."""
    every = tuple(label.name for label in setting.schema.labels)
    first = every[:1]
    results: dict[str, dict[str, float]] = {}
    models: dict[str, Ranker] = {}
    rows = setting.distill.candidates * setting.distill.lists_per_batch
    for name, labels, rank in (
        (f"{first[0]} only", first, ""),
        ("all tasks, impressions only", every, ""),
        (f"{first[0]} only, distilled", first, None),
        ("all tasks, distilled", every, None),
        ("all tasks, distilled, list-wise", every, "listwise"),
        ("all tasks, distilled, pair-wise", every, "pairwise"),
    ):
        value = setting.single if labels == first else setting.all_tasks
        changes = {"candidates": 64, "lists_per_batch": rows // 64} if rank == "pairwise" else {}
        model, seconds = setting.fitted(labels, finals[labels], value, rank, **changes)
        funnel = setting.funnel(labels, finals[labels], value, model)
        assert funnel.users is not None
        early_UI = early_values(funnel, funnel.users.rows.take(torch.tensor(users)))
        results[name] = {**agreement(final_UI, early_UI, longer), "cpu_seconds": seconds}
        models[name] = model
        print(f"  seed {setting.seed} {name}: {results[name][f'recall {K}/{longer}']:.3f}", flush=True)
    return results, models


# Planted


class Oracle(Ranker):
    """The true probabilities of a planted task: a final stage that knows everything."""

    name = "oracle"
    source = "the planted task"

    def __init__(self, schema: Schema, task: Cascade) -> None:
        super().__init__(schema, Ranker.Config())
        names = [label.name for label in task.log_schema().labels]
        p_UIT = np.stack([task.probabilities_2UI[names.index(label.name)] for label in schema.labels], 2)
        self.register_buffer("logits_UIT", torch.logit(torch.from_numpy(p_UIT)).float())

    def forward(self, batch: Batch) -> RankerOutput:
        user_B, item_B = batch.ids_BF.unbind(1)
        return RankerOutput(self.get_buffer("logits_UIT")[user_B, item_B])


def planted(seed: int, scratch: Path, long: bool = False) -> dict[str, Any]:
    task = Cascade(seed=seed)
    setting = Setting(
        schema=task.log_schema(),
        frames=task.frames,
        scratch=scratch,
        single="bid * click",
        all_tasks="bid * click - 3 * hide",
        early={"interaction": "product", "output_dim": 16, "hidden": [], "embedding_dim": 18, "embedding_init": 0.1},
        training=TrainerConfig(
            batch_size=512,
            epochs=40 if long else 20,
            learning_rate=1e-2 if long else 5e-3,
            schedule="linear",
            patience=0,
            monitor="ne",
            seed=seed,
        ),
        distill=DistillConfig(requests=2000, candidates=200, lists_per_batch=32, hard=0.1),
        seed=seed,
    )
    every = ("click", "hide")
    finals: dict[tuple[str, ...], Ranker] = {
        labels: Oracle(setting.dataset(labels).schema, task) for labels in (every, ("click",), ("hide",))
    }
    value_UI, bid_I = torch.from_numpy(task.value_UI), torch.from_numpy(task.bid_I)
    click_UI = torch.from_numpy(task.probabilities_2UI[0])
    users = list(range(task.users))
    results: dict[str, dict[str, float]] = {
        "random": agreement(value_UI, torch.rand(value_UI.shape, generator=torch.Generator().manual_seed(seed)), 20),
        "true bid · click": agreement(value_UI, bid_I * click_UI, 20),
    }
    found, models = arms(setting, finals, value_UI, users, 20)
    results |= found
    # One model of both tasks, and one model of each.
    separate, p_UI = {}, {}
    seconds = 0.0
    for label in every:
        separate[label], spent = setting.fitted((label,), finals[label,], label, None)
        funnel = setting.funnel((label,), finals[label,], label, separate[label])
        assert funnel.users is not None
        p_UI[label] = early_values(funnel, funnel.users.rows.batch)
        seconds += spent
    apart = agreement(value_UI, bid_I * p_UI["click"] - 3 * p_UI["hide"], 20)
    results["one model of each task, distilled"] = {**apart, "cpu_seconds": seconds}
    one = models["all tasks, distilled"]
    both = list(separate.values())
    return {
        "seed": seed,
        "arms": results,
        "consolidation": {
            "parameters": one.num_parameters().total / sum(model.num_parameters().total for model in both),
            "latency": latency(setting, every, [one]) / latency(setting, every, both),
            "recall": results["all tasks, distilled"]["recall 10/20"] - apart["recall 10/20"],
        },
    }


def latency(setting: Setting, labels: tuple[str, ...], models: list[Ranker], candidates: int = 1000) -> float:
    """CPU seconds in which rankers score the candidates of one request: the median of 20 blocks of 20 requests."""
    prepared = []
    for model in models:
        own = tuple(label.name for label in model.schema.labels)
        dataset = setting.dataset(own)
        users = Catalogue.of(all_rows(dataset, "user"), dataset.schema).rows.batch
        items = Catalogue.of(all_rows(dataset, "item"), dataset.schema).rows.batch
        with torch.inference_mode():
            vectors_IV = model.item_vectors(items)  # type: ignore[operator]
        prepared.append((model, users, vectors_IV[torch.arange(candidates) % len(items)][None]))
    blocks = []
    with torch.inference_mode():
        for _ in range(20):
            began = time.process_time()
            for row in range(20):
                for model, users, items_1PV in prepared:
                    torch.sigmoid(model.score(users[row : row + 1], items_1PV))  # type: ignore[operator]
            blocks.append((time.process_time() - began) / 20)
    return statistics.median(blocks)


# MovieLens


def movielens(source: Path, seed: int, scratch: Path) -> dict[str, Any]:
    users = pl.read_parquet(source / "users.parquet").select("user_id", "gender", "age", "occupation")
    items = pl.read_parquet(source / "items.parquet").select(
        "item_id", pl.col("title").str.extract(r"\((\d{4})\)\s*$").fill_null("").alias("year"), "genres"
    )
    rows = pl.read_parquet(source / "ratings.parquet").join(users, on="user_id").join(items, on="item_id")
    rows = rows.select(
        "fold", "user_id", pl.col("gender"), pl.col("age", "occupation").cast(pl.String), "item_id", "year", "genres",
        (pl.col("rating") >= 4).cast(pl.Int8).alias("like"), (pl.col("rating") <= 2).cast(pl.Int8).alias("dislike"),
    )  # fmt: skip
    held_out, even = pl.col("fold") == 5, pl.col("user_id") % 2 == 0
    parts = {"train": ~held_out, "valid": held_out & even, "test": held_out & ~even}

    def frames(part: str) -> Iterable[pl.DataFrame]:
        yield rows.filter(parts[part]).drop("fold").with_columns(pl.col("genres").str.split("|"))

    schema = Schema(
        features=(
            *(Categorical(name=name, role="user") for name in ("user_id", "gender", "age", "occupation")),
            *(Categorical(name=name, role="item") for name in ("item_id", "year")),
            MultiCategorical(name="genres", role="item", max_length=6),
        ),
        labels=(Label(name="like"), Label(name="dislike")),
        keys=Keys(user_id="user_id", item_id="item_id"),
    )
    training = TrainerConfig(batch_size=2048, epochs=2, learning_rate=2e-3, patience=0, monitor="ne", seed=seed)
    setting = Setting(
        schema=schema,
        frames=frames,
        scratch=scratch,
        single="like",
        all_tasks="like - 2 * dislike",
        early={"embedding_dim": 8, "output_dim": 16, "hidden": [32], "interaction": "product"},
        training=training,
        distill=DistillConfig(requests=6000, candidates=128),
        seed=seed,
    )
    every = ("like", "dislike")
    final, trained = train_ranker(
        {"name": "dcn_v2", "embedding_dim": 16, "hidden": [256, 128]}, setting.dataset(every), training
    )
    first = RankerSpec.of({"name": "dcn_v2", "embedding_dim": 16, "hidden": [256, 128]})
    torch.manual_seed(seed)
    alone = first.build(setting.dataset(("like",)).schema)
    fit_ranker(alone, setting.dataset(("like",)), training)
    teacher = setting.funnel(every, final, setting.all_tasks)
    assert teacher.users is not None
    chosen = torch.randperm(len(teacher.users), generator=torch.Generator().manual_seed(seed))[:500].sort().values
    everything_UI = torch.arange(len(teacher.items)).expand(len(chosen), -1)
    final_UI = teacher.values_of(FINAL, teacher.users.rows.take(chosen), everything_UI).double()
    results, models = arms(setting, {every: final, ("like",): alone}, final_UI, chosen.tolist(), 100)
    return {
        "seed": seed,
        "arms": results,
        "final": {"auc": trained.best["auc"], "parameters": final.num_parameters().total},
        "early": {"parameters": models["all tasks, distilled"].num_parameters().total},
        "items": len(teacher.items),
    }


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error of each arm over the seeds."""
    rows = []
    for arm in runs[0]["arms"]:
        row: dict[str, Any] = {"arm": arm}
        for name in runs[0]["arms"][arm]:
            values = [run["arms"][arm][name] for run in runs]
            row[name] = statistics.mean(values)
            if name.startswith("recall") and len(values) > 1:
                row[f"{name} error"] = statistics.stdev(values) / len(values) ** 0.5
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--movielens", type=Path, help="folder with ratings, users and items as Parquet")
    parser.add_argument("--long", action="store_true", help="train the planted task out")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--keep", action="store_true", help="keep the runs of other seeds in the result")
    args = parser.parse_args()
    name = "early_stage_movielens" if args.movielens else "early_stage_long" if args.long else "early_stage"
    for seed in args.seeds or ([0, 1, 2] if args.movielens else [0, 1, 2, 3, 4]):
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            run = movielens(args.movielens, seed, scratch) if args.movielens else planted(seed, scratch, args.long)
        path = RESULTS / f"{name}.json"
        others = json.loads(path.read_text())["runs"] if args.keep and path.exists() else []
        runs = sorted([*(other for other in others if other["seed"] != seed), run], key=lambda each: each["seed"])
        args.keep = True
        write(name, concluded(runs, 100 if args.movielens else 20))


def concluded(runs: list[dict[str, Any]], longer: int) -> dict[str, Any]:
    """What a result file says of its runs."""
    rows = summary(runs)
    table(rows, ["arm", f"recall {K}/{longer}", f"recall {K}/{longer} error", f"recall {K}/{K}", f"value {K}/{longer}",
                 "kendall", "consistency", "cpu_seconds"])  # fmt: skip
    result: dict[str, Any] = {"summary": rows, "runs": runs}
    if "consolidation" not in runs[0]:
        return result
    shares = ("parameters", "latency", "recall")
    together = {name: statistics.mean(run["consolidation"][name] for run in runs) for name in shares}
    by_arm = {row["arm"]: row for row in rows}
    soft = "all tasks, distilled"
    pairs = {
        "tasks": (soft, "click only, distilled"),
        "list_wise": (f"{soft}, list-wise", soft),
        "pair_wise": (f"{soft}, pair-wise", soft),
    }
    gains = {
        recall: {name: by_arm[arm][recall] - by_arm[than][recall] for name, (arm, than) in pairs.items()}
        for recall in (f"recall {K}/{longer}", f"recall {K}/{K}")
    }
    goals = {
        "tasks": {recall: gain["tasks"] >= 0.03 for recall, gain in gains.items()},
        "list_wise": {recall: gain["list_wise"] >= 0.1 for recall, gain in gains.items()},
        "consolidation": together["parameters"] <= 0.6 and together["latency"] <= 0.6 and together["recall"] >= -0.01,
    }
    print(gains, together, goals)
    return {"gains": gains, "consolidation": together, "goals": goals, **result}


if __name__ == "__main__":
    main()
