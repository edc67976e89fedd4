"""An early stage that learns from the final one what it would say of all candidates, not only of what was shown."""

# Shapes: R requests with a list, C places of a list, U requests at once, L lists of a batch, B rows of a batch, P pairs
# (request, candidate), T tasks.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fullrank.batch import Batch, RowGather
from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader, batch_from_frame
from fullrank.funnel.catalogue import NO_ROW
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.rank_losses import RANK_LOSSES
from fullrank.funnel.stages import FINAL
from fullrank.funnel.value import ValueFormula, default_formula, formula_names
from fullrank.models import Ranker, RankerSpec
from fullrank.models.base import RankerOutput, task_loss
from fullrank.retrieval.pairing import Pairing
from fullrank.schema import Schema

REQUESTS_AT_ONCE = 64
# Columns of `Batch.extra` in a batch that has candidates: what the final stage predicts of each task (NaN elsewhere),
# its value, the bid, and the place among all places of the batch's lists (-1 elsewhere).
SOFT, VALUE, BID_OF, PLACE = "__final_predictions", "__final_value", "__bid", "__place"


class DistillConfig(BaseModel):
    """How an early stage learns from the final one.

    The loss is `hard` times that of the impressions, plus `soft` times that of the final stage's predictions on lists
    of candidates, plus `rank_weight` times a loss of the values within each list. Each batch has the impressions that
    the stage's training says, and some lists below; the weights are those of the last epoch.

    Attributes:
        requests: rows of the training part, or of a window of a stream, drawn at random, that lists are made for.
        candidates: of each list, drawn from all that retrieval hands on.
        random: share of them drawn from all items that may be retrieved instead.
        lists_per_batch: lists whose candidates each batch of impressions has below it.
        hard, soft: weights of the losses of the tasks.
        rank: loss of the values: `listwise`, the divergence of the two stages' softmax over the list; `pairwise`, a
            logistic loss of pairs by what swapping them changes in NDCG; or none.
        rank_weight: its weight.
        temperature: of values in `rank`; default the standard deviation of the final stage's in the list.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests: int = Field(default=4000, ge=1)
    candidates: int = Field(default=64, ge=2)
    random: float = Field(default=0.0, ge=0, le=1)
    lists_per_batch: int = Field(default=16, ge=1)
    hard: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    soft: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    rank: Literal["listwise", "pairwise"] | None = "listwise"
    rank_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    temperature: float | None = Field(default=None, gt=0)


@dataclass(frozen=True)
class CandidateLists:
    """Candidates of requests, and what the final stage says of them.

    Attributes:
        users: features of each request.
        items: the catalogue.
        items_RC: rows of the catalogue; `NO_ROW` where there is no candidate.
        predictions_RCT: probabilities of binary tasks, predictions of others; NaN where there is no candidate.
        value_RC: -inf where there is no candidate, or the formula gives no number.
        bid_RC: NaN where the log has no bids.
    """

    pairing: Pairing
    users: RowGather
    items: RowGather
    items_RC: Tensor
    predictions_RCT: Tensor
    value_RC: Tensor
    bid_RC: Tensor

    def __len__(self) -> int:
        return len(self.items_RC)

    def batch(self, lists_L: Tensor) -> Batch:
        """A row for each candidate of the given lists, with the columns that `Distilled` asks for; labels are NaN."""
        items_LC = self.items_RC[lists_L]
        list_P, place_P = (items_LC != NO_ROW).nonzero(as_tuple=True)
        user_P = lists_L[list_P]
        pairs = self.pairing(self.users, user_P, self.items, items_LC[list_P, place_P])
        rows = self.users.batch
        return replace(
            pairs,
            weights_B=torch.ones(len(pairs)),
            timestamp_B=None if rows.timestamp_B is None else rows.timestamp_B[user_P],
            user_B=None if rows.user_B is None else rows.user_B[user_P],
            extra={
                SOFT: self.predictions_RCT[user_P, place_P],
                VALUE: self.value_RC[user_P, place_P],
                BID_OF: self.bid_RC[user_P, place_P],
                PLACE: list_P * items_LC.shape[1] + place_P,
            },
        )


def candidate_lists(
    teacher: Funnel, dataset: Dataset, config: DistillConfig, *, split: str = "train", seed: int = 0
) -> CandidateLists:
    """Lists for random rows of a split, as `teacher` retrieves candidates for them, scored by its final stage.

    Args:
        teacher: its retriever holds the items that may be retrieved.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = chosen_rows(dataset.rows(split), config.requests, generator)
    frame = dataset.scan(split).with_row_index("__row").filter(pl.col("__row").is_in(chosen.tolist())).collect()
    return lists_for(teacher, batch_from_frame(frame, dataset.schema), config, generator)


