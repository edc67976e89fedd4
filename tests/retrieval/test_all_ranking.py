"""All-ranking evaluation against a plain loop over users, and ranked NDCG against NDCG of scores."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import polars as pl
import pytest
import torch

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.metrics import ndcg_at_k, ranked_ndcg_at_k, recall_at_k
from fullrank.retrieval import Items, Popularity, SearchResult, all_ranking
from fullrank.retrieval.all_ranking import evaluate_all_ranking, training_items
from fullrank.schema import Categorical, Keys, Label, Schema

USERS, ITEMS = 23, 60


class Noise(Popularity):
    """A fixed random score of each user for each item, with ties."""

    name = "noise"

    @staticmethod
    def score(user: int, item: int) -> int:
        return (user * 7919 + item * 104729) % 31

    def search(self, users: Batch, k: int, *, allowed: torch.Tensor | None = None) -> SearchResult:
        keys_I = self.exact.keys_I
        scores_BI = torch.tensor([[self.score(u, i) for i in keys_I.tolist()] for u in users.ids_BF[:, 0].tolist()])
        order_BK = scores_BI.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return SearchResult(keys_I[order_BK], scores_BI.gather(1, order_BK).float(), torch.zeros(len(users)))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    features = (Categorical(name="user", role="user"), Categorical(name="item", role="item"))
    schema = Schema(features=features, labels=(Label(name="like"),), keys=Keys(user_id="user", item_id="item"))
    generator = torch.Generator().manual_seed(0)

    def rows(count: int, first_user: int) -> pl.DataFrame:
        user = torch.randint(first_user, USERS, (count,), generator=generator)
        item = torch.randint(ITEMS, (count,), generator=generator)
        like = torch.rand(count, generator=generator) < 0.7
        return pl.DataFrame({"user": user.numpy(), "item": item.numpy(), "like": like.int().numpy()})

    # User 22 has likes in the test part alone; pairs repeat, within a part and between the parts.
    train = rows(400, 0).filter(pl.col("user") != USERS - 1)
    parts = {"train": [train], "test": [rows(150, 5)]}
    return write_dataset(tmp_path_factory.mktemp("all_ranking") / "log", schema, parts)


@pytest.fixture(scope="module")
def noise(log: Dataset) -> Noise:
    retriever = Noise(log.schema)
    retriever.index(training_items(log))
    return retriever


def likes(log: Dataset, split: str) -> dict[int, set[int]]:
    found = defaultdict(set)
    for user, item, like in log.scan(split).select("__user_id", "__item_id", "like").collect().iter_rows():
        if like == 1:
            found[user].add(item)
    return found


@pytest.mark.parametrize("at_once", [4, 512])
def test_it_is_a_loop_over_users(log: Dataset, noise: Noise, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_ranking, "USERS_AT_ONCE", at_once)
    taken, wanted = likes(log, "train"), likes(log, "test")
    ids = {name: place + 2 for place, name in enumerate(log.encoders.vocabularies["user"].values.to_list())}
    indexed = sorted(noise.exact.keys_I.tolist())
    recalls, ndcgs = [], []
    for user in wanted:
        relevant = wanted[user] - taken[user]
        if not relevant:
            continue
        code = ids.get(str(user), 1)
        ranked = sorted((i for i in indexed if i not in taken[user]), key=lambda i: (-noise.score(code, i), i))[:7]
        recalls.append(len(relevant & set(ranked)) / len(relevant))
        gained = sum(1 / math.log2(place + 2) for place, item in enumerate(ranked) if item in relevant)
        ndcgs.append(gained / sum(1 / math.log2(place + 2) for place in range(min(7, len(relevant)))))
    found = evaluate_all_ranking(noise, log, ks=(7,))
    assert 15 <= found["users"] == len(recalls)
    assert found["recall_at_7"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-12)
    assert found["ndcg_at_7"] == pytest.approx(sum(ndcgs) / len(ndcgs), abs=1e-12)


def test_an_item_that_is_not_indexed_is_wanted_and_never_found(log: Dataset, noise: Noise) -> None:
    before = evaluate_all_ranking(noise, log, ks=(ITEMS,))
    assert before["recall_at_60"] == 1.0
    items = training_items(log)
    fewer = Noise(log.schema)
    fewer.index(Items(items.keys_I[:30], items.features[:30]))
    after = evaluate_all_ranking(fewer, log, ks=(ITEMS,))
    assert after["users"] == before["users"] and 0.3 < after["recall_at_60"] < 0.7


def test_a_log_without_users_to_judge_by_is_refused(log: Dataset, noise: Noise) -> None:
    with pytest.raises(ValueError, match='no user has an item in "train" that is not in training'):
        evaluate_all_ranking(noise, log, "train")
    strangers = log.schema.model_copy(update={"keys": replace_keys(log.schema)})
    nobody = Dataset.open(Path(log.path))
    nobody.schema = strangers
    with pytest.raises(ValueError, match="needs a user_id among the schema's keys"):
        evaluate_all_ranking(noise, nobody)


def replace_keys(schema: Schema) -> Keys:
    return schema.keys.model_copy(update={"user_id": None})


@pytest.mark.parametrize("k", [1, 5, 20, 40])
def test_metrics_of_lists_of_ids(k: int) -> None:
    """Where all candidates are listed, ranked NDCG is NDCG of scores; ranx gives the same, where it is there."""
    generator = torch.Generator().manual_seed(1)
    scores_BN = torch.rand(30, 40, generator=generator)
    gains_BN = (torch.rand(30, 40, generator=generator) < torch.rand(30, 1, generator=generator)).float()
    gains_BN[:, 0] = 1
    ranked_BK = scores_BN.argsort(dim=1, descending=True)
    relevant_BR = torch.where(gains_BN > 0, torch.arange(40), -1)
    found = ranked_ndcg_at_k(ranked_BK, relevant_BR, k)
    assert found == pytest.approx(ndcg_at_k(scores_BN, gains_BN, k), abs=1e-12)
    # What is beyond the end of a list, and an id that stands there twice, gain nothing.
    short_BK = torch.cat([ranked_BK[:, :5], ranked_BK[:, :5], torch.full((30, 3), -1)], 1)
    assert ranked_ndcg_at_k(short_BK, relevant_BR, k) == pytest.approx(
        ranked_ndcg_at_k(ranked_BK[:, :5], relevant_BR, k), abs=1e-12
    )
    ranx = pytest.importorskip("ranx")
    qrels = {str(b): {str(i): 1 for i in range(40) if gains_BN[b, i]} for b in range(30)}
    run = {str(b): {str(i): float(scores_BN[b, i]) for i in range(40)} for b in range(30)}
    theirs = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), [f"recall@{k}", f"ndcg@{k}"])
    assert recall_at_k(ranked_BK, relevant_BR, k) == pytest.approx(theirs[f"recall@{k}"], abs=1e-6)
    assert found == pytest.approx(theirs[f"ndcg@{k}"], abs=1e-6)
