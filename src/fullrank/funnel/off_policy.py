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
from fullrank.funnel.rules import EMPTY
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.slate import PolicySpec, SlateConfig
from fullrank.funnel.slate_making import SlateMaker
from fullrank.funnel.value import ValueFormula, formula_names
from fullrank.metrics import LoggedSlates, off_policy
from fullrank.metrics.off_policy import Weighing, is_propensity
from fullrank.retrieval import item_keys

SLATES_AT_ONCE = 512
# How far from 1 a whole distribution may sum.
SUM_ROUNDING = 1e-4
MOST_SLOTS = 1000


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
    funnel, dataset = funnel.without_deadlines(), dataset.as_known_to(funnel.encoders)
    log = read_log(funnel, dataset, split, reward, columns)
    if policy is not None:
        funnel = funnel.with_slate(funnel.slate.model_copy(update={"policy": policy}))
    found = off_policy(weighed(funnel, log), weighing=weighing, clip=clip, seed=seed)
    return {
        "split": split,
        "reward": log.reward.text,
        "policy": funnel.slate.policy.model_dump(mode="json"),
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


def weighed(funnel: Funnel, log: Log) -> LoggedSlates:
    """The log's lists beside what the funnel thinks of them."""
    plain, make = funnel.with_slate(SlateConfig()), SlateMaker(funnel.slate, funnel.items, funnel.scorer)
    new, predicted, expected = [], [], []
    for begin in range(0, len(log.users), SLATES_AT_ONCE):
        part = slice(begin, begin + SLATES_AT_ONCE)
        of_new, of_model, of_both = _asked(plain, make, log.users[part], log.items_NK[part], log.reward)
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
    plain: Funnel, make: SlateMaker, users: Batch, items_UK: Tensor, reward: ValueFormula
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each logged item its probability and its predicted reward, and of each slot the expected one; (U, K)."""
    ranking = plain.rank(users, plain.sizes.finalists(len(plain.early)))
    p_UCT = ranking.probabilities_UKT.double()
    binary_T = torch.tensor([label.kind == "binary" for label in plain.schema.labels])
    logits_UCT = torch.where(binary_T, torch.logit(p_UCT), p_UCT)
    bid_I = plain.items.bid_I
    bid_UC = None if bid_I is None else bid_I.double()[ranking.items_UK]
    columns = dict(zip(plain.scorer.tasks, p_UCT.unbind(-1), strict=True))
    predicted_UC = reward(columns if bid_UC is None else {**columns, "bid": bid_UC})
    # Where there is no item, or its value is no number, nothing is drawn.
    predicted_UC = torch.where(ranking.value_UK > -torch.inf, predicted_UC, 0.0)
    is_item_UKC = (items_UK[:, :, None] == ranking.items_UK[:, None]) & (items_UK != NO_ROW)[:, :, None]
    places_UK = is_item_UKC.int().argmax(2).masked_fill(~is_item_UKC.any(2), EMPTY)
    new, expected = [], []
    drawn = make.distributions(ranking.value_UK, logits_UCT, ranking.items_UK, places_UK)
    for slot, drawn_UC in enumerate(drawn):
        new.append(_at(drawn_UC, places_UK[:, slot, None]))
        expected.append((drawn_UC * predicted_UC).sum(1, keepdim=True))
    return torch.cat(new, 1), _at(predicted_UC, places_UK), torch.cat(expected, 1)


def _at(values_UC: Tensor, places_UK: Tensor) -> Tensor:
    return values_UC.gather(1, places_UK.clamp_min(0)).masked_fill(places_UK == EMPTY, 0.0)


def read_log(
    funnel: Funnel, dataset: Dataset, split: str, reward: str | None = None, columns: LogColumns = LogColumns()
) -> Log:
    """The lists of a split, best read once for several funnels of the same catalogue.

    Raises:
        ValueError: see `evaluate_off_policy`.
    """
    reward = reward or funnel.value.text
    formula = ValueFormula(reward, formula_names(dataset.schema))
    rows = _Rows(dataset, split, columns)
    values = {}
    for name in formula.names:
        column = KEY_COLUMNS["bid"] if name == "bid" else name
        values[name] = _numbers(rows.frame[column])
        rows.require(pl.Series(values[name].isfinite().numpy()), column, "a number for the reward")
    reward_n = formula(values)
    rows.require(pl.Series(reward_n.isfinite().numpy()), column, f"numbers that give {reward} a finite value")
    items_n = funnel.items.places(item_keys(rows.frame[KEY_COLUMNS["item_id"]]))
    return Log(
        batch_from_frame(rows.frame.filter(rows.place == 0), dataset.schema),
        rows.table(items_n, NO_ROW),
        rows.table(torch.ones(len(items_n), dtype=torch.bool), False),
        rows.table(reward_n, 0.0),
        rows.table(rows.propensity_n, 1.0),
        formula,
    )


class _Rows:
    """The rows of a split by slate and slot, checked."""

    def __init__(self, dataset: Dataset, split: str, columns: LogColumns) -> None:
        self.path, self.columns = dataset.path, columns
        known = dataset.scan(split).collect_schema()
        number, numbers = "a number", "a list of numbers"
        said = {
            columns.propensity: (number, "the probability that each item was drawn with"),
            columns.slate: (number, "which rows were one list"),
            columns.slot: (number, "the place of each item in its list, from 0"),
        }
        if columns.distribution is not None:
            said[columns.distribution] = (numbers, "what each candidate was drawn with")
        for name, (kind, meaning) in said.items():
            if name not in known:
                raise ValueError(
                    f'{self.path}: no column "{name}", which has to say {meaning}: log it and import it with '
                    f"--keep {name}, or name another column"
                )
            dtype = known[name]
            inner = dtype.inner if isinstance(dtype, pl.List | pl.Array) else pl.String()
            if not (dtype if kind == number else inner).is_numeric():
                raise ValueError(f'{self.path}: column "{name}" is {dtype}, expected {kind} in each row')
        self.frame = frame = dataset.scan(split).sort(columns.slate, columns.slot, maintain_order=True).collect()
        if not frame.height:
            raise ValueError(f'{self.path}: split "{split}" is empty')
        self.place = frame.select(pl.int_range(pl.len()).over(columns.slate)).to_series()
        self.require(frame[columns.slate].is_not_null(), columns.slate, "a number")
        self.require(frame[columns.slot] == self.place, columns.slot, "0, 1, 2, ..., each once in every slate")
        self.require(self.place < MOST_SLOTS, columns.slot, f"at most {MOST_SLOTS} slots of a slate")
        self.require(frame[KEY_COLUMNS["item_id"]].is_not_null(), KEY_COLUMNS["item_id"], "an item")
        self.propensity_n = _numbers(frame[columns.propensity])
        fine = pl.Series(is_propensity(self.propensity_n).numpy())
        self.require(fine, columns.propensity, "a propensity above 0 and at most 1")
        if columns.distribution is not None:
            whole = frame[columns.distribution].cast(pl.List(pl.Float64))
            fine = ((whole.list.sum() - 1).abs() <= SUM_ROUNDING) & (whole.list.min() >= 0)
            self.require(fine, columns.distribution, "probabilities that sum to 1")

    def require(self, fine: pl.Series, column: str, expected: str) -> None:
        """Raises:
        ValueError: if a row is not fine, or it is not known whether it is; names its slate and slot.
        """
        fine = fine.fill_null(False)
        if not fine.all():
            row = self.frame.row((~fine).arg_max() or 0, named=True)
            raise ValueError(
                f"{self.path}: slate {row[self.columns.slate]} slot {row[self.columns.slot]}: "
                f'column "{column}" is {row[column]}, expected {expected}'
            )

    def table(self, values_n: Tensor, filler: float) -> Tensor:
        """The values of rows by slate and slot, shape (N, K)."""
        slate_n = torch.from_numpy((self.place == 0).cast(pl.Int64).cum_sum().to_numpy().copy()) - 1
        slot_n = torch.from_numpy(self.place.to_numpy().copy())
        result = torch.full((int(slate_n[-1]) + 1, int(slot_n.max()) + 1), filler, dtype=values_n.dtype)
        result[slate_n, slot_n] = values_n
        return result


def _numbers(column: pl.Series) -> Tensor:
    return torch.from_numpy(column.cast(pl.Float64).fill_null(float("nan")).to_numpy().copy())
