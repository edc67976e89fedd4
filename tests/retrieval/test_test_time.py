"""Facts about training on the nodes of recent items."""

from __future__ import annotations

import pytest
import torch

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.retrieval import Items
from fullrank.retrieval.hierarchy.hsnn import HSNN
from fullrank.retrieval.hierarchy.test_time import Events, TestTimeTrainer

CUT = 1000.0
SIZES = {"user_vectors": 2, "vector_dim": 8, "hidden": (16,), "over_arch_hidden": (8,)}


@pytest.fixture(scope="module")
def fitted(dataset: Dataset, items: Items) -> HSNN:
    config = HSNN.Config(
        items=SIZES,
        nodes=(SIZES,),
        tree={"num_nodes": (4, 3)},
        beam=(4, 12),
        exact_below=0,
        training={"batch_size": 64, "epochs": 2, "negatives": 16, "learning_rate": 0.02, "node_objective": "bce"},
    )
    retriever = HSNN(dataset.schema, config).fit(dataset)
    retriever.index(items)
    return retriever


@pytest.fixture
def events(fitted: HSNN, items: Items) -> Events:
    """Before the cut each user has ten items, most of them under one leaf; after it, anything."""
    generator = torch.Generator().manual_seed(0)
    leaf = (fitted.codes(fitted.network.stored(items.features)) * torch.tensor([3, 1])).sum(1)
    largest = torch.bincount(leaf).topk(2).indices
    users, keys, times = [], [], []
    for user in range(12):
        own = items.keys_I[leaf == largest[user % 2]]
        near = own[torch.randint(0, len(own), (8,), generator=generator)]
        far = items.keys_I[torch.randint(0, 30, (2 + 5,), generator=generator)]
        users += [user] * 15
        keys += [*near.tolist(), *far.tolist()]
        times += [*range(10), *range(1000, 1005)]
    return Events(torch.tensor(users), torch.tensor(keys), torch.tensor(times))


def state_of(retriever: HSNN) -> dict[str, torch.Tensor]:
    assert retriever.hierarchy is not None
    index = {f"index.{name}": value for name, value in retriever.hierarchy.state().items()}
    return {name: value.clone() for name, value in {**retriever.network.state_dict(), **index}.items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_positive_nodes_have_the_share_of_a_users_items_that_is_asked_for(
    fitted: HSNN, events: Events, users: Batch, items: Items
) -> None:
    trainer = TestTimeTrainer(fitted, interest_rate=(0.4, 0.8), guard=False)
    pairs, held_out = trainer.build_pairs(users, events, CUT)
    assert len(held_out) == 0
    codes = fitted.codes(fitted.network.stored(items.features))
    found = 0
    for level, user, node, label in zip(
        pairs.level_P.tolist(), pairs.user_P.tolist(), pairs.codes_PN, pairs.label_P.tolist(), strict=True
    ):
        own = events.key_E[(events.user_E == user) & (events.time_E < CUT)]
        share = float((codes[own][:, : level + 1] == node[: level + 1]).all(1).float().mean())
        assert share >= (0.8 if level == 0 else 0.4) if label else share == 0
        found += int(label)
    assert found > 12
    positives = int(pairs.label_P.sum())
    assert positives < len(pairs) - positives <= 4 * positives


def test_what_comes_after_the_cut_changes_nothing(fitted: HSNN, events: Events, users: Batch) -> None:
    later = (events.time_E >= CUT).nonzero().squeeze(1)
    mixed = events.key_E.clone()
    mixed[later] = events.key_E[later[torch.randperm(len(later))]]
    other = Events(events.user_E, mixed, events.time_E)
    for one, two in zip(
        TestTimeTrainer(fitted).build_pairs(users, events, CUT),
        TestTimeTrainer(fitted).build_pairs(users, other, CUT),
        strict=True,
    ):
        for name in ("level_P", "user_P", "codes_PN", "label_P"):
            assert torch.equal(getattr(one, name), getattr(two, name))


def test_only_the_networks_of_nodes_learn_and_it_can_be_undone(fitted: HSNN, events: Events, users: Batch) -> None:
    before = state_of(fitted)
    trainer = TestTimeTrainer(fitted, guard=False)
    for _ in range(2):
        report = trainer.adapt(trainer.build_pairs(users, events, CUT))
        assert report.pairs > 20 and report.kept
        moved = changed(before, state_of(fitted))
        assert moved and all(name.startswith("node_networks.") for name in moved)
        trainer.rollback()
        assert not changed(before, state_of(fitted))
    assert fitted.search(users, 3).found_BK.all()  # the index is not stale


@pytest.mark.parametrize("options", [{"depth": 0}, {"interest_rate": (1.01,)}])
def test_without_pairs_nothing_changes(options: dict[str, object], fitted: HSNN, events: Events, users: Batch) -> None:
    before = state_of(fitted)
    trainer = TestTimeTrainer(fitted, **options)  # type: ignore[arg-type]
    report = trainer.adapt(trainer.build_pairs(users, events, CUT))
    assert report.pairs == 0 and not changed(before, state_of(fitted))


def test_the_guard_keeps_what_helps_and_refuses_shuffled_labels(fitted: HSNN, events: Events, users: Batch) -> None:
    before = state_of(fitted)
    trainer = TestTimeTrainer(fitted, lr_scale=1.0, interest_rate=(0.3, 0.3))
    learn, judge = trainer.build_pairs(users, events, CUT)
    report = trainer.adapt((learn, judge))
    assert report.kept and report.after is not None and report.before is not None and report.after < report.before
    trainer.rollback()
    wrong = type(learn)(learn.users, learn.level_P, learn.user_P, learn.codes_PN, 1 - learn.label_P)
    report = trainer.adapt((wrong, judge))
    assert not report.kept and report.after > report.before  # type: ignore[operator]
    assert not changed(before, state_of(fitted))


def test_bad_input_is_named(fitted: HSNN, dataset: Dataset, events: Events, users: Batch) -> None:
    with pytest.raises(ValueError, match="depth -1"):
        TestTimeTrainer(fitted, depth=-1)
    with pytest.raises(ValueError, match="needs the items to be indexed"):
        TestTimeTrainer(HSNN(dataset.schema)).build_pairs(users, events, CUT)
