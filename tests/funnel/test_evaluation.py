"""Facts about the evaluation of a funnel."""

from __future__ import annotations

import json
import math
import re
import xml.dom.minidom
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset
from fullrank.data.loader import batch_from_frame
from fullrank.data.simulate import World, simulate_dataset
from fullrank.funnel import Funnel, FunnelConfig, evaluate_funnel, save_bundle, train_funnel
from fullrank.funnel.recall import clicked_requests
from fullrank.funnel.report import render
from fullrank.funnel.true_value import true_value
from fullrank.metrics import auc, normalized_entropy


@pytest.fixture(scope="module")
def world(dataset: Dataset) -> World:
    return World.load(dataset.path / "world.npz")


@pytest.fixture(scope="module")
def report(funnel: Funnel, dataset: Dataset) -> dict[str, object]:
    return evaluate_funnel(funnel, dataset, requests=60)


def test_stage_metrics_are_those_of_all_rows_at_once(funnel: Funnel, dataset: Dataset, report: dict) -> None:  # type: ignore[type-arg]
    frame = dataset.scan("test").collect()
    batch = batch_from_frame(frame, dataset.schema)
    with torch.inference_mode():
        logits_B = funnel.final(batch).logits_BT[:, 0]
    found = report["stages"]["final"]["click"]
    assert found["ne"] == pytest.approx(normalized_entropy(logits_B, batch.labels_BT[:, 0]), abs=1e-6)
    assert found["auc"] == pytest.approx(auc(logits_B, batch.labels_BT[:, 0]), abs=1e-6)
    p = torch.from_numpy(frame["__true_click"].to_numpy().copy()).double()
    oracle = normalized_entropy(torch.logit(p), batch.labels_BT[:, 0])
    assert found["oracle_ne"] == pytest.approx(oracle, abs=1e-6)
    assert found["gap_closed"] == pytest.approx((1 - found["ne"]) / (1 - oracle))


def test_no_stage_beats_the_oracle(report: dict) -> None:  # type: ignore[type-arg]
    for stage in report["stages"].values():
        assert stage["click"]["oracle_ne"] < stage["click"]["ne"]
        assert stage["click"]["auc"] < stage["click"]["oracle_auc"]


def test_recall_is_that_of_a_search_by_hand(funnel: Funnel, dataset: Dataset, report: dict) -> None:  # type: ignore[type-arg]
    drawn = clicked_requests(dataset, "test", 60, 0)
    assert drawn is not None
    users, frame = drawn
    assert set(frame["click"]) == {1.0}
    found = funnel.retriever.search(users, 60).item_keys_BK.numpy()
    expected = np.mean([item in row for item, row in zip(frame["__item_id"], found, strict=True)])
    assert report["recall"]["retrieval"] == pytest.approx(expected)
    assert report["recall"]["early"] <= report["recall"]["retrieval"]
    assert report["recall"]["final_at_10"] <= report["recall"]["final_at_100"]


def test_the_early_stage_loses_nothing_where_it_keeps_all(funnel: Funnel, dataset: Dataset) -> None:
    from fullrank.funnel import StageSizes

    sizes = funnel.sizes
    try:
        funnel.sizes = StageSizes(retrieve=60, keep=60)
        assert evaluate_funnel(funnel, dataset, requests=40)["early_recall"]["top_10"] == 1.0
    finally:
        funnel.sizes = sizes


def test_an_early_stage_is_held_against_the_final_one_on_all_candidates(funnel: Funnel, dataset: Dataset) -> None:
    found = evaluate_funnel(funnel, dataset, requests=100)["early_recall"]
    # Alone or not, the first early stage sees all that was retrieved.
    assert found["stages"]["early"]["top_10"] == pytest.approx(found["top_10"])
    assert 0 < found["stages"]["early"]["kendall"] < 1 and 0.5 < found["stages"]["early"]["consistency"] < 1
    early = funnel.early
    try:
        funnel.early = {"early": funnel.final}
        prepared, funnel.prepared = funnel.prepared, {}
        twin = evaluate_funnel(funnel, dataset, requests=100)["early_recall"]["stages"]["early"]
        assert twin == {"top_10": 1.0, "kendall": pytest.approx(1.0), "consistency": 1.0}
    finally:
        funnel.early, funnel.prepared = early, prepared


def test_a_dataset_with_other_vocabularies_is_refused(funnel: Funnel, dataset: Dataset, tmp_path: Path) -> None:
    other = simulate_dataset(tmp_path / "other", 6000, 4, items=100, users=80)
    with pytest.raises(ValueError, match="has another schema|other vocabularies"):
        evaluate_funnel(funnel, other)
    same_sizes = Dataset.open(dataset.path)
    vocabulary = same_sizes.encoders.vocabularies["device"]
    vocabulary.values = vocabulary.values.reverse()
    with pytest.raises(ValueError, match="has another schema or other vocabularies"):
        evaluate_funnel(funnel, same_sizes)


