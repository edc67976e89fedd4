"""Tables whose ids come and go, against a dictionary."""

# Shapes: N ids, D width.

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fullrank.batch import Batch
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer, Tables
from fullrank.embeddings.admitted import NO_ID, AdmittedTable
from fullrank.embeddings.id_map import NO_ROW, IdMap
from fullrank.models import MODELS
from fullrank.schema import OUT_OF_VOCABULARY_ID, RAW_IDS, Categorical, Label, MultiCategorical, Schema
from fullrank.training import Trainer, TrainerConfig

SCHEMA = Schema(
    features=(
        Categorical(name="item", encoding="raw"),
        Categorical(name="city", num_embeddings=5),
        MultiCategorical(name="liked", table="item", encoding="raw"),
    ),
    labels=(Label(name="y"),),
)


def a_table(**settings: Any) -> AdmittedTable:
    return AdmittedTable(RAW_IDS, 4, 0.1, AdmittedTable.Config(**{"dropout": 0.0, **settings}))


def a_batch(ids_N: Tensor, bags: Tensor | None = None) -> Batch:
    rows = len(ids_N)
    bags = torch.zeros(0, dtype=torch.int64) if bags is None else bags
    lengths = torch.zeros(1, rows, dtype=torch.int64)
    lengths[0, 0] = bags.numel()
    return Batch(
        numeric_BN=torch.zeros(rows, 0),
        ids_BF=torch.stack([ids_N, ids_N % 5], 1),
        jagged_keys=("liked",),
        jagged_values=bags,
        jagged_lengths_KB=lengths,
        event_keys=(),
        event_values=torch.zeros(0),
        event_lengths_EB=torch.zeros(0, rows, dtype=torch.int64),
        labels_BT=(ids_N % 2).float()[:, None],
    )


def a_collection(kind: str, **settings: Any) -> EmbeddingCollection:
    torch.manual_seed(0)
    config = AdmittedTable.Config(**{"dropout": 0.0, "capacity": 8, **settings})
    tables = Tables(embedding_dim=4, init_std=0.5, kinds={"item": config})
    return EmbeddingCollection(
        SCHEMA,
        tables,
        optimizer=EmbeddingOptimizer(kind=kind, learning_rate=0.1),  # type: ignore[arg-type]
    )


