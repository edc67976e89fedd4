"""Facts about the funnel."""

from __future__ import annotations

import polars as pl
import pytest
import torch

from fullrank.batch import Batch, RowGather
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import Encoders
from fullrank.data.loader import batch_from_frame
from fullrank.funnel import Funnel, Request, StageSizes
from fullrank.funnel.catalogue import Catalogue, all_rows, usual_context, with_market


def copy_of(funnel: Funnel, sizes: StageSizes, value: str | None = None) -> Funnel:
    return funnel.with_parts(sizes=sizes, value=value or funnel.value.text)


def test_scores_are_those_of_the_final_model_on_the_rows_of_the_log(funnel: Funnel, dataset: Dataset) -> None:
    """What a request is scored with equals what the importer's encoding of the same raw row gives."""
    raw = dataset.scan("test").head(40).collect()
    with torch.inference_mode():
        expected = torch.sigmoid(funnel.final(batch_from_frame(raw, dataset.schema)).logits_BT)
    vocabulary = {name: v.values.to_list() for name, v in dataset.encoders.vocabularies.items()}

    def decoded(table: str, ids: list[int]) -> list[str | None]:
        return [None if i == 0 else "never seen" if i == 1 else vocabulary[table][i - 2] for i in ids]

    for row, line in enumerate(raw.iter_rows(named=True)):
        features: dict[str, object] = {}
        for feature in dataset.schema.categorical:
            if feature.role != "item":
                features[feature.name] = decoded(feature.table_name, [line[feature.name]])[0]
        features["history.item"] = decoded("item_id", line["history.item"])
        features["history.category"] = decoded("category", line["history.category"])
        # log1p is undone, to be done again.
        features["history.age"] = torch.tensor(line["history.age"], dtype=torch.float64).expm1().tolist()
        item = line["__item_id"]
        # The catalogue has the last seen price of an item, which never changes in this world.
        scored = funnel.score(Request(line["__user_id"], features), [item])[0]
        for task, name in enumerate(("click", "conversion", "hide")):
            assert scored.predictions[name] == pytest.approx(float(expected[row, task]), abs=2e-5)


def test_with_room_for_all_the_list_is_a_sort_by_the_final_stages_value(funnel: Funnel) -> None:
    wide = copy_of(funnel, StageSizes(retrieve=1000, keep=1000))
    names = [wide.items.ids[row] for row in wide.items.active_I.tolist()]
    for user in (1, 2, "stranger"):
        scored = wide.score(Request(user), names)
        best = sorted(scored, key=lambda item: -(item.value or 0))[:7]
        listed = wide.recommend([Request(user)], 7)[0].items
        assert [item.item_id for item in listed] == [item.item_id for item in best]
        assert [item.value for item in listed] == pytest.approx([item.value for item in best], abs=1e-6)


def test_the_value_is_the_formula_of_bid_and_probabilities(funnel: Funnel, dataset: Dataset) -> None:
    log = pl.concat([dataset.scan(split) for split in dataset.splits]).sort("__timestamp", maintain_order=True)
    bids = dict(log.group_by("__item_id").agg(pl.col("__bid").last()).collect().iter_rows())
    for item in funnel.recommend([Request(4)], 10)[0].items:
        expected = bids[item.item_id] * item.predictions["click"] - 0.1 * item.predictions["hide"]
        assert item.value == pytest.approx(expected, abs=1e-6)


def test_each_stage_passes_on_its_share(funnel: Funnel) -> None:
    answer = funnel.recommend([Request(3)], 10)[0]
    assert answer.candidates == {"retrieval": len(funnel.items), "early": 60, "final": 20}
    assert len(answer.items) == 10
    values = [item.value or 0.0 for item in answer.items]
    assert values == sorted(values, reverse=True)
    ranking = funnel.rank(funnel.encode([Request(3)]), 10)
    assert (
        set(ranking.items_UK[0].tolist()) <= set(ranking.kept_UC[0].tolist()) <= set(ranking.retrieved_UC[0].tolist())
    )


