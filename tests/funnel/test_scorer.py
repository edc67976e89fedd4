"""Facts about a single ranker that scores raw rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.data.dataset import Dataset
from fullrank.data.importing import import_dataset
from fullrank.data.loader import Loader
from fullrank.data.splits import SplitSpec
from fullrank.funnel import Funnel, Request, Scorer, load_bundle, save_bundle
from fullrank.funnel.evaluation import evaluate_funnel
from fullrank.models import MODELS
from fullrank.schema import (
    Categorical,
    EventId,
    EventNumber,
    Keys,
    Label,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
)
from fullrank.training import evaluate, load_model

SCHEMA = Schema(
    features=(
        Categorical(name="item", role="item"),
        Categorical(name="site", encoding="hash", num_embeddings=50),
        Categorical(name="count", encoding="log2_bucket"),
        Numeric(name="price", transform="standard", missing_indicator=True),
        MultiCategorical(name="tags", separator="^"),
        Sequence(name="past", fields=(EventId(name="item", table="item"), EventNumber(name="age", transform="log1p"))),
    ),
    labels=(Label(name="is clicked"), Label(name="spent", kind="regression")),
    keys=Keys(item_id="item", timestamp="time"),
)


def log(rows: int) -> pl.DataFrame:
    rng = np.random.default_rng(0)

    def joined(low: int, high: int) -> list[str]:
        return ["^".join(str(n) for n in rng.integers(low, high, length)) for length in lengths]

    lengths = rng.integers(0, 4, rows)
    return pl.DataFrame(
        {
            "item": rng.integers(0, 20, rows),
            "site": [f"s{n}" for n in rng.integers(0, 9, rows)],
            "count": [None if n < 0 else int(n) for n in rng.integers(-1, 40, rows)],
            "price": [None if p < 0.2 else round(float(p), 3) for p in rng.random(rows)],
            "tags": joined(0, 5),
            "past.item": joined(0, 20),
            "past.age": joined(1, 900),
            "is clicked": rng.integers(0, 2, rows),
            "spent": rng.random(rows).round(2),
            "time": rng.integers(0, 1000, rows),
        }
    )


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The log as JSON has it."""
    parsed: list[dict[str, Any]] = json.loads(json.dumps(log(600).to_dicts()))
    return parsed


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    place = tmp_path_factory.mktemp("clicks")
    log(600).write_csv(place / "log.csv")
    split = SplitSpec(kind="none")
    return import_dataset("csv", place / "log.csv", place / "data", schema=SCHEMA, split=split)


@pytest.fixture(scope="module")
def scorer(clicks: Dataset) -> Scorer:
    torch.manual_seed(0)
    config = {"hidden": [8], "num_experts": 2, "embedding_dim": 4, "embedding_init": 1.0}
    return Scorer(clicks.encoders, MODELS["mmoe"].from_config(clicks.schema, config))


def test_rows_of_the_log_get_what_the_model_says_of_the_imported_ones(
    scorer: Scorer, clicks: Dataset, rows: list[dict[str, Any]]
) -> None:
    with torch.inference_mode():
        logits = torch.cat([scorer.model(batch).logits_BT for batch in Loader(clicks, "train", 100)])
    scored = scorer.score(rows)
    torch.testing.assert_close(
        torch.tensor([item.predictions["is clicked"] for item in scored]), torch.sigmoid(logits[:, 0])
    )
    torch.testing.assert_close(torch.tensor([item.predictions["spent"] for item in scored]), logits[:, 1])
    assert [item.item_id for item in scored] == [row["item"] for row in rows]
    assert [item.value for item in scored] == [item.predictions["is clicked"] for item in scored]
    assert len({item.value for item in scored}) > 500


def test_lists_and_joined_text_are_the_same(scorer: Scorer, rows: list[dict[str, Any]]) -> None:
    def listed(text: str) -> list[str]:
        return text.split("^") if text else []

    several = [{**row, "tags": listed(row["tags"]), "past.item": listed(row["past.item"])} for row in rows[:50]]
    assert scorer.score(several) == scorer.score(rows[:50])
    numbers = {"past.item": [3, "4", 5.0], "past.age": [1, 2.5, 4]}
    texts = {"past.item": "3^4^5", "past.age": "1^2.5^4"}
    assert scorer.score([numbers]) == scorer.score([texts])


def test_what_is_left_out_is_missing(scorer: Scorer) -> None:
    bare, told = scorer.score([{}, {name: [] if "." in name or name == "tags" else None for name in scorer.columns}])
    # a row's place in the batch may change the last bit of a matrix product
    assert told.predictions == pytest.approx(bare.predictions, abs=1e-6)
    assert scorer.score([{"item": ""}])[0].predictions == pytest.approx(bare.predictions, abs=1e-6)
    assert scorer.score([{"item": "never seen"}])[0].predictions != pytest.approx(bare.predictions, abs=1e-3)


def test_a_number_and_its_text_are_one_category(scorer: Scorer) -> None:
    first, *others = [scorer.score([{"item": item}])[0].predictions for item in (7, "7", 7.0)]
    others += [item.predictions for item in scorer.score([{"item": item} for item in (7, "7", 7.0, 7.5)])][:3]
    for predictions in others:
        assert predictions == pytest.approx(first, abs=1e-6)
    half, one, text = scorer.score([{"price": 0.5}, {"price": 1}, {"price": "1"}])
    assert text.predictions == pytest.approx(one.predictions, abs=1e-6)
    assert half.predictions != pytest.approx(one.predictions, abs=1e-4)


