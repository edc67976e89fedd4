"""Facts about the comparison of two bundles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.simulate import simulate_dataset, simulation_schema
from fullrank.funnel import Funnel, Scorer, StageSizes, compare_funnels, evaluate_funnel
from fullrank.models import RankerSpec
from fullrank.schema import Categorical, Keys, Label, Numeric, Schema
from fullrank.training import TrainerConfig
from fullrank.training.run import train_ranker


@pytest.fixture(scope="module")
def untrained(dataset: Dataset) -> Scorer:
    torch.manual_seed(0)
    spec = {"name": "dcn_v2", "hidden": [8], "embedding_dim": 4}
    return Scorer(dataset.encoders, RankerSpec.of(spec).build(dataset.schema))


def test_a_twin_is_no_better(funnel: Funnel, dataset: Dataset) -> None:
    report = compare_funnels(funnel, funnel, dataset, requests=60)
    assert report["verdict"] == "no difference shown"
    assert report["tasks"].keys() == {"click", "conversion", "hide"}
    for found in (*report["tasks"]["click"].values(), report["recall"]["final_at_10"]):
        assert (found["difference"], found["interval"]) == (0, [0, 0])


def test_what_learnt_beats_what_did_not_either_way_round(funnel: Funnel, untrained: Scorer, dataset: Dataset) -> None:
    there = compare_funnels(untrained, funnel.scorer, dataset)
    back = compare_funnels(funnel.scorer, untrained, dataset)
    ours, theirs = (evaluate_funnel(one, dataset)["stages"]["final"]["click"] for one in (funnel.scorer, untrained))
    assert (there["verdict"], back["verdict"]) == ("B is better", "A is better")
    assert there["resampled"] == "users" and "recall" not in there
    for metric, sign in (("ne", -1), ("auc", 1)):
        one, other = there["tasks"]["click"][metric], back["tasks"]["click"][metric]
        assert (one["a"], one["b"]) == pytest.approx((theirs[metric], ours[metric]))
        assert one["difference"] == -other["difference"] and sign * one["difference"] > 0
        assert one["interval"] == pytest.approx([-other["interval"][1], -other["interval"][0]])
        assert one["verdict"] == "B is better"
    error = there["tasks"]["click"]["calibration_error"]
    assert error["b"] == pytest.approx(abs(ours["calibration"] - 1))


def test_lists_of_two_funnels_are_compared_on_the_same_requests(funnel: Funnel, dataset: Dataset) -> None:
    parts = {"encoders": funnel.encoders, "items": funnel.items, "users": funnel.users, "context": funnel.context}
    narrow = Funnel(
        **parts,
        retriever=funnel.retriever,
        early=funnel.early,
        final=funnel.final,
        value="bid * click - 0.1 * hide",
        sizes=StageSizes(retrieve=20, keep=5),
    )
    narrow.index_active()
    recall = compare_funnels(narrow, funnel, dataset, requests=200)["recall"]
    assert recall["retrieval_at_100"]["difference"] == 0
    assert recall["retrieval"]["verdict"] == "B is better" and recall["retrieval"]["difference"] > 0.1
    whole = evaluate_funnel(funnel, dataset, requests=200)["recall"]
    assert recall["retrieval"]["b"] == pytest.approx(whole["retrieval"])
    assert recall["requests"] == whole["requests"] * whole["retrievable"]


def test_labels_that_both_predict_are_compared(funnel: Funnel, dataset: Dataset, tmp_path: Path) -> None:
    """A dataset of the same log with one label has the same encoders."""
    schema = simulation_schema().model_copy(update={"labels": (Label(name="hide"),)})
    one = _with_labels(dataset, schema.labels, tmp_path / "one")
    hide, _ = train_ranker({"name": "lr"}, one, TrainerConfig(batch_size=512, epochs=1))
    report = compare_funnels(Scorer(one.encoders, hide), funnel.scorer, dataset)
    assert report["tasks"].keys() == {"hide"}
    expected = evaluate_funnel(funnel.scorer, dataset)["stages"]["final"]["hide"]["ne"]
    assert report["tasks"]["hide"]["ne"]["b"] == pytest.approx(expected)
    assert report["tasks"]["hide"]["ne"]["a"] == pytest.approx(
        evaluate_funnel(Scorer(one.encoders, hide), one)["stages"]["final"]["hide"]["ne"]
    )
    other = _with_labels(dataset, (Label(name="click"),), tmp_path / "other")
    with pytest.raises(ValueError, match="A predicts hide, B click, conversion, hide, and .* has click: they share no"):
        compare_funnels(Scorer(one.encoders, hide), funnel.scorer, other)


def _with_labels(dataset: Dataset, labels: tuple[Label, ...], place: Path) -> Dataset:
    """The encoded files with fewer labels."""
    import json
    import shutil

    shutil.copytree(dataset.path, place)
    for path in (place / "schema.json", place / "encoders" / "encoders.json"):
        content = json.loads(path.read_text())
        schema = content.get("table_schema", content)
        schema["labels"] = [label.model_dump(mode="json") for label in labels]
        path.write_text(json.dumps(content))
    return Dataset.open(place)


def test_other_vocabularies_and_splits_are_refused(funnel: Funnel, dataset: Dataset, tmp_path: Path) -> None:
    strange = simulate_dataset(tmp_path / "other", 6000, 4, items=100, users=80)
    with pytest.raises(ValueError, match="has another schema or other vocabularies"):
        compare_funnels(funnel, funnel, strange)
    with pytest.raises(ValueError, match='no split "tset"'):
        compare_funnels(funnel, funnel, dataset, "tset")


def test_numbers_are_compared_by_their_error(tmp_path: Path) -> None:
    schema = Schema(
        features=(Categorical(name="item", role="item"), Numeric(name="x")),
        labels=(Label(name="spent", kind="regression"),),
        keys=Keys(item_id="item"),
    )
    x = torch.rand(900, generator=torch.Generator().manual_seed(0)).tolist()
    frame = pl.DataFrame({"item": [str(n % 7) for n in range(900)], "x": x, "spent": [3 * value for value in x]})
    made = write_dataset(tmp_path / "data", schema, {"train": [frame[:600]], "test": [frame[600:]]})
    models: list[Any] = []
    for epochs, rate in ((1, 1e-5), (20, 0.05)):
        training = TrainerConfig(batch_size=50, epochs=epochs, learning_rate=rate, monitor="mse")
        model, _ = train_ranker({"name": "dcn_v2", "hidden": [8], "embedding_dim": 4}, made, training)
        models.append(Scorer(made.encoders, model))
    report = compare_funnels(*models, made)
    assert report["resampled"] == "rows" and report["verdict"] == "B is better"
    assert report["tasks"]["spent"]["rmse"]["b"] < 0.3 < report["tasks"]["spent"]["rmse"]["a"]
    worse = evaluate_funnel(models[0], made)
    assert worse["stages"]["final"]["spent"]["rmse"] == pytest.approx(report["tasks"]["spent"]["rmse"]["a"])
    assert "calibration_curve" not in worse and worse["slices"] == [] and worse["baselines"] == {}
    (warning,) = worse["warnings"]
    assert "of predicting the mean" in warning["message"] and warning["stage"] == "final"
    assert evaluate_funnel(models[1], made)["warnings"] == []
    assert not math.isnan(worse["stages"]["final"]["spent"]["std"])
