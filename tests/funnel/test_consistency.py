"""What an early stage keeps of a value of two tasks: the planted cascade, whose final stage knows the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.planted import Cascade, planted_dataset
from fullrank.funnel import DistillConfig, Distilled, Funnel, StageSizes
from fullrank.funnel.catalogue import Catalogue, all_rows, usual_context, with_market
from fullrank.funnel.distillation import MixedBatches, candidate_lists
from fullrank.metrics import ads_recall
from fullrank.models import Ranker, RankerSpec
from fullrank.models.base import RankerOutput
from fullrank.models.early_stage import EarlyStageRanker
from fullrank.retrieval import Popularity
from fullrank.schema import Schema
from fullrank.training import TrainerConfig
from fullrank.training.run import fit_ranker

SIZES = {"rows": 3000, "ads": 60, "requests": 100}
TASK = Cascade(**SIZES)
VALUE = "bid * click - 3 * hide"
STUDENT = RankerSpec.of({"name": "early_stage", "interaction": "product", "output_dim": 16, "hidden": []})
TRAINING = TrainerConfig(batch_size=128, epochs=20, learning_rate=1e-2, monitor="ne", patience=0)


class Oracle(Ranker):
    name = "oracle"
    source = "the planted task"

    def __init__(self, schema: Schema) -> None:
        super().__init__(schema, Ranker.Config())
        self.register_buffer("logits_UIT", torch.logit(torch.from_numpy(np.moveaxis(TASK.probabilities_2UI, 0, 2))))

    def forward(self, batch: Batch) -> RankerOutput:
        user_B, item_B = batch.ids_BF.unbind(1)
        return RankerOutput(self.get_buffer("logits_UIT")[user_B, item_B].float())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return planted_dataset(tmp_path_factory.mktemp("cascade") / "data", "cascade", **SIZES)


def funnel_of(dataset: Dataset, value: str, early: Ranker | None = None) -> Funnel:
    funnel = Funnel(
        encoders=dataset.encoders,
        items=Catalogue.of(with_market(all_rows(dataset, "item"), dataset, None), dataset.schema),
        users=Catalogue.of(all_rows(dataset, "user"), dataset.schema),
        context=usual_context(dataset),
        retriever=Popularity(dataset.schema).fit(dataset),
        early={} if early is None else early,
        final=Oracle(dataset.schema),
        value=value,
        sizes=StageSizes(retrieve=TASK.ads),
    )
    funnel.index_active()
    return funnel


def recall(dataset: Dataset, value: str, distill: DistillConfig | None) -> float:
    """Of the ten most valuable ads, among the first ten of an early stage that has learnt by `value`."""
    torch.manual_seed(0)
    early = STUDENT.build(dataset.schema)
    if distill is None:
        fit_ranker(early, dataset, TRAINING)
    else:
        lists = candidate_lists(funnel_of(dataset, value), dataset, distill)
        learner = Distilled(dataset.schema, Distilled.Config(student=STUDENT, distill=distill, value=value))
        early = learner.student
        fit_ranker(learner, dataset, TRAINING, batches=lambda log: MixedBatches(log, lists, 16), validate=False)
    funnel = funnel_of(dataset, value, early)
    assert funnel.users is not None
    items_UC, values = funnel.stage_values(funnel.users.rows.batch)
    early_UI = torch.zeros(items_UC.shape).scatter(1, items_UC, values["early"])
    true_UI: Tensor = torch.from_numpy(TASK.value_UI)
    return ads_recall(true_UI, early_UI.double(), 10, 10)


def test_candidates_and_the_value_are_what_makes_an_early_stage_consistent(dataset: Dataset) -> None:
    """By clicks alone it cannot follow the value, by impressions alone it hardly does, whatever its tasks."""
    distill = DistillConfig(requests=1000, candidates=60)
    clicks = recall(dataset, "bid * click", distill.model_copy(update={"rank": None}))
    impressions = recall(dataset, VALUE, None)
    soft = recall(dataset, VALUE, distill.model_copy(update={"rank": None}))
    listwise = recall(dataset, VALUE, distill)
    assert soft > clicks + 0.03 and soft > impressions + 0.03
    assert listwise > soft + 0.1


def test_one_model_of_two_tasks_has_at_most_six_tenths_of_the_parameters_of_two_models() -> None:
    schema = Cascade().log_schema()
    apart = 0
    for label in schema.labels:
        own = schema.model_copy(update={"labels": (label,)})
        apart += EarlyStageRanker.from_config(own, STUDENT.config).num_parameters().total
    assert EarlyStageRanker.from_config(schema, STUDENT.config).num_parameters().total <= 0.6 * apart
