"""Funnels on logs that other policies drew in the simulated world, and the logs that a rollout makes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from fullrank.cli.main import app
from fullrank.data.dataset import Dataset
from fullrank.data.simulate import World
from fullrank.funnel import Funnel, Scorer, StageSizes, save_bundle
from fullrank.funnel.off_policy import LogColumns, evaluate_off_policy, read_log, weighed
from fullrank.funnel.rollout import rollout
from fullrank.funnel.slate import PolicySpec, SlateConfig

SOFTMAX = PolicySpec.of({"name": "softmax", "temperature": 0.3})
KEPT = ["propensity", "slate", "slot"]
REWARD = "bid * click"


@pytest.fixture(scope="module")
def world(dataset: Dataset) -> World:
    return World.load(dataset.path / "world.npz")


@pytest.fixture(scope="module")
def bundle(funnel: Funnel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundle") / "bundle"
    save_bundle(funnel, place)
    return place


@pytest.fixture(scope="module")
def frame(funnel: Funnel, world: World, dataset: Dataset) -> pl.DataFrame:
    return rollout(funnel, world, 4000, seed=1, policy=SOFTMAX, before=dataset)


@pytest.fixture(scope="module")
def log(frame: pl.DataFrame, bundle: Path) -> Dataset:
    return Dataset.from_frame(frame, like=bundle, keep=KEPT, split="none")


def test_a_rollout_is_a_function_of_its_seed_and_its_clicks_are_the_worlds(
    funnel: Funnel, world: World, dataset: Dataset, frame: pl.DataFrame
) -> None:
    assert_frame_equal(rollout(funnel, world, 4000, seed=1, policy=SOFTMAX, before=dataset), frame)
    assert not frame.equals(rollout(funnel, world, 4000, seed=2, policy=SOFTMAX, before=dataset))
    slates = frame.group_by("slate", maintain_order=True).agg("slot", pl.col("item_id").n_unique())
    assert slates["slot"].to_list() == [[0, 1, 2, 3]] * 1000 and (slates["item_id"] == 4).all()
    p, clicks = frame["__true_click"].to_numpy().astype(float), frame["click"].to_numpy()
    assert abs(clicks.sum() - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())
    dead = ~world.alive(float(frame["timestamp"].max()))[frame["item_id"].to_numpy()]
    assert (p[dead & (frame["timestamp"] == frame["timestamp"].max()).to_numpy()] == 0).all()
    # Who clicked before the rollout begins with that history.
    assert frame["history.item"].list.len()[:200].mean() > 3
    assert rollout(funnel, world, 400, seed=1)["history.item"].list.len()[:100].max() == 0
    assert (rollout(funnel, world, 400, seed=1)["propensity"] == 1).all()  # greedy


def test_the_policy_of_the_log_has_weights_of_one(funnel: Funnel, log: Dataset, frame: pl.DataFrame) -> None:
    found = evaluate_off_policy(funnel, log, "train", policy=SOFTMAX, reward=REWARD)
    assert found["largest_weight"] == pytest.approx(1, abs=1e-4)
    assert found["mean_weight"] == pytest.approx(1, abs=1e-4)
    mean = (frame["bid"] * frame["click"]).sum() / 1000
    assert found["ips"]["value"] == pytest.approx(mean, rel=1e-4) and found["logged"]["value"] == pytest.approx(mean)
    assert found["slates"] == 1000 and found["users"] == frame["user_id"].n_unique()
    assert found["policy"] == {"name": "softmax", "temperature": 0.3} and not found["warnings"]


def test_probabilities_of_logged_items_are_those_of_a_loop(funnel: Funnel, log: Dataset) -> None:
    """Epsilon-greedy among the funnel's candidates, those above taken away; and the model's expectation beside it."""
    explored = funnel.with_slate(SlateConfig(policy={"name": "epsilon", "epsilon": 0.3}))
    lists = read_log(funnel, log, "train", REWARD)
    slates = weighed(explored, lists)
    ranking = funnel.rank(lists.users[:50], 20)
    click = [label.name for label in funnel.schema.labels].index("click")
    for row in range(50):
        rows, values = ranking.items_UK[row].tolist(), ranking.value_UK[row].tolist()
        model = [float(funnel.items.bid_I[item]) * float(p) for item, p in zip(
            rows, ranking.probabilities_UKT[row, :, click], strict=True)]  # fmt: skip
        for slot in range(4):
            taken = lists.items_NK[row, :slot].tolist()
            free = [place for place, item in enumerate(rows) if item not in taken and values[place] > -np.inf]
            best = max(free, key=lambda place: values[place])
            p = {place: 0.3 / len(free) + 0.7 * (place == best) for place in free}
            place = rows.index(int(lists.items_NK[row, slot]))
            assert float(slates.new_NK[row, slot]) == pytest.approx(p[place], rel=1e-6)
            assert float(slates.predicted_NK[row, slot]) == pytest.approx(model[place], rel=1e-5)
            expected = sum(p[place] * model[place] for place in free)
            assert float(slates.expected_NK[row, slot]) == pytest.approx(expected, rel=1e-5)


def test_what_a_funnel_would_not_show_has_no_probability(funnel: Funnel, log: Dataset) -> None:
    lists = read_log(funnel, log, "train", REWARD)
    narrow = Funnel(
        encoders=funnel.encoders, items=funnel.items, users=funnel.users, context=funnel.context,
        retriever=funnel.retriever, early=funnel.early, final=funnel.final, value=funnel.value.text,
        sizes=StageSizes(retrieve=60, keep=8), slate=SlateConfig(policy=SOFTMAX),
    )  # fmt: skip
    candidates = narrow.rank(lists.users, 8).items_UK
    inside = (lists.items_NK[:, :, None] == candidates[:, None]).any(2)
    assert 0.2 < inside.double().mean() < 0.95
    assert torch.equal(weighed(narrow, lists).new_NK > 0, inside)
    # A rule that the log's policy had not: one ad of a category.
    by = [feature.name for feature in funnel.schema.categorical].index("category")
    category_NK = funnel.items.rows.batch.ids_BF[lists.items_NK, by]
    repeats = torch.stack([(category_NK[:, :s] == category_NK[:, s : s + 1]).any(1) for s in range(4)], 1)
    diverse = SlateConfig(policy=SOFTMAX, diversity={"by": "category", "at_most": 1})
    assert 0.1 < repeats.double().mean() < 0.9
    assert torch.equal(weighed(funnel.with_slate(diverse), lists).new_NK > 0, ~repeats)


def test_another_policy_is_worth_what_its_own_rollout_earns(funnel: Funnel, world: World, dataset: Dataset,
                                                            bundle: Path) -> None:  # fmt: skip
    explored = rollout(funnel, world, 8_000, seed=5, policy=PolicySpec.of({"name": "epsilon", "epsilon": 0.3}))
    own = rollout(funnel, world, 8_000, seed=6)
    truth = (own["bid"] * own["__true_click"]).sum() / 2000
    log = Dataset.from_frame(explored, like=bundle, keep=KEPT, split="none")
    found = evaluate_off_policy(funnel, log, "train", reward=REWARD)
    for estimator in ("ips", "snips", "dr"):
        low, high = found[estimator]["interval"]
        assert abs(found[estimator]["value"] - truth) < high - low, estimator
    assert found["dr"]["gain"]["interval"][0] > 0  # exploring costs


BAD = {
    "no column": (pl.col("slot").alias("place"), "no column \"slot\", which has to say the place"),
    "a propensity of 0": (pl.when(pl.col("slate") == 7).then(0.0).otherwise("propensity").alias("propensity"),
                          'slate 7 slot 0: column "propensity" is 0.0, expected a propensity above 0 and at most 1'),
    "a propensity above 1": (pl.when(pl.col("slate") == 7).then(1.5).otherwise("propensity").alias("propensity"),
                             'slate 7 slot 0: column "propensity" is 1.5'),
    "no propensity": (pl.when(pl.col("slate") != 7).then("propensity").alias("propensity"),
                      'slate 7 slot 0: column "propensity" is '),
    "a slot that is missing": (pl.when(pl.col("slot") == 2).then(5).otherwise("slot").alias("slot"),
                               'slate 0 slot 3: column "slot" is 3, expected 0, 1, 2'),
    "one slate": (pl.lit(1).alias("slate"), 'column "slot" is 0, expected 0, 1, 2, ..., each once'),
    "no list": (pl.lit(0.5).alias("all"), 'column "all" is Float32, expected a list of numbers in each row'),
    "a distribution": (pl.concat_list(pl.lit(0.5), pl.lit(0.4)).alias("all"), 'column "all" is .*, expected .* to 1'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_log_that_cannot_be_weighed_is_refused(name: str, funnel: Funnel, frame: pl.DataFrame, bundle: Path) -> None:
    change, message = BAD[name]
    keep = [*KEPT, "all"] if '"all"' in message else KEPT if name != "no column" else KEPT[:2]
    log = Dataset.from_frame(frame.head(400).with_columns(change), like=bundle, keep=keep, split="none")
    columns = LogColumns(distribution="all") if "all" in keep else LogColumns()
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        evaluate_off_policy(funnel, log, "train", columns=columns)


def test_whole_distributions_and_rankers(funnel: Funnel, frame: pl.DataFrame, bundle: Path, log: Dataset) -> None:
    whole = frame.head(400).with_columns(pl.concat_list("propensity", 1 - pl.col("propensity")).alias("all"))
    whole = Dataset.from_frame(whole, like=bundle, keep=[*KEPT, "all"], split="none")
    assert evaluate_off_policy(funnel, whole, "train", columns=LogColumns(distribution="all"))["slates"] == 100
    with pytest.raises(ValueError, match="a single ranker does not know which items it could have"):
        evaluate_off_policy(Scorer(funnel.encoders, funnel.final), log, "train")


def test_from_the_command_line(bundle: Path, dataset: Dataset, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if done.exception is not None:
            raise done.exception
        return done.stdout

    out, page = tmp_path / "explored", tmp_path / "page.html"
    made = run("data", "rollout", bundle, dataset.path, out, "--impressions", 2000, "--policy", "epsilon", "--json")
    assert json.loads(made)["rows"] == {"train": 1600, "valid": 200, "test": 200}
    arguments = ("evaluate", bundle, out, "--off-policy", "--split", "train", "--requests", 20, "--report", page)
    found = json.loads(run(*arguments, "--reward", "click", "--clip", 1.1, "--json"))["off_policy"]
    assert found["reward"] == "click" and found["clip"] == 1.1 and found["clipped"] > 0 and found["slates"] == 400
    assert found["dr"]["interval"][0] < found["dr"]["value"] < found["dr"]["interval"][1]
    assert (
        "What the funnel would have earned on this log" in page.read_text()
        and "were clipped at 1.1" in page.read_text()
    )
    shown = run(*arguments, "--policy", "{name: softmax, temperature: 0.2}", "--weighing", "slot")
    assert "had the policy been: softmax, 0.2" in shown and "doubly robust" in shown
    for wrong, message in (
        (("--policy", "best"), 'slot policy "best" is unknown'),
        (("--policy", "{name: softmax, temperature: 0}"), "--policy: temperature"),
        (("--policy", "{a"), "neither a name nor a mapping"),
        (("--propensity", "p"), 'no column "p"'),
        (("--weighing", "list"), "expected prefix or slot"),
        (("--reward", "clicks"), 'unknown name "clicks"'),
        (("--clip", "-1"), "expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments, *wrong)
    with pytest.raises(ValueError, match="--reward belongs to --off-policy"):
        run("evaluate", bundle, out, "--reward", "click")
    with pytest.raises(ValueError, match="exists already"):
        run("data", "rollout", bundle, dataset.path, out)
    with pytest.raises(ValueError, match="no simulated world"):
        run("data", "rollout", bundle, log_without_world(tmp_path, dataset), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def log_without_world(place: Path, dataset: Dataset) -> Path:
    import shutil

    shutil.copytree(dataset.path, place / "log", ignore=shutil.ignore_patterns("world.npz"))
    return place / "log"