def chosen_rows(rows: int, requests: int, generator: torch.Generator) -> Tensor:
    """Places of random rows, in their order."""
    return torch.randperm(rows, generator=generator)[:requests].sort().values


def lists_for(teacher: Funnel, users: Batch, config: DistillConfig, generator: torch.Generator) -> CandidateLists:
    """A list for each row of `users`, see `candidate_lists`."""
    active_I = teacher.items.active_I
    drawn = round(config.candidates * config.random)
    lists, predictions, values = [], [], []
    for begin in range(0, len(users), REQUESTS_AT_ONCE):
        part = users[begin : begin + REQUESTS_AT_ONCE]
        retrieved_UK = teacher.items.places(teacher.retriever.search(part, teacher.sizes.retrieve).item_keys_BK)
        # Those that are there first, in random order.
        order_UK = torch.rand(retrieved_UK.shape, generator=generator).masked_fill_(retrieved_UK == NO_ROW, -1.0)
        order_UK = order_UK.argsort(1, descending=True)[:, : config.candidates - drawn]
        random_UR = active_I[torch.randint(len(active_I), (len(part), drawn), generator=generator)]
        items_UC = _distinct(torch.cat([retrieved_UK.gather(1, order_UK), random_UR], 1))
        value_UC, predictions_UCT = teacher.predictions_of(FINAL, part, items_UC)
        lists.append(items_UC)
        predictions.append(predictions_UCT)
        values.append(value_UC)
    items_RC = torch.cat(lists)
    bid_I = teacher.items.bid_I
    bid_RC = torch.full(items_RC.shape, torch.nan) if bid_I is None else bid_I.float()[items_RC]
    return CandidateLists(
        teacher.pairing,
        RowGather(users),
        teacher.items.rows,
        items_RC,
        torch.cat(predictions),
        torch.cat(values),
        bid_RC,
    )


def _distinct(items_UC: Tensor) -> Tensor:
    """`NO_ROW` in the place of what stood in the row before."""
    ordered_UC, order_UC = items_UC.sort(dim=1, stable=True)
    again_UC = torch.zeros_like(items_UC, dtype=torch.bool)
    again_UC[:, 1:] = ordered_UC[:, 1:] == ordered_UC[:, :-1]
    return items_UC.masked_fill(torch.zeros_like(again_UC).scatter_(1, order_UC, again_UC), NO_ROW)


class MixedBatches:
    """Each batch of a loader of impressions with the candidates of some lists below; resumable as the loader is.

    Lists come in random order, each as often as any other, and which they are depends on the seed and the number of the
    batch alone.
    """

    def __init__(self, impressions: Loader, lists: CandidateLists, lists_per_batch: int) -> None:
        self.impressions = impressions
        self.lists = lists
        self.lists_per_batch = lists_per_batch

    @property
    def fingerprint(self) -> str:
        return self.impressions.fingerprint

    def __len__(self) -> int:
        return len(self.impressions)

    def state(self) -> dict[str, int]:
        return self.impressions.state()

    def restore(self, state: dict[str, int]) -> None:
        self.impressions.restore(state)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.impressions:
            state = self.impressions.state()
            number = state["epoch"] * len(self) + state["batch"] - 1
            yield with_lists(batch, number, self.lists, self.lists_per_batch, self.impressions.seed)


def with_lists(impressions: Batch, number: int, lists: CandidateLists, count: int, seed: int) -> Batch:
    """The batch of this number with `count` lists below."""
    return _below(impressions, lists.batch(lists_of_batch(len(lists), number, count, seed)))


