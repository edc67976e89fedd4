"""A warm start on a log with new items: what the grown model says before a step, and what moves after one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset
from fullrank.data.encoders import Encoders
from fullrank.data.loader import Loader
from fullrank.data.splits import SplitSpec
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import RankerSpec
from fullrank.models.base import Ranker
from fullrank.schema import OUT_OF_VOCABULARY_ID, Schema
from fullrank.training import TrainerConfig, checkpoint, load_model, save_model
from fullrank.training.growing import grown, same_settings
from fullrank.training.learner import Fitted
from fullrank.training.run import run

KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "quotient_remainder": {"kind": "quotient_remainder", "collisions": 3},
    "mixed_dimension": {"kind": "mixed_dimension", "dims": [4, 2], "shares": [0.4]},
    "popularity": {"kind": "mixed_dimension", "temperature": 0.5, "num_blocks": 2},
    "prefix": {"kind": "prefix", "levels": 2, "codebook_size": 4},
}
ALL = SplitSpec(kind="none")


def log(day: int) -> pl.DataFrame:
    """Clicks; the second day has no item "i1" and four new ones."""
    items = [f"i{k % 12}" for k in range(400)] if day == 1 else [f"i{k % 14 + 2}" for k in range(400)]
    return pl.DataFrame(
        {
            "user": [f"u{k % 9}" for k in range(400)],
            "item": items,
            "click": [int(k * 7919 % 10 < 4) for k in range(400)],
            "time": [1_700_000_000 + 86_400 * day + 60 * k for k in range(400)],
        }
    )


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    place = tmp_path_factory.mktemp("days")
    schema = Schema.model_validate(
        {
            "features": [
                {"kind": "categorical", "name": "user", "role": "user"},
                {"kind": "categorical", "name": "item", "role": "item"},
                {"kind": "sequence", "name": "history", "of": ["item"], "length": 4},
            ],
            "labels": [{"name": "click"}],
            "keys": {"user_id": "user", "item_id": "item", "timestamp": "time"},
        }
    )
    first = Dataset.from_frame(log(1), schema, split=ALL, path=place / "1")
    return first, Dataset.from_frame(log(2), like=first.path, extend=True, split=ALL, path=place / "2")


def a_model(dataset: Dataset, kind: str, name: str = "din") -> Ranker:
    torch.manual_seed(0)
    tables = {"item": KINDS[kind]}
    config = {"embedding_dim": 4, "embedding_init": 0.5, "hidden": [8], "tables": tables}
    return RankerSpec.of({"name": name, **config}).fitted(dataset.encoders).build(dataset.schema).eval()


def logits(model: Ranker, dataset: Dataset) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).logits_BT for batch in Loader(dataset, "train", 128)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["din", "deepfm"])
def test_a_grown_model_says_what_it_said_before(name: str, kind: str, days: tuple[Dataset, Dataset]) -> None:
    first, second = days
    model = a_model(first, kind, name)
    larger = grown(model, second.schema)
    before = logits(model, second.as_known_to(first.encoders))
    assert torch.equal(logits(larger, second), before)
    assert torch.equal(logits(larger, first), logits(model, first))
    assert len(before.unique()) > 50
    assert same_settings(larger, RankerSpec(name=name, config=model.config))
    asked = model.config.model_dump(mode="json") | {"tables": {"item": KINDS[kind]}}  # what training wrote is not asked
    assert same_settings(larger, RankerSpec.of({"name": name, **asked}))
    assert larger.config.tables["item"].first_rows == (None if kind == "full" else 14)


def test_rankers_within_a_ranker_grow_with_it(days: tuple[Dataset, Dataset]) -> None:
    first, second = days
    torch.manual_seed(0)
    members = [{"name": name, "hidden": [8]} for name in ("dcn_v2", "deepfm")]
    tables = {"item": KINDS["quotient_remainder"], "user": KINDS["popularity"]}
    config = {"name": "cetnet", "members": members, "embedding_dim": 4, "embedding_init": 0.5, "tables": tables}
    model = RankerSpec.of(config).fitted(first.encoders).build(first.schema).eval()
    larger = grown(model, second.schema)
    assert torch.equal(logits(larger, second), logits(model, second.as_known_to(first.encoders)))
    assert same_settings(larger, RankerSpec.of(config))


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_moves_new_items_and_what_it_saved_is_the_next_days_start(
    kind: str, days: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    first, second = days
    model = a_model(first, kind)
    save_model(model, tmp_path / "day1", first.encoders)
    config = {"name": "din", **model.config.model_dump(mode="json"), "tables": {"item": KINDS[kind]}}
    recipe = {"model": config, "training": {"batch_size": 100, "epochs": 1, "learning_rate": 0.05}}
    recipe["embedding"] = {"kind": "row_wise_adagrad"}
    data = {"data": {"dataset": str(second.path)}}
    run({**data, **recipe}, tmp_path / "run", start=tmp_path / "day1")
    bundle = tmp_path / "run" / "model"
    trained = load_model(bundle)
    assert trained.schema == second.schema and Encoders.load(bundle / "encoders").agrees_with(second.encoders)

    items = second.encoders.vocabularies["item"]
    new = torch.from_numpy(items.ids(pl.Series([f"i{k}" for k in range(12, 16)]))).long()
    assert new.tolist() == [14, 15, 16, 17]
    old, after = (each.get_submodule("embeddings").vectors("item", torch.arange(rows))  # type: ignore[operator]
                  for each, rows in ((model, 14), (trained, 18)))  # fmt: skip
    moved = (after[new] - old[OUT_OF_VOCABULARY_ID]).abs().amax(1)
    assert bool((moved > 1e-4).all())
    if kind != "prefix":  # whose new ids have the codes of the unknown one until they are given codes of their own
        assert len(after[new].unique(dim=0)) == 4
    if kind == "full":
        idle = [OUT_OF_VOCABULARY_ID, items.id_of("i1"), items.id_of("i0")]
        assert torch.equal(after[idle], old[idle])

    frame = log(2).with_columns(item=pl.lit("i1") + pl.col("item"))
    third = Dataset.from_frame(frame, like=bundle, extend=True, split=ALL, path=tmp_path / "3")
    larger = grown(trained, third.schema)
    assert torch.equal(logits(larger, third), logits(trained, third.as_known_to(second.encoders)))
    data = {"data": {"dataset": str(third.path)}}
    report = run({**data, **recipe}, tmp_path / "run3", start=bundle)
    assert load_model(tmp_path / "run3" / "model").schema == third.schema == report.content.schema


def test_a_grown_run_that_was_cut_off_is_continued_to_the_same_weights(
    days: tuple[Dataset, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = days
    model = a_model(first, "mixed_dimension")
    save_model(model, tmp_path / "day1", first.encoders)
    recipe = {
        "data": {"dataset": str(second.path)},
        "model": {"name": "din", **model.config.model_dump(mode="json")},
        "training": {"batch_size": 100, "epochs": 2},
    }
    run(recipe, tmp_path / "whole", start=tmp_path / "day1")

    def cut_off(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        raise KeyboardInterrupt

    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", start=tmp_path / "day1")
    monkeypatch.undo()
    resumed = run(recipe, tmp_path / "run", start=tmp_path / "day1", resume=True)
    assert not resumed.notes
    weights = [load_model(tmp_path / name / "model").state_dict() for name in ("whole", "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("embedding", ["dense", "adagrad", "adam"])
@pytest.mark.parametrize("kind", ["full", "quotient_remainder", "mixed_dimension"])
def test_optimisers_know_of_old_rows_what_they_knew_and_nothing_of_new_ones(
    kind: str, embedding: str, days: tuple[Dataset, Dataset]
) -> None:
    """Steps of a grown ranker on rows without new ids are those of the smaller one, whatever lies beside its rows."""
    first, second = days
    training = TrainerConfig(batch_size=100, learning_rate=0.05, shuffle=False)
    small = Fitted(a_model(first, kind), training, EmbeddingOptimizer.model_validate({"kind": embedding}))
    rows = first.scan("train").collect()
    small.learn(rows, 1)
    large = Fitted(small.model, training, small.embedding, is_new=False)
    large.engine.load(small.engine.state())
    large.grow(second.schema)
    large.model.train(small.model.training)
    before = [(model, logits(model, first)) for model in (small.model, large.model)]
    assert torch.equal(before[0][1], before[1][1])
    for fitted in (small, large):
        fitted.learn(rows.head(300), 2)
    after = logits(small.model, first)
    assert not torch.equal(after, before[0][1])
    torch.testing.assert_close(logits(large.model, first), after, rtol=0, atol=1e-6)
