"""What a funnel would have earned on a log whose lists another policy drew, with propensities."""

# Shapes: n rows, N slates, K slots, U slates at once, C candidates.

from __future__ import annotations

from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.loader import batch_from_frame
from fullrank.funnel.catalogue import NO_ROW
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.rules import EMPTY, open_values
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.slate import PolicySpec, SlateConfig
from fullrank.funnel.value import ValueFormula, formula_names
from fullrank.metrics import LoggedSlates, off_policy
from fullrank.metrics.off_policy import Weighing, is_propensity
from fullrank.retrieval import item_keys

SLATES_AT_ONCE = 512
# How far from 1 a whole distribution may sum.
SUM_ROUNDING = 1e-4


class LogColumns(NamedTuple):
    """Columns of a dataset that say how its lists came about; `fullrank data import --keep` keeps them.

    Attributes:
        propensity: probability that the item was drawn with, given the slots above.
        slate: a value that the rows of one list share.
        slot: 0, 1, 2, ... in each list.
        distribution: a list with what each candidate of the slot was drawn with; None if not logged.
    """

    propensity: str = "propensity"
    slate: str = "slate"
    slot: str = "slot"
    distribution: str | None = None


def evaluate_off_policy(
    funnel: Funnel | Scorer,
    dataset: Dataset,
    split: str = "test",
    *,
    reward: str | None = None,
    policy: PolicySpec | None = None,
    columns: LogColumns = LogColumns(),
    weighing: Weighing = "prefix",
    clip: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Value per request that the funnel would have earned on the requests of a log.

    Each logged list is weighed by how much more likely the funnel is to show it: the funnel ranks the request's
    candidates, its slate policy gives the probability of each logged item in its slot given the items above, and one
    that is not among the candidates of the final stage has probability 0. The reward model of the doubly robust
    estimate is the final stage, its predictions in place of the labels in the formula of the reward.

    Args:
        reward: formula over labels and `bid`, of what a shown item earned; default the funnel's value formula.
        policy: in place of the funnel's own.
        weighing, clip, seed: see `fullrank.metrics.off_policy`.

    Returns:
        `OffPolicy.report`, and what was asked: `split`, `reward`, `policy`, `weighing`.

    Raises:
        ValueError: if `funnel` is a single ranker; the dataset is another one's, has no such split or column, a row has
            no label of the reward or no propensity in (0, 1], or slots are not 0, 1, 2, ... in each slate.
    """
    if isinstance(funnel, Scorer):
        raise ValueError(
            "off-policy evaluation asks what a funnel would have shown; a single ranker does not know which items it "
            "could have"
        )
    dataset = dataset.as_known_to(funnel.encoders)
    log = _read(funnel, dataset, split, reward or funnel.value.text, columns)
    policy = policy or SlateConfig().policy
    found = off_policy(weighed(funnel, log, policy), weighing=weighing, clip=clip, seed=seed)
    return {
        "split": split,
        "reward": log.reward.text,
        "policy": policy.model_dump(mode="json"),
        "weighing": weighing,
        **found.report(),
    }


class Log(NamedTuple):
    """The lists of a log.

    Attributes:
        users: a row for each slate.
        items_NK: rows of the funnel's catalogue, `NO_ROW` for items that it does not have and in empty slots.
    """

    users: Batch
    items_NK: Tensor
    shown_NK: Tensor
    reward_NK: Tensor
    propensity_NK: Tensor
    reward: ValueFormula


def weighed(funnel: Funnel, log: Log, policy: PolicySpec) -> LoggedSlates:
    """The log's lists beside what the funnel thinks of them."""
    new, predicted, expected = [], [], []
    for begin in range(0, len(log.users), SLATES_AT_ONCE):
        part = slice(begin, begin + SLATES_AT_ONCE)
        of_new, of_model, of_both = _asked(funnel, log.users[part], log.items_NK[part], log.reward, policy)
        new.append(of_new)
        predicted.append(of_model)
        expected.append(of_both)
    return LoggedSlates(
        log.reward_NK,
        log.propensity_NK,
        torch.cat(new),
        torch.cat(predicted),
        torch.cat(expected),
        log.shown_NK,
        log.users.user_B,
    )


@torch.inference_mode()
def _asked(
    funnel: Funnel, users: Batch, items_UK: Tensor, reward: ValueFormula, policy: PolicySpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each logged item its probability and its predicted reward, and of each slot the expected one; (U, K)."""
    ranking = funnel.rank(users, funnel.sizes.finalists(len(funnel.early)))
    columns = dict(zip(funnel.scorer.tasks, ranking.probabilities_UKT.double().unbind(-1), strict=True))
    if funnel.items.bid_I is not None:
        columns["bid"] = funnel.items.bid_I.double()[ranking.items_UK]
    predicted_UC = reward(columns)
    # A place without an item is never drawn; neither is one whose value is no number.
    predicted_UC = torch.where(ranking.value_UK > -torch.inf, predicted_UC, 0.0)
    is_item_UKC = (items_UK[:, :, None] == ranking.items_UK[:, None]) & (items_UK != NO_ROW)[:, :, None]
    places_UK = is_item_UKC.int().argmax(2).masked_fill(~is_item_UKC.any(2), EMPTY)
    slots = policy.build()
    new, expected = [], []
    for slot in range(items_UK.shape[1]):
        drawn_UC = slots.probabilities(open_values(ranking.value_UK, places_UK[:, :slot]), None, slot)
        new.append(_at(drawn_UC, places_UK[:, slot, None]))
        expected.append((drawn_UC * predicted_UC).sum(1, keepdim=True))
    return torch.cat(new, 1), _at(predicted_UC, places_UK), torch.cat(expected, 1)


def _at(values_UC: Tensor, places_UK: Tensor) -> Tensor:
    return values_UC.gather(1, places_UK.clamp_min(0)).masked_fill(places_UK == EMPTY, 0.0)


def _read(funnel: Funnel, dataset: Dataset, split: str, reward: str, columns: LogColumns) -> Log:
    formula = ValueFormula(reward, formula_names(dataset.schema))
    names = dataset.scan(split).collect_schema().names()
    said = {
        columns.propensity: "the probability that each item was drawn with",
        columns.slate: "which rows were one list",
        columns.slot: "the place of each item in its list, from 0",
        **({} if columns.distribution is None else {columns.distribution: "what each candidate was drawn with"}),
    }
    for name, meaning in said.items():
        if name not in names:
            raise ValueError(
                f'{dataset.path}: no column "{name}", which has to say {meaning}: log it and import it with '
                f"--keep {name}, or name another column"
            )
    frame = dataset.scan(split).sort(columns.slate, columns.slot, maintain_order=True).collect()
    if not frame.height:
        raise ValueError(f'{dataset.path}: split "{split}" is empty')
    slot, slate = frame[columns.slot], frame[columns.slate]
    place = frame.select(pl.int_range(pl.len()).over(columns.slate)).to_series()

    def require(fine: pl.Series, column: str, expected: str) -> None:
        row = fine.fill_null(False).not_().arg_max()
        assert row is not None
        if not fine.fill_null(False).all():
            raise ValueError(
                f'{dataset.path}: slate {slate[row]} slot {slot[row]}: column "{column}" is {frame[column][row]}, '
                f"expected {expected}"
            )

    require(slot.is_not_null() & (slot == place), columns.slot, "0, 1, 2, ..., each once in every slate")
    propensity_n = _numbers(frame[columns.propensity])
    require(pl.Series(is_propensity(propensity_n).numpy()), columns.propensity, "a propensity above 0 and at most 1")
    if columns.distribution is not None:
        whole = frame[columns.distribution]
        sums_to_one = (whole.list.sum() - 1).abs() <= SUM_ROUNDING
        require(sums_to_one & (whole.list.min() >= 0), columns.distribution, "a list that sums to 1, none negative")
    labels = {label.name: _numbers(frame[label.name]) for label in dataset.schema.labels}
    for name in formula.names:
        if name in labels:
            require(frame[name].is_not_null() & frame[name].is_not_nan(), name, "a label, which the reward is made of")
    if funnel.items.bid_I is not None:
        labels["bid"] = _numbers(frame[KEY_COLUMNS["bid"]])
    reward_n = formula(labels)
    require(pl.Series(reward_n.isfinite().numpy()), formula.names[0], f"a number of which {reward} is finite")
    first_n = place == 0
    row_n = torch.from_numpy(first_n.cast(pl.Int64).cum_sum().to_numpy().copy()) - 1
    slot_n = torch.from_numpy(place.to_numpy().copy())
    shape = (int(row_n[-1]) + 1, int(slot_n.max()) + 1)

    def table(values_n: Tensor, filler: float) -> Tensor:
        result = torch.full(shape, filler, dtype=values_n.dtype)
        result[row_n, slot_n] = values_n
        return result

    items_n = funnel.items.places(item_keys(frame[KEY_COLUMNS["item_id"]]))
    return Log(
        batch_from_frame(frame.filter(first_n), dataset.schema),
        table(items_n, NO_ROW),
        table(torch.ones_like(slot_n, dtype=torch.bool), False),
        table(reward_n, 0.0),
        table(propensity_n, 1.0),
        formula,
    )


def _numbers(column: pl.Series) -> Tensor:
    return torch.from_numpy(column.cast(pl.Float64).fill_null(float("nan")).to_numpy().copy())