def test_k_beyond_the_catalogue_gives_every_active_item_once(funnel: Funnel) -> None:
    answer = funnel.recommend([Request(3)], 100_000)[0]
    assert sorted(str(item.item_id) for item in answer.items) == sorted(map(str, funnel.items.ids))


def test_what_is_seen_of_items_beforehand_holds_nothing_of_how_it_was_computed(funnel: Funnel) -> None:
    for made in (funnel, funnel.with_rankers(funnel.rankers), funnel.with_parts()):
        assert made.prepared and not any(seen.whole().requires_grad for _, seen in made.prepared.values())


def test_k_zero_is_refused(funnel: Funnel) -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        funnel.recommend([Request(3)], 0)


def test_many_requests_at_once_equal_one_by_one(funnel: Funnel, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(1), Request("stranger"), Request(2, {"device": 1}), Request(None, {"gender": 1}), Request(5)]
    together = funnel.recommend(requests, 5)
    monkeypatch.setattr("fullrank.funnel.funnel.PAIRS_AT_ONCE", 45)
    for chunked, whole in zip(funnel.recommend(requests, 5), together, strict=True):
        assert [item.item_id for item in chunked.items] == [item.item_id for item in whole.items]
    for request, expected in zip(requests, together, strict=True):
        alone = funnel.recommend([request], 5)[0]
        assert [item.item_id for item in alone.items] == [item.item_id for item in expected.items]
        assert [item.value for item in alone.items] == pytest.approx([item.value for item in expected.items], abs=1e-6)


def test_an_id_may_be_a_number_or_its_text(funnel: Funnel) -> None:
    assert funnel.recommend([Request(7)], 5) == funnel.recommend([Request("7")], 5)


def test_strangers_are_all_alike_until_they_say_something(funnel: Funnel) -> None:
    first, second, nobody = funnel.recommend([Request("a"), Request("b"), Request()], 5)
    assert first == second
    assert len(nobody.items) == 5
    known = next(row for row in funnel.users.ids if row is not None) if funnel.users else 0
    assert funnel.recommend([Request(known)], 5)[0] != first


def test_users_are_encoded_together_as_each_alone(funnel: Funnel) -> None:
    """Those that the catalogue has, and others, whose id the vocabulary may have or not, written in any way."""
    assert funnel.users is not None
    known = funnel.users.ids[:3]
    others: list[int | str] = [10**9, "nobody", " 7 ", "NA", "true", "x y", 3.0, "2"]  # type: ignore[list-item]
    for users in ([known[0], *others, *known], others, [*known, others[0]]):
        requests = [Request(user) for user in users]
        together, alone = funnel.encode(requests), Batch.cat([funnel.encode([request]) for request in requests])
        for one, other in zip(together.tensors(), alone.tensors(), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()) and len(together) == len(users)
        places = [feature.name for feature in funnel.schema.categorical]
        texts = pl.DataFrame({"user_id": [str(user) for user in users]})
        expected = funnel.encoders.transform(texts, allow_missing=True)["user_id"].to_list()
        assert together.ids_BF[:, places.index("user_id")].tolist() == expected


def test_a_new_history_changes_the_list(funnel: Funnel) -> None:
    history = {"history.item": [1, 2, 3], "history.category": [4, 4, 4], "history.age": [30.0, 20.0, 10.0]}
    before, after = funnel.recommend([Request("a"), Request("a", history)], 20)
    assert [i.predictions for i in before.items] != [i.predictions for i in after.items]


def test_unknown_items_are_scored_in_the_order_of_the_request(funnel: Funnel) -> None:
    names: list[int | str] = ["nothing", 5, "new", 9, 5]
    scored = funnel.score(Request(2), names)
    assert [item.item_id for item in scored] == names
    # a row's place in the batch may change the last bit of a matrix product
    assert scored[1].predictions == pytest.approx(scored[4].predictions, abs=1e-6)
    assert scored[0].predictions == pytest.approx(scored[2].predictions, abs=1e-6)
    alone = funnel.score(Request(2), [9])[0]
    assert scored[3].predictions == pytest.approx(alone.predictions, abs=1e-6)