def lists_of_batch(size: int, number: int, count: int, seed: int) -> Tensor:
    """Which of `size` lists: a piece of an endless row of permutations."""
    first = number * count
    chosen: list[Tensor] = []
    for turn in range(first // size, (first + count - 1) // size + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
        order = torch.randperm(size, generator=generator)
        chosen.append(order[max(0, first - turn * size) : first + count - turn * size])
    return torch.cat(chosen)


def _below(impressions: Batch, pairs: Batch) -> Batch:
    """Impressions, then candidates; further columns of either are NaN, or -1, in the other."""
    if impressions.weights_B is None:
        pairs = replace(pairs, weights_B=None)

    def with_columns(batch: Batch, other: Batch) -> Batch:
        absent = {
            name: column.new_full((len(batch), *column.shape[1:]), torch.nan if column.is_floating_point() else -1)
            for name, column in other.extra.items()
            if name not in batch.extra
        }
        return replace(batch, extra={**batch.extra, **absent})

    whole = with_columns(impressions, pairs)
    below = with_columns(pairs, whole)
    # In one order, whatever came first.
    return Batch.cat([whole, replace(below, extra={name: below.extra[name] for name in whole.extra})])


class Losses(NamedTuple):
    """The parts of the loss of a batch, unweighted."""

    hard: Tensor
    soft: Tensor
    rank: Tensor


class Distilled(Ranker):
    """A ranker under training with candidates that the final stage has judged.

        Σ_t α_t BCE(label_t, z_t) + β Σ_t α_t BCE(p^F_t, z_t) + γ L_rank(V_F, V_E)

    The first over the impressions, with the labels' weights α_t; the second over the candidates, with the final stage's
    probabilities p^F (squared errors for regression tasks); the third over the value of the candidates of each list,
    by the same formula of either stage's predictions.

    Deviation: which losses the paper has is not known beyond its abstract; list-wise and pair-wise ones follow what is
    known of COPR (arXiv 2306.03516) and of list-wise distillation.
    """

    name = "distilled"
    source = "Early-stage ads ranking with multi-task learning, arXiv 2307.11096 (abstract)"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            student: the ranker that learns.
            distill: how.
            value: formula; default as for a funnel.
        """

        student: RankerSpec
        distill: DistillConfig = DistillConfig()
        value: str | None = None

    config: Config

    def __init__(self, schema: Schema, config: Config, student: Ranker | None = None) -> None:
        """`student` is one that is there already, of the settings that the config says."""
        super().__init__(schema, config)
        self.student = config.student.build(schema) if student is None else student
        self.formula = ValueFormula(config.value or default_formula(schema), formula_names(schema))
        binary = torch.tensor([label.kind == "binary" for label in schema.labels])
        self.register_buffer("_binary_T", binary, persistent=False)

    @classmethod
    def around(cls, student: Ranker, distill: DistillConfig, value: str | None) -> Self:
        """What makes a ranker that is there already learn so."""
        spec = RankerSpec(name=student.name, config=student.config)
        return cls(student.schema, cls.Config(student=spec, distill=distill, value=value), student)

    def forward(self, batch: Batch) -> RankerOutput:
        output: RankerOutput = self.student(batch)
        return output

    def set_progress(self, share: float) -> None:
        self.student.set_progress(share)

    def loss(self, output: RankerOutput, batch: Batch) -> Tensor:
        distill, parts = self.config.distill, self.losses(output, batch)
        return distill.hard * parts.hard + distill.soft * parts.soft + distill.rank_weight * parts.rank

    def losses(self, output: RankerOutput, batch: Batch) -> Losses:
        """Of a batch of impressions and candidates; those of candidates are 0 if it has none."""
        hard, none = self.student.loss(output, batch), output.logits_BT.new_zeros(())
        if SOFT not in batch.extra:
            return Losses(hard, none, none)
        soft = task_loss(output.logits_BT, batch.extra[SOFT], self.schema, None)
        name = self.config.distill.rank
        if name is None:
            return Losses(hard, soft, none)
        return Losses(hard, soft, RANK_LOSSES[name](*self._values(output, batch), self.config.distill.temperature))

    def _values(self, output: RankerOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of either stage, shape (L, C), -inf by the final one where there is no candidate to compare."""
        value_B = batch.extra[VALUE]
        judged_P = value_B.isfinite().nonzero().squeeze(1)
        logits_PT = output.logits_BT[judged_P]
        predictions_PT = torch.where(self.get_buffer("_binary_T"), torch.sigmoid(logits_PT), logits_PT)
        columns: dict[str, Any] = {
            label.name: column for label, column in zip(self.schema.labels, predictions_PT.unbind(1), strict=True)
        }
        columns["bid"] = batch.extra[BID_OF][judged_P]
        places, width = batch.extra[PLACE][judged_P], self.config.distill.candidates
        size = -(-int(batch.extra[PLACE].max() + 1) // width) * width
        early = logits_PT.new_zeros(size).index_put((places,), self.formula(columns).to(logits_PT.dtype))
        final = logits_PT.new_full((size,), -torch.inf).index_put((places,), value_B[judged_P])
        return final.view(-1, width), early.view(-1, width)