def test_a_split_that_does_not_exist_is_refused(funnel: Funnel, dataset: Dataset) -> None:
    with pytest.raises(ValueError, match='no split "tset"'):
        evaluate_funnel(funnel, dataset, "tset")


def test_policies_earn_what_the_world_says(funnel: Funnel, dataset: Dataset, world: World) -> None:
    result = true_value(funnel, dataset, world, requests=10_000)
    assert result["random"] < result["best"] and result["log"] < result["best"] and result["funnel"] <= result["best"]
    # The log's own value can be read off the log: true probabilities and bids are in it.
    frame = dataset.scan("test").collect().with_columns((pl.col("__request_id") // 64).alias("request"))
    whole = frame.group_by("request").agg((pl.col("__bid") * pl.col("__true_click")).sum().alias("v"), pl.len())
    expected = whole.filter(pl.col("len") == world.config.slots)["v"].mean()
    assert result["log"] == pytest.approx(expected, rel=2e-3)


def test_the_true_probability_of_a_shown_ad_is_the_logs(funnel: Funnel, dataset: Dataset, world: World) -> None:
    """The history and the device that the judgement decodes are those of the simulation."""
    from fullrank.funnel.true_value import _decoded, _histories

    frame = dataset.scan("test").head(200).collect()
    p = world.click_probability(
        frame["__user_id"].to_numpy(),
        frame["__item_id"].to_numpy()[:, None],
        frame["__timestamp"].to_numpy(),
        _decoded(dataset.encoders, "device", frame["device"]),
        (frame["__request_id"].to_numpy() % 64)[:, None],
        _histories(dataset.encoders, frame, world),
    )
    assert np.allclose(p[:, 0], frame["__true_click"].to_numpy(), atol=1e-5)


def test_the_report_stands_alone(report: dict, funnel: Funnel, dataset: Dataset, world: World) -> None:  # type: ignore[type-arg]
    values = {**report, "true_value": true_value(funnel, dataset, world, requests=20)}
    page = render("a <b> & c", values, {"log": "x < y"})
    assert "a &lt;b&gt; &amp; c" in page and "x &lt; y" in page
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    final = report["stages"]["final"]["click"]
    assert f"{final['ne']:.4f}" in page and f"{final['oracle_ne']:.4f}" in page
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert page.count("<figure") == 7 and len(charts) == 7 + len(report["slices"])
    for chart in charts:
        xml.dom.minidom.parseString(re.sub(r"=([\w-]+)(?=[ >/])", r"='\1'", chart))


def test_a_log_without_bids_is_ranked_by_the_first_task(tmp_path: Path) -> None:
    from fullrank.data.dataset import write_dataset
    from fullrank.data.simulate import SimulationConfig, simulate, simulation_schema
    from fullrank.training import TrainerConfig

    frame = pl.concat(simulate(SimulationConfig(impressions=800, items=60, users=20)))
    schema = simulation_schema()
    keys = schema.keys.model_copy(update={"bid": None, "timestamp": None})
    schema = schema.model_copy(update={"keys": keys})
    frame = frame.drop("bid", "timestamp", "__true_click", "__true_conversion", "__true_hide", "conversion_delay")
    dataset = write_dataset(tmp_path / "data", schema, {"train": [frame[:600]], "test": [frame[600:]]})
    training = TrainerConfig(batch_size=200)
    config = FunnelConfig.model_validate(
        {"early": {"training": training}, "final": {"model": {"name": "lr"}, "training": training}}
    )
    funnel = train_funnel(dataset, config)[0]
    assert funnel.value.text == "click"
    report = evaluate_funnel(funnel, dataset, requests=10)
    assert "oracle_ne" not in report["stages"]["final"]["click"]
    assert not math.isnan(report["stages"]["final"]["click"]["ne"])
    with pytest.raises(ValueError, match='unknown name "bid"; allowed are click'):
        train_funnel(dataset, FunnelConfig(value="bid * click"))
    with pytest.raises(ValueError, match="active_days needs a timestamp"):
        train_funnel(dataset, FunnelConfig(active_days=1))


def test_a_single_ranker_is_evaluated_on_a_simulated_log(
    funnel: Funnel,
    dataset: Dataset,
    report: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],  # type: ignore[type-arg]
) -> None:
    """It recommends nothing, so there is no list whose true value could be asked for."""
    from fullrank.cli.evaluate import evaluate

    save_bundle(funnel.scorer, tmp_path / "model")
    evaluate(tmp_path / "model", dataset.path, split="test", requests=10, seed=0, as_json=True)
    found = json.loads(capsys.readouterr().out)
    for task, metrics in report["stages"]["final"].items():
        again = found["stages"]["final"][task]
        assert again.pop("intervals") == metrics["intervals"] and again.pop("resampled") == "users"
        numbers = {name: value for name, value in metrics.items() if name not in ("intervals", "resampled")}
        assert again == pytest.approx(numbers, nan_ok=True)
    assert "true_value" not in found
    evaluate(tmp_path / "model", dataset.path, split="test", requests=10, seed=0, as_json=False)
    assert f"{found['stages']['final']['click']['auc']:.4f}" in capsys.readouterr().out
