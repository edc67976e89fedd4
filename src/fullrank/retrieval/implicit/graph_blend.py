"""The graph filter and learnt vectors together: what was taken along with it, and what resembles it."""

# Shapes: B users, I items that have pairs, D width of vectors.

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.retrieval.base import Progress
from fullrank.retrieval.implicit.graph_filter import GraphFilter
from fullrank.retrieval.implicit.lightgcn import LightGCN
from fullrank.schema import Schema


class GraphBlend(GraphFilter):
    """Standardised scores of the graph filter + weight x standardised exp(steepness x cosine) of learnt vectors.

    Scores are standardised over the items for each user, so that neither part is louder for users who took much. The
    filter knows exactly which items go together, the vectors generalise; they err differently.
    """

    class Config(GraphFilter.Config):
        """Hyper-parameters.

        Attributes:
            vectors: how the vectors are learnt, by a loss of the cosine; without layers it is matrix factorisation.
            weight: of the vectors' part.
            steepness: of the vectors' part; a high one lets the first few items decide alone.
        """

        vectors: LightGCN.Config = LightGCN.Config(layers=0, batch_size=256, epochs=14)
        weight: float = Field(default=0.6, ge=0)
        steepness: float = Field(default=3.0, gt=0)

        @field_validator("vectors")
        @classmethod
        def _cosine(cls, vectors: LightGCN.Config) -> LightGCN.Config:
            if vectors.loss == "bpr":
                raise ValueError('cosines are blended: expected the loss "softmax" or "cosine_contrastive", got "bpr"')
            return vectors

    name = "graph_blend"
    config: Config

    def __init__(self, schema: Schema, config: Config | None = None) -> None:
        super().__init__(schema, config)
        self.vectors = LightGCN(schema, self.config.vectors)

    def fit(self, log: Dataset, *, progress: Progress | None = None) -> Self:
        super().fit(log)
        self.vectors.fit(log, progress=progress)
        return self

    def scores(self, users: Batch) -> Tensor:
        filtered_BI = super().scores(users)
        if not filtered_BI.numel():
            return filtered_BI
        cosine_BI = self.vectors.user_vectors(users) @ self.vectors.item_ID[self.pairs.item_ids_I].T
        near_BI = (self.config.steepness * cosine_BI).exp()
        return _standardised(filtered_BI) + self.config.weight * _standardised(near_BI)

    def state(self) -> dict[str, Tensor]:
        vectors = {name: value for name, value in self.vectors.state().items() if not name.startswith("index.")}
        return {**super().state(), **{f"vectors.{name}": value for name, value in vectors.items()}}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        none = {"index.keys": state["index.keys"][:0], "index.vectors": torch.zeros(0, self.vectors.width)}
        self.vectors.restore({"users": state["vectors.users"], "items": state["vectors.items"], **none})


def _standardised(scores_BI: Tensor) -> Tensor:
    deviation_B1, mean_B1 = torch.std_mean(scores_BI, dim=1, keepdim=True, correction=0)
    return (scores_BI - mean_B1) / deviation_B1.clamp_min(torch.finfo(torch.float32).tiny)
