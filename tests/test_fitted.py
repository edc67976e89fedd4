"""The front door: what a table becomes, and that it agrees with the long way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import fullrank as fr
from fullrank.funnel.training import FunnelConfig
from fullrank.schema import Schema


def log(rows: int, seed: int) -> pl.DataFrame:
    """Clicks on items by users, with what a shop's log has: texts, numbers, times, gaps."""
    random = np.random.default_rng(seed)
    taste = np.random.default_rng(0).normal(size=(30, 6))
    user, item = random.integers(0, 30, rows), random.integers(0, 40, rows)
    logit = 1.5 * taste[user, item % 6] - 0.5
    click = random.random(rows) < 1 / (1 + np.exp(-logit))
    return pl.DataFrame(
        {
            "user": [f"u{u}" for u in user],
            "item": item,
            "colour": [None if i == 7 else f"c{i % 6}" for i in item],
            "price": np.round(1 + item * 0.37, 2),
            "time": 1_700_000_000 + np.sort(random.integers(0, 500_000, rows)),
            "click": click.astype(np.int64),
            "bought": (click & (random.random(rows) < 0.4)).astype(np.int64),
        }
    )


@pytest.fixture(scope="module")
def fitted() -> fr.Fitted:
    spec = {"name": "dcn_v2", "hidden": [16], "embedding_dim": 4, "embedding_init": 0.05}
    training = {"learning_rate": 0.02, "batch_size": 128}
    return fr.fit(log(3000, 1), "click", spec, item_id="item", user_id="user", timestamp="time", training=training)


@pytest.fixture(scope="module")
def funnel() -> fr.Fitted:
    config = FunnelConfig.model_validate(
        {
            "retrieval": {"epochs": 2, "batch_size": 128, "hidden": [16], "output_dim": 8},
            "final": {"model": {"name": "dcn_v2", "hidden": [16]}},
        }
    )
    return fr.fit(log(3000, 1), "click", config, item_id="item", user_id="user", timestamp="time")


def test_it_predicts_what_it_was_evaluated_with(fitted: fr.Fitted) -> None:
    assert fitted.dataset is not None
    test = fitted.dataset.scan("test").collect()
    # A split by time: the last rows of the log are those of the test part.
    raw = log(3000, 1).tail(test.height)
    assert raw["click"].to_list() == test["click"].cast(pl.Int64).to_list()
    p = fitted.predict(raw)
    assert p.shape == (test.height,) and p.dtype == np.float32
    on_table, on_dataset = fitted.evaluate(raw)["click"], fitted.evaluate()["click"]
    assert on_table["auc"] == pytest.approx(on_dataset["auc"], abs=1e-9)
    # "bought" is known only after a click, and no feature.
    assert on_table["auc"] > 0.6
    with torch.no_grad():
        logits = fitted.ranker(next(iter(fr.Loader(fitted.dataset, "test", test.height)))).logits_BT[:, 0]
    np.testing.assert_allclose(p, torch.sigmoid(logits).numpy(), rtol=1e-5)


def test_unknown_values_gaps_and_absent_columns_are_missing_not_errors(fitted: fr.Fitted) -> None:
    p = fitted.predict({"user": ["u3", "never seen", None], "item": [4, 999, None]})
    assert np.isfinite(p).all() and len(set(p.tolist())) > 1
    with pytest.raises(ValueError, match="none of the columns"):
        fitted.predict({"other": [1]})
    with pytest.raises(ValueError, match='no column "click", which is a label'):
        fitted.evaluate({"user": ["u3"]})


def test_a_saved_one_answers_as_before(fitted: fr.Fitted, tmp_path: Path) -> None:
    loaded = fr.load(fitted.save(tmp_path / "bundle"))
    raw = log(50, 5)
    np.testing.assert_array_equal(loaded.predict(raw), fitted.predict(raw))
    assert loaded.evaluate(raw) == fitted.evaluate(raw)
    with pytest.raises(ValueError, match="pass a table or a dataset"):
        loaded.evaluate()
    with pytest.raises(ValueError, match='fit with model="funnel"'):
        loaded.recommend("u1")