def stream(seed: int, steps: int, births: int = 6, size: int = 24) -> list[Tensor]:
    """Batches of ids that are popular for a while: those of a window that moves on, low ones more often."""
    random = np.random.default_rng(seed)
    return [torch.from_numpy((random.geometric(0.15, size) + births * step // 4) * 10**15 + 7) for step in range(steps)]


def test_the_map_is_a_dictionary() -> None:
    random = np.random.default_rng(1)
    ids_R = torch.full((300,), NO_ID, dtype=torch.int64)
    found, expected = IdMap(ids_R, torch.zeros(0, dtype=torch.int64)), dict[int, int]()
    for _ in range(400):
        if expected:
            gone = random.choice(
                list(expected), min(len(expected), int(random.integers(0, 60))), replace=False
            ).tolist()
            rows = torch.tensor([expected.pop(one) for one in gone], dtype=torch.int64)
            found.remove(rows)
            ids_R[rows] = NO_ID
        ids = np.unique(random.integers(0, 500, 80) << 44)
        free = (ids_R == NO_ID).nonzero().squeeze(1)
        new = [one for one in ids.tolist() if one not in expected][: free.numel()]
        ids_R[free[: len(new)]] = torch.tensor(new, dtype=torch.int64)
        found.add(free[: len(new)])
        expected.update(zip(new, free.tolist(), strict=False))
        asked = torch.from_numpy(random.integers(0, 500, 200) << 44)
        assert found.rows(asked).tolist() == [expected.get(one, NO_ROW) for one in asked.tolist()]


@pytest.mark.parametrize("settings", [{"evict": "lfu", "half_life": 5}, {"evict": "ttl", "ttl": 3}, {"evict": "none"}])
def test_ids_have_the_rows_that_a_plain_program_would_give_them(settings: dict[str, Any]) -> None:
    capacity, after = 12, 3
    table = a_table(capacity=capacity, admit_after=after, **settings)
    table.sketch_HC = torch.zeros(4, 1 << 16, dtype=torch.uint8)  # so wide that it counts exactly
    table._counters = 1 << 16
    row_of: dict[int, int] = {}
    counts, waiting, seen = Counter[int](), Counter[int](), dict[int, int]()
    gone_in_all: list[int] = []
    for step, ids in enumerate(stream(2, 60), 1):
        if settings.get("half_life") and step % settings["half_life"] == 0:
            counts = Counter({one: count // 2 for one, count in counts.items()})
            waiting = Counter({one: count // 2 for one, count in waiting.items()})
        now = Counter(ids.tolist())
        for one, count in now.items():
            if one in row_of:
                counts[one] += count
                seen[one] = step
            else:
                waiting[one] += count
        ripe = sorted(
            (one for one in now if one not in row_of and waiting[one] >= after), key=lambda one: (-waiting[one], one)
        )
        for one in ripe:
            taken = set(row_of.values())
            row = next((row for row in range(2, capacity + 2) if row not in taken), None)
            if row is None:
                score = seen if settings["evict"] == "ttl" else counts
                bar = step - settings["ttl"] if settings["evict"] == "ttl" else waiting[one]
                idle = [other for other in row_of if seen[other] < step and score[other] < bar]
                if settings["evict"] == "none" or not idle:
                    continue
                other = min(idle, key=lambda each: (score[each], row_of[each]))
                row = row_of.pop(other)
                gone_in_all.append(other)
            row_of[one], counts[one], seen[one] = row, waiting[one], step
        looked_up, fresh = table.learn(ids)
        assert torch.equal(looked_up, ids)
        live = {int(one): row for row, one in enumerate(table.ids_R.tolist()) if one != NO_ID}
        assert live == row_of
        expected = [row_of.get(one, OUT_OF_VOCABULARY_ID) for one in ids.tolist()]
        assert table.asks(ids)[0].rows.tolist() == expected
        assert all(table.ids_R[row] != NO_ID for each in fresh for row in each.rows.tolist())
    assert [one for _, ids in table.take_evicted() for one in ids.tolist()] == gone_in_all
    assert table.totals.tolist()[3] == len(gone_in_all)
    assert (len(gone_in_all) > 5) == (settings["evict"] != "none")


def test_an_id_is_out_of_vocabulary_until_it_was_seen_often_enough() -> None:
    collection = a_collection("row_wise_adagrad", admit_after=3).train()
    ids = torch.tensor([10**18, 5])
    for times in (1, 2, 3):
        before = collection.vectors("item", ids)[0].clone()
        assert torch.equal(before, collection.vectors("item", torch.tensor([OUT_OF_VOCABULARY_ID]))[0])
        first = collection(a_batch(ids)).flat[0, :4].detach()
        assert torch.equal(first, before)  # a row of its own begins as what it was before
        assert collection.kinds["item"].live_ids().numel() == (2 if times == 3 else 0)  # type: ignore[operator]
    collection(a_batch(ids)).flat.square().sum().backward()
    assert not torch.equal(collection.vectors("item", ids)[0], before)


@pytest.mark.parametrize("kind", ["adagrad", "row_wise_adagrad", "adam"])
def test_a_row_that_is_given_away_loses_values_and_optimiser_state(kind: str) -> None:
    collection = a_collection(kind, capacity=2, admit_after=1).train()
    old, new = torch.tensor([70, 71]), torch.tensor([80, 80, 80, 81])
    for _ in range(3):
        collection(a_batch(old[:1].repeat(1))).flat.square().sum().backward()
        collection.kinds["item"].counts_R.clamp_max_(1)  # type: ignore[union-attr]
    collection(a_batch(old[1:])).flat.square().sum().backward()
    place = collection.layout.places["item"][0]
    buffer = collection.buffers_[place.buffer]
    assert all(bool((state[place.rows][2:4] != 0).any()) for state in buffer.states.values())
    unknown = collection.vectors("item", torch.tensor([OUT_OF_VOCABULARY_ID]))
    collection(a_batch(new))  # 80 was seen more often than both, 81 as often
    assert [ids.tolist() for _, ids in collection.kinds["item"].take_evicted()] == [[70]]  # type: ignore[operator]
    assert torch.equal(collection.vectors("item", new[:1]), unknown)
    row = int(collection.kinds["item"].asks(new)[0].rows[0])  # type: ignore[operator]
    assert all(not bool(state[place.rows][row].any()) for state in buffer.states.values())
    assert torch.equal(collection.vectors("item", old[:1]), unknown)


def test_the_dense_optimiser_forgets_a_row_that_is_given_away() -> None:
    torch.manual_seed(0)
    model = MODELS["dlrm"].from_config(
        SCHEMA,
        {"embedding_dim": 4, "hidden": [4], "bottom_hidden": [4], "tables": {"item": {"kind": "admitted", "capacity": 2,
         "admit_after": 1, "dropout": 0.0}}},
    )  # fmt: skip
    trainer = Trainer(TrainerConfig(batch_size=4, patience=0))
    first, second = torch.tensor([70, 70, 71, 71]), torch.tensor([80, 80, 80, 2])
    trainer.fit(model, [a_batch(first)] * 5)
    moments = next(
        state for name, state in trainer.engine.optimizer.state.items()  # type: ignore[attr-defined]
        if "buffers_" in name and len(state["exp_avg_sq"]) == 4 + 5
    )  # fmt: skip
    of_one_gradient = (moments["exp_avg"].square() / moments["exp_avg_sq"]).isclose(torch.tensor(10.0))
    assert not of_one_gradient[2:4].any()
    table = next(module for module in model.modules() if isinstance(module, AdmittedTable))
    table.counts_R.clamp_max_(1)
    row = int(table.asks(torch.tensor([70]))[0].rows[0])
    trainer.fit(model, [a_batch(second)], warm_start=True)
    assert table.live_ids().tolist()[row - 2] == 80
    # (0.1 g)² over 0.001 g².
    torch.testing.assert_close(moments["exp_avg"][row].square() / moments["exp_avg_sq"][row], torch.full((4,), 10.0))


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "row_wise_adagrad", "adam"])
def test_with_room_for_all_it_is_a_plain_table(kind: str) -> None:
    admitted = a_collection(kind, capacity=64, admit_after=1, evict="none").train()
    torch.manual_seed(0)
    small = Schema(
        features=(
            Categorical(name="item", num_embeddings=66),
            Categorical(name="city", num_embeddings=5),
            MultiCategorical(name="liked", table="item", num_embeddings=66),
        ),
        labels=(Label(name="y"),),
    )
    optimizer = EmbeddingOptimizer(kind=kind, learning_rate=0.1)  # type: ignore[arg-type]
    plain = EmbeddingCollection(small, Tables(embedding_dim=4, init_std=0.5), optimizer=optimizer).train()
    state = admitted.state_dict()
    rows = state["tables.item.rows.weight"]
    with torch.no_grad():
        start = torch.cat([rows[:2], rows[1:2].expand(64, -1)])
        plain.load_state_dict({"tables.item.weight": start, "tables.city.weight": state["tables.city.weight"].clone()})
    number: dict[int, int] = {}
    random = np.random.default_rng(3)
    for _ in range(20):
        raw = random.integers(0, 40, 16) * 10**12 + 2
        bag = random.integers(0, 40, 5) * 10**12 + 2
        for one in (*raw.tolist(), *bag.tolist()):
            number.setdefault(one, len(number) + 2)
        batch = a_batch(torch.from_numpy(raw), torch.from_numpy(bag))
        own = torch.tensor([number[one] for one in raw.tolist()])
        same = a_batch(own, torch.tensor([number[one] for one in bag.tolist()]))
        same.ids_BF[:, 1] = batch.ids_BF[:, 1]
        for collection, fed in ((admitted, batch), (plain, same)):
            collection(fed).flat.sin().sum().backward()
    ids = torch.tensor(list(number))
    expected = plain.vectors("item", torch.tensor(list(number.values())))
    torch.testing.assert_close(admitted.vectors("item", ids), expected, rtol=0, atol=0)


def test_a_full_table_says_the_same_in_training_and_in_serving_and_evaluation_moves_nothing() -> None:
    collection = a_collection("row_wise_adagrad", capacity=3, admit_after=1, evict="none").train()
    ids = torch.tensor([11, 12, 13, 14, 15])
    collection(a_batch(ids)).flat.sum().backward()
    trained = collection(a_batch(ids)).flat.detach()
    state = {name: value.clone() for name, value in collection.state_dict().items()}
    served = collection.eval()(a_batch(ids)).flat
    assert torch.equal(trained, served)
    collection(a_batch(torch.arange(100, 140)))
    assert all(torch.equal(value, state[name]) for name, value in collection.state_dict().items())
    assert torch.equal(served[3, :4], collection.vectors("item", torch.tensor([OUT_OF_VOCABULARY_ID]))[0])
    collection.train().requires_grad_(False)
    collection(a_batch(torch.arange(100, 140)))
    assert all(torch.equal(value, state[name]) for name, value in collection.state_dict().items())


def test_drop_out_of_ids_trains_the_row_of_unknown_ones() -> None:
    table = a_table(capacity=50, admit_after=1, dropout=0.25)
    ids = torch.arange(2, 42).repeat(100)
    torch.manual_seed(1)
    looked_up, _ = table.learn(torch.cat([ids, torch.zeros(5, dtype=torch.int64)]))
    dropped = looked_up[: ids.numel()] == OUT_OF_VOCABULARY_ID
    assert 0.22 < float(dropped.float().mean()) < 0.28
    assert torch.equal(looked_up[: ids.numel()][~dropped], ids[~dropped])
    assert looked_up[ids.numel() :].tolist() == [0] * 5  # what is missing stays missing
    assert table.live_ids().numel() == 40


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match='table "item": its ids are raw, and a table cannot have a row for each'):
        EmbeddingCollection(SCHEMA, Tables())
    for settings in ({"evict": "ttl"}, {"ttl": 3}, {"capacity": 0}, {"admit_after": 256}, {"dropout": 1.0}):
        with pytest.raises(ValidationError):
            a_table(**{"capacity": 3, **settings})
    table = a_table(capacity=4, admit_after=1)
    table.learn(torch.tensor([5, 6, 7]))
    for place, value, said in (
        (3, 5, "same id"),
        (4, NO_ID, "damaged"),
        (3, RAW_IDS, "expected 2 to"),
        (0, 9, "damag"),
    ):
        state = {name: tensor.clone() for name, tensor in table.state_dict().items()}
        state["ids_R"][place] = value
        with pytest.raises(ValueError, match=said):
            a_table(capacity=4, admit_after=1).load_state_dict(state)
    again = a_table(capacity=4, admit_after=1)
    again.load_state_dict(table.state_dict())
    assert again.asks(torch.tensor([7, 5, 8]))[0].rows.tolist() == [4, 2, 1]


def test_a_model_with_a_linear_term_has_raw_ids_in_both() -> None:
    kinds = {"item": {"kind": "admitted", "capacity": 5}}
    for name in ("deepfm", "dcn_v2", "wukong"):
        model = MODELS[name].from_config(SCHEMA, {"tables": kinds})
        for module in model.modules():
            if isinstance(module, EmbeddingCollection):
                assert isinstance(module.kinds["item"], AdmittedTable)
