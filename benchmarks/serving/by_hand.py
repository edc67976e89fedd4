"""The funnel as one writes it by hand around the same weights: FAISS, NumPy and eager PyTorch on batches of pairs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from pydantic import BaseModel

from fullrank.batch import Batch
from fullrank.funnel import load_bundle
from fullrank.retrieval import TwoTower

LINKS, BUILD, SEARCH = 32, 100, 400
INDEX = "hnsw.faiss"


class Question(BaseModel):
    """Body of a request."""

    user_id: int
    k: int = 10


class Entry(BaseModel):
    """Entry of a list."""

    item_id: int
    value: float
    click: float


def build_index(bundle: Path, out: Path) -> None:
    """FAISS' graph over the vectors of a bundle's items, in a file."""
    retriever = load_bundle(bundle).retriever
    assert isinstance(retriever, TwoTower)
    vectors = retriever.vectors.contents()[1].numpy()
    index = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD
    index.add(vectors)
    faiss.write_index(index, str(out))


class Pipeline:
    """Three stages, or two where the first hands on no more than the last takes."""

    def __init__(self, bundle: Path) -> None:
        self.funnel = funnel = load_bundle(bundle)
        assert isinstance(funnel.retriever, TwoTower) and funnel.users is not None and funnel.items.bid_I is not None
        self.retriever, self.schema = funnel.retriever, funnel.schema
        self.index = faiss.read_index(str(bundle.parent / INDEX))
        self.retrieve = funnel.sizes.retrieve
        self.index.hnsw.efSearch = max(SEARCH, self.retrieve)
        items = funnel.items.rows.batch
        self.numbers, self.ids = items.numeric_BN.numpy(), items.ids_BF.numpy()
        self.bids, self.names = funnel.items.bid_I.numpy(), np.array(funnel.items.ids)
        self.from_item = np.array([feature.role == "item" for feature in self.schema.categorical])
        self.users = {name: funnel.users.rows.take(torch.tensor([row])) for row, name in enumerate(funnel.users.ids)}
        self.stranger = funnel.encode.stranger

    def recall(self, users: int = 200) -> dict[str, float]:
        """Share of the best items by the exact inner product that the graph, and the bundle's own index, find."""
        queries = torch.cat([self.retriever.user_vectors(row) for row in list(self.users.values())[:users]])
        keys_I, vectors_ID = self.retriever.vectors.contents()
        exact = keys_I[(queries @ vectors_ID.T).topk(self.retrieve, 1).indices].numpy()
        found = {
            "peers": keys_I.numpy()[self.index.search(queries.numpy(), self.retrieve)[1]],
            "fullrank": self.retriever.vectors.search(queries, self.retrieve).item_keys_BK.numpy(),
        }
        return {
            name: float(np.mean([len(set(a) & set(b)) / self.retrieve for a, b in zip(rows, exact, strict=True)]))
            for name, rows in found.items()
        }

    @torch.no_grad()
    def recommend(self, questions: Sequence[Question]) -> list[list[Entry]]:
        users = [self.users.get(question.user_id, self.stranger) for question in questions]
        queries = torch.cat([self.retriever.user_vectors(user) for user in users]).numpy()
        _, found = self.index.search(queries, self.retrieve)
        rows = [row[row >= 0] for row in found]
        keep = self.funnel.sizes.keep
        if self.retrieve > keep:
            click = self.click(self.funnel.early["early"], users, rows)
            rows = [row[np.argsort(-p * self.bids[row])[:keep]] for row, p in zip(rows, click, strict=True)]
        answers = []
        final = self.click(self.funnel.final, users, rows)
        for question, row, p in zip(questions, rows, final, strict=True):
            value = p * self.bids[row]
            best = np.argsort(-value)[: question.k]
            answers.append(
                [Entry(item_id=int(self.names[row[i]]), value=float(value[i]), click=float(p[i])) for i in best]
            )
        return answers

    def click(self, model: Any, users: list[Batch], rows: list[Any]) -> list[Any]:
        """Probabilities of each user's rows, in one pass."""
        pairs = Batch.cat([self.pairs(user, row) for user, row in zip(users, rows, strict=True)])
        scores = torch.sigmoid(model(pairs).logits_BT[:, 0]).numpy()
        return np.split(scores, np.cumsum([len(row) for row in rows])[:-1])

    def pairs(self, user: Batch, rows: Any) -> Batch:
        count = len(rows)
        events = torch.split(user.jagged_values, user.jagged_lengths_KB[:, 0].tolist())
        return Batch(
            numeric_BN=torch.from_numpy(self.numbers[rows]),
            ids_BF=torch.from_numpy(np.where(self.from_item, self.ids[rows], user.ids_BF.numpy())),
            jagged_keys=user.jagged_keys,
            jagged_values=torch.cat([part.repeat(count) for part in events]),
            jagged_lengths_KB=user.jagged_lengths_KB.repeat(1, count),
            event_keys=user.event_keys,
            event_values=user.event_values.repeat(count),
            event_lengths_EB=user.event_lengths_EB.repeat(1, count),
            labels_BT=torch.zeros(count, len(self.schema.labels)),
        )


def main() -> None:
    """A FastAPI server of a bundle."""
    import uvicorn
    from fastapi import FastAPI

    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    pipeline, app = Pipeline(arguments.bundle), FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.get("/recall")
    def recall() -> dict[str, float]:
        return pipeline.recall()

    @app.post("/v1/recommend")
    def recommend(question: Question) -> list[Entry]:
        return pipeline.recommend([question])[0]

    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