@pytest.mark.parametrize("item", [2**63, -(2**70), 10**400, "ü" * 1000, "\u0000", "😀"])
def test_any_id_is_served_as_one_never_seen(scorer: Scorer, item: int | str) -> None:
    expected = scorer.score([{"item": "never seen"}])[0].predictions
    assert scorer.score([{"item": item}])[0].predictions == expected
    mixed = scorer.score([{"item": item}, {"item": 7}])
    assert mixed[1].predictions == pytest.approx(scorer.score([{"item": 7}])[0].predictions, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prize": 1}, 'row 2: unknown column "prize"; expected item, site, count, price, tags, past.item, past.age'),
        ({"item": [7]}, r'row 2: feature "item" is \[7\], expected one text or number'),
        ({"price": {"a": 1}}, 'row 2: feature "price" is .*, expected one number'),
        ({"price": "cheap"}, 'row 2: column "price" is "cheap": not a number'),
        ({"price": 10**400}, 'row 2: column "price" is "10*": not a finite number'),
        ({"count": "many"}, 'row 2: column "count" is "many": not a finite number'),
        ({"tags": 3}, 'row 2: feature "tags" is 3, expected a list'),
        ({"tags": [["a"]]}, r'row 2: feature "tags" has \[\'a\'\] in its list'),
        ({"past.item": ["3"]}, '"past.item" is given without "past.age": give all fields of past'),
        ({"past.item": ["3"], "past.age": [1, 2]}, 'row 2: column "past.age" is "2": as many events as past.item'),
        ({"past.item": ["3"], "past.age": ["x"]}, 'row 2: column "past.age" is "x": not a number'),
    ],
)
def test_a_wrong_row_is_named(scorer: Scorer, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        scorer.score([{"item": 7}, row])
    assert "\n" not in str(caught.value)


def test_no_rows_no_answers(scorer: Scorer) -> None:
    assert scorer.score([]) == []


def test_a_whole_row_gets_what_a_funnel_says_of_its_item_for_its_user(funnel: Funnel) -> None:
    vocabularies, items = funnel.encoders.vocabularies, funnel.items
    asks: dict[str, Any] = {"user_id": "new", "gender": 1, "age_group": 2, "country": 0}
    asks |= {"hour": 9, "weekday": 3, "device": 1, "position": 0}
    asks |= {"history.item": [3, 5], "history.category": [1, 2], "history.age": [60, 7.5]}
    place = int(items.active_I[0])
    item = {name: vocabularies[name].values[items.frame[name][place] - 2] for name in ("category", "brand", "campaign")}
    item |= {"item_id": items.ids[place], "price": float(np.expm1(items.frame["price"][place]))}
    assert items.bid_I is not None
    scored = funnel.scorer.score([{**asks, **item, "bid": float(items.bid_I[place])}, {**asks, **item}])
    expected = funnel.score(Request("new", asks), [items.ids[place]])[0]
    assert scored[0].item_id == items.ids[place]
    assert scored[0].predictions == pytest.approx(expected.predictions, rel=1e-5)
    assert scored[0].value == pytest.approx(expected.value, rel=1e-5)
    assert scored[1].value is None  # the formula needs a bid


def test_a_saved_scorer_answers_as_before_and_is_a_model_directory(
    scorer: Scorer, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    save_bundle(scorer, tmp_path / "model", about={"seed": 0})
    opened = load_bundle(tmp_path / "model")
    assert isinstance(opened, Scorer)
    assert opened.score(rows[:20]) == scorer.score(rows[:20])
    assert opened.value.text == "is clicked"
    model = load_model(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), scorer.model.parameters(), strict=True))


def test_every_changed_byte_of_a_saved_scorer_is_refused(scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_bundle(scorer, path)
    for name in json.loads((path / "manifest.json").read_text())["files"]:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name} does not match its hash"):
            load_bundle(path)
        (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"is not a bundle: it has no manifest.json; did you mean {path}"):
        load_bundle(tmp_path)
    shutil.rmtree(path / "encoders")
    with pytest.raises(ValueError, match=r"encoders.json is missing from the bundle"):
        load_bundle(path)


def test_evaluation_of_a_scorer_is_that_of_its_model(scorer: Scorer, clicks: Dataset) -> None:
    report = evaluate_funnel(scorer, clicks, "train")
    assert report["stages"].keys() == {"final"}
    assert report["stages"]["final"].keys() == {"is clicked", "spent"}
    assert "recall" not in report
    assert report["stages"]["final"]["is clicked"]["rows"] == 600
    spent = report["stages"]["final"]["spent"]
    assert spent["mse"] == pytest.approx(evaluate(scorer.model, Loader(clicks, "train", 100))["spent"]["mse"])
    assert spent["rmse"] == pytest.approx(spent["mse"] ** 0.5)
    assert spent["std"] == pytest.approx(clicks.scan("train").collect()["spent"].std(ddof=0), rel=1e-6)
    assert spent["intervals"]["rmse"][0] < spent["rmse"] < spent["intervals"]["rmse"][1]
    assert spent["resampled"] == "rows"