def test_silence_about_the_context_means_the_usual_one(funnel: Funnel, dataset: Dataset) -> None:
    usual = dataset.scan("train").select(pl.col("device").mode().min()).collect().item()
    raw = dataset.encoders.vocabularies["device"].values[usual - 2]
    silent, told = funnel.score(Request(2), [5])[0], funnel.score(Request(2, {"device": int(raw)}), [5])[0]
    assert silent.predictions == pytest.approx(told.predictions, abs=1e-6)
    assert usual_context(dataset)["device"].item() == usual


def test_a_value_that_is_no_number_is_not_recommended(funnel: Funnel) -> None:
    odd = copy_of(funnel, StageSizes(), "bid / (bid - bid)")
    assert odd.recommend([Request(1)], 5)[0].items == []
    assert odd.score(Request(1), [5])[0].value is None


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"devise": 1}, 'unknown feature "devise"; expected one of user_id, age_group'),
        ({"price": 1.0}, '"price" is a feature of items'),
        ({"device": [1]}, r'feature "device" is \[1\], expected one text or number'),
        ({"device": {"a": 1}}, r'feature "device" is \{'),
        ({"history.item": [1]}, '"history.item" is given without "history.category"'),
        ({"history.item": 1, "history.category": 1, "history.age": 1}, 'feature "history.item" is 1, expected a list'),
        ({"history.item": [1], "history.category": [1, 2], "history.age": [1.0]}, "history"),
        ({"history.item": [1], "history.category": [1], "history.age": ["x"]}, "history.age"),
    ],
)
def test_a_wrong_feature_is_named(funnel: Funnel, features: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        funnel.recommend([Request(1, features)], 3)
    assert "\n" not in str(caught.value)


def test_a_catalogue_holds_the_last_seen_features_and_marks_what_was_not_shown_lately(dataset: Dataset) -> None:
    items = with_market(all_rows(dataset, "item"), dataset, active_days=1.0)
    log = pl.concat([dataset.scan(split) for split in dataset.splits]).collect()
    newest = log["__timestamp"].max()
    assert isinstance(newest, int)
    recent = set(log.filter(pl.col("__timestamp") >= newest - 86_400)["__item_id"].to_list())
    assert set(items.filter(pl.col("__active"))["__item_id"].to_list()) == recent
    assert 0 < len(recent) < items.height == log["__item_id"].n_unique()
    users = all_rows(dataset, "user")
    last = log.sort("__timestamp", maintain_order=True).group_by("__user_id").agg(pl.col("history.item").last())
    joined = users.join(last, on="__user_id", suffix="_last")
    assert joined["history.item"].to_list() == joined["history.item_last"].to_list()


def test_a_catalogue_refuses_an_id_twice(dataset: Dataset) -> None:
    items = dataset.catalogue("item")
    with pytest.raises(ValueError, match='an id twice in column "__item_id"'):
        Catalogue.of(pl.concat([items, items[:1]]), dataset.schema)


def test_remembered_codes_equal_fresh_ones(funnel: Funnel, dataset: Dataset) -> None:
    """The memory of scalar codes keeps values apart that Python calls equal."""
    encode, fresh = funnel.encode, Encoders.load(dataset.path / "encoders")
    for value in (1, 1.0, "1", 0, "0", "x"):
        row = RowGather(encode([Request("s", {"device": value})])).batch
        column = [feature.name for feature in dataset.schema.categorical].index("device")
        expected = fresh.transform(pl.DataFrame({"device": [value]}), allow_missing=True)["device"][0]
        assert int(row.ids_BF[0, column]) == expected