def test_embeddings_are_the_vectors_that_rows_are_made_of(fitted: fr.Fitted) -> None:
    users = fitted.embeddings()["user"]
    assert sorted(users["value"].to_list()) == sorted({f"u{u}" for u in range(30)})
    state = fitted.ranker.state_dict()["features.ids.tables.user.weight"]
    np.testing.assert_array_equal(users["vector"].to_numpy(), state[2:].numpy())


def test_two_labels_give_two_columns_for_a_ranker_that_publishes_one() -> None:
    fitted = fr.fit(log(400, 2), ["click", "bought"], {"name": "deepfm", "hidden": [8]}, training={"epochs": 1})
    p = fitted.predict(log(9, 3))
    assert p.shape == (9, 2)
    assert set(fitted.evaluate()) == {"click", "bought"}


def test_a_funnel_recommends_reports_and_is_the_same_when_loaded(funnel: fr.Fitted, tmp_path: Path) -> None:
    found = funnel.recommend(["u1", "never seen"], k=3)
    assert found.columns == ["user_id", "rank", "item_id", "value", "click"]
    assert found["rank"].to_list() == [1, 2, 3, 1, 2, 3]
    assert found["item_id"].is_in(range(40)).all()
    assert fr.load(funnel.save(tmp_path / "bundle")).recommend(["u1", "never seen"], k=3).equals(found)
    assert "recall" in funnel.evaluate()
    page = funnel.report(tmp_path / "new" / "report.html").read_text()
    assert "<svg" in page and "Normalized entropy" in page


def test_a_report_of_a_single_ranker(fitted: fr.Fitted, tmp_path: Path) -> None:
    page = fitted.report(tmp_path / "report.html").read_text()
    assert "<svg" in page and "Normalized entropy" in page and "final stage" not in page and "How it learnt" in page


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    table = log(300, 1)
    with pytest.raises(ValueError, match="no label found"):
        fr.fit(table.drop("click", "bought"))
    with pytest.raises(ValueError, match='ranker "dcn_v3" is unknown.*did you mean "dcn_v2"'):
        fr.fit(table, "click", "dcn_v3")
    with pytest.raises(ValueError, match="pass a FunnelConfig as model"):
        fr.fit(table, "click", "funnel", user_id="user", item_id="item", training={"epochs": 2})
    dataset = fr.Dataset.from_frame(table, label="click")
    with pytest.raises(ValueError, match="a dataset has its labels"):
        fr.fit(dataset, "click")
    with pytest.raises(ValueError, match="is not a bundle"):
        fr.load(tmp_path)


def test_names_are_those_of_the_long_way() -> None:
    from fullrank.data.dataset import Dataset
    from fullrank.training import Trainer

    assert fr.Dataset is Dataset and fr.Trainer is Trainer
    assert all(getattr(fr, name) is not None for name in fr.__all__)
    assert set(fr.__all__) <= set(dir(fr))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = fr.Nonsense


def test_new_rows_are_predicted_with_their_past_or_not_at_all() -> None:
    counter = {"kind": "numeric", "name": "clicks", "of": ["item"], "statistic": "count", "label": "clicked"}
    schema = Schema.model_validate(
        {
            "features": [{"kind": "categorical", "name": "item"}, counter],
            "labels": [{"name": "clicked"}],
            "keys": {"timestamp": "time"},
        }
    )
    rows = pl.DataFrame(
        {"item": [n % 3 for n in range(100)], "time": range(100), "clicked": [n % 2 for n in range(100)]}
    )
    fitted = fr.fit(rows, schema=schema, model="lr", training={"epochs": 1})
    with pytest.raises(ValueError, match='no column "clicks", which the import derived'):
        fitted.predict({"item": [1]})
    assert fitted.predict({"item": [1], "clicks": [3]}).shape == (1,)
