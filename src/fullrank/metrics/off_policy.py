"""What another policy would have earned on a log, by what was drawn at random: IPS, SNIPS, doubly robust."""

# Shapes: N slates (the lists of requests), K slots, C candidates of a slot, U users, V sums of each user.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fullrank.metrics.resampling import Bootstrap, Doubles, Integers, Resampleable, bootstrap

# Which slots' draws a slot is weighed by: those above and its own, or its own alone.
Weighing = Literal["prefix", "slot"]
REPLICATES = 1000
# A propensity of 1 may have been stored with so much rounding.
ROUNDING = 1e-6
# Mean weights outside, if not by chance, say that the weights are wrong; fewer effective slates, that intervals are.
FEWEST_EFFECTIVE, MEAN_WEIGHTS = 100, (0.9, 1.1)


@dataclass(frozen=True)
class LoggedSlates:
    """Slates that one policy drew slot by slot, and what another one would have done given the same slots above.

    Args:
        reward_NK: what each slot earned.
        logged_NK: probability that the shown item was drawn with, given the slots above it; in (0, 1].
        new_NK: that of the new policy, likewise; in [0, 1], 0 for an item that it cannot show there.
        predicted_NK: a reward model's prediction for the shown item.
        expected_NK: mean of the model's predictions over what the new policy draws in the slot, given the slots above.
            Both may count in what the slots below will earn; the estimate stays unbiased.
        shown_NK: whether there is an item in the slot; default: in every one. Nothing else is read where there is none.
        users_N: integer key of who saw the slate; default: each is someone else's.

    Raises:
        ValueError: if shapes differ, a reward or prediction is not finite, a probability is not one, only one of
            `predicted_NK` and `expected_NK` is given, or an empty slot stands above a filled one. Names slate and slot.
    """

    reward_NK: Tensor
    logged_NK: Tensor
    new_NK: Tensor
    predicted_NK: Tensor | None = None
    expected_NK: Tensor | None = None
    shown_NK: Tensor | None = None
    users_N: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.reward_NK.shape
        if len(shape) != 2 or not self.reward_NK.numel():
            raise ValueError(f"rewards of slates must have the shape (slates, slots), got {tuple(shape)}")
        if (self.predicted_NK is None) != (self.expected_NK is None):
            raise ValueError("a reward model needs both its predictions and their expectation under the new policy")
        shown_NK = self.shown()
        above_NK = torch.cat([torch.ones_like(shown_NK[:, :1]), shown_NK[:, :-1]], 1)
        _require(~shown_NK | above_NK, above_NK.to(torch.int8), "the number of items in the slot above", "1")
        for name in ("reward", "logged", "new", "predicted", "expected"):
            values_NK = getattr(self, f"{name}_NK")
            if values_NK is None:
                continue
            if values_NK.shape != shape:
                raise ValueError(f"{name}_NK has the shape {tuple(values_NK.shape)}, expected {tuple(shape)}")
            fine_NK, expected = values_NK.isfinite(), "a finite number"
            if name == "logged":
                fine_NK, expected = is_propensity(values_NK), "a propensity above 0 and at most 1"
            if name == "new":
                fine_NK, expected = (values_NK >= 0) & (values_NK <= 1 + ROUNDING), "a probability"
            _require(fine_NK | ~shown_NK, values_NK, name, expected)

    def shown(self) -> Tensor:
        """Whether there is an item in the slot, shape (N, K)."""
        return torch.ones_like(self.reward_NK, dtype=torch.bool) if self.shown_NK is None else self.shown_NK

    def weights(self, weighing: Weighing = "prefix") -> Tensor:
        """How much more likely the new policy is to show what was shown, shape (N, K); 0 in empty slots.

        Args:
            weighing: `prefix` takes the product of the ratios down to the slot, which is exact where a reward depends
                on its slot and those above. `slot` takes the slot's own ratio: of far less variance, and right where
                slots are drawn independently and a reward does not depend on the other slots.
        """
        shown_NK = self.shown()
        ratio_NK = torch.where(shown_NK, self.new_NK.double() / self.logged_NK.double(), 1.0)
        weight_NK = ratio_NK.cumprod(1) if weighing == "prefix" else ratio_NK
        return weight_NK.masked_fill(~shown_NK, 0.0)


@dataclass(frozen=True)
class OffPolicy:
    """Estimates of the value of a slate under the new policy, and what they rest on.

    Attributes:
        drawn: `logged` (what was earned), `ips`, `snips`, `dr` (if there is a reward model), and of each estimator
            `<name>_gain`, what it is above `logged`; and of each slot `mean_weight_<slot>`, which is 1 in expectation.
            Intervals resample users.
        effective_K: effective number of slates at each slot, (sum of weights)^2 / sum of squares (Kish).
        largest_K: largest weight at each slot.
        clip: what larger weights were set to; None for nothing.
        clipped: weights that were.
        bias: what clipping does to IPS: `too low` if no reward is negative, `too high` if none is positive, else
            `either way`. SNIPS is then drawn to `logged`, DR to the reward model.
    """

    drawn: Bootstrap
    slates: int
    effective_K: Doubles
    largest_K: Doubles
    clip: float | None
    clipped: int
    bias: str | None

    @property
    def estimators(self) -> list[str]:
        return [name for name in ("ips", "snips", "dr") if name in self.drawn.estimate]

    def warnings(self) -> list[str]:
        """What speaks against believing the numbers."""
        found = []
        slots = range(len(self.effective_K))
        worst = min(slots, key=lambda slot: self.drawn.estimate[f"mean_weight_{slot}"])
        for slot, below in ((worst, True), (max(slots, key=lambda s: self.drawn.estimate[f"mean_weight_{s}"]), False)):
            mean = self.drawn.estimate[f"mean_weight_{slot}"]
            low, high = self.drawn.interval(f"mean_weight_{slot}")
            if below and mean < MEAN_WEIGHTS[0] and not high >= 1 and not self.clipped:
                found.append(
                    f"weights of slot {slot} have the mean {mean:.3f}, not 1: the logging policy could not draw, or "
                    "all but never drew, what the new one shows; the estimates leave that out"
                )
            if not below and mean > MEAN_WEIGHTS[1] and low > 1:
                found.append(
                    f"weights of slot {slot} have the mean {mean:.3f}, not 1: the logged propensities are smaller than "
                    "those that items were drawn with"
                )
        effective = float(self.effective_K.min())
        if effective < FEWEST_EFFECTIVE:
            found.append(
                f"{self.slates:,} slates are worth {effective:,.0f} drawn by the new policy: the policies differ too "
                "much for this log, and intervals are too narrow"
            )
        if self.clipped:
            found.append(
                f"{self.clipped:,} weights were clipped at {self.clip:g}: IPS is {self.bias}, SNIPS drawn to the "
                "logged value, DR to the reward model"
            )
        return found

    def report(self) -> dict[str, Any]:
        """All of it, for JSON."""

        def estimated(name: str) -> dict[str, Any]:
            return {"value": self.drawn.estimate[name], "interval": list(self.drawn.interval(name))}

        gains = {name: estimated(f"{name}_gain") for name in self.estimators}
        slots = range(len(self.effective_K))
        return {
            "slates": self.slates,
            "users": self.drawn.clusters,
            "logged": estimated("logged"),
            **{name: {**estimated(name), "gain": gains[name]} for name in self.estimators},
            "effective_sample_size": float(self.effective_K.min()),
            "largest_weight": float(self.largest_K.max()),
            "mean_weight": min(self.drawn.estimate[f"mean_weight_{slot}"] for slot in slots),
            "slots": [
                {
                    "effective_sample_size": float(self.effective_K[slot]),
                    "largest_weight": float(self.largest_K[slot]),
                    "mean_weight": self.drawn.estimate[f"mean_weight_{slot}"],
                }
                for slot in slots
            ],
            "clip": self.clip,
            "clipped": self.clipped,
            "clipping_bias": self.bias,
            "warnings": self.warnings(),
        }


class OffPolicyRows(Resampleable):
    """Slates ready to be resampled by user; `metrics` are those of `OffPolicy.drawn`.

    With r the reward, w the weight down to a slot, w' that of the slots above, q the prediction and e its expectation:

        IPS = mean over slates of  sum over slots of  w r
        SNIPS = sum over slots of  share of slates with the slot * sum of w r / sum of w
        DR = mean over slates of  sum over slots of  w' e + w (r - q)

    Args:
        weight_NK: of `LoggedSlates.weights`, maybe clipped.
    """

    def __init__(self, slates: LoggedSlates, weight_NK: Tensor, weighing: Weighing) -> None:
        super().__init__(len(weight_NK), slates.users_N)
        shown_NK = slates.shown()
        self.slots = weight_NK.shape[1]

        def filled(values_NK: Tensor) -> Tensor:
            return values_NK.double().masked_fill(~shown_NK, 0.0)

        reward_NK = filled(slates.reward_NK)
        earned_NK = weight_NK * reward_NK
        columns = [torch.ones(len(weight_NK)), reward_NK.sum(1), earned_NK.sum(1)]
        self._names = ["slates", "logged", "ips"]
        if slates.predicted_NK is not None and slates.expected_NK is not None:
            above_NK = torch.ones_like(weight_NK)
            if weighing == "prefix":
                above_NK[:, 1:] = weight_NK[:, :-1]
            correction_NK = weight_NK * (reward_NK - filled(slates.predicted_NK))
            columns.append((above_NK * filled(slates.expected_NK) + correction_NK).sum(1))
            self._names.append("dr")
        columns += [*weight_NK.unbind(1), *earned_NK.unbind(1), *shown_NK.double().unbind(1)]
        self._sums_VC = self._sums(*(column.double().numpy() for column in columns))

    def metrics(self, count_C: Integers) -> dict[str, float]:
        sums_V = self._sums_VC @ count_C
        means = dict(zip(self._names, sums_V, strict=False))
        slates = means.pop("slates")
        result = {name: float(total / slates) for name, total in means.items()}
        weight_K, earned_K, shown_K = sums_V[len(self._names) :].reshape(3, self.slots)
        with np.errstate(invalid="ignore", divide="ignore"):
            result["snips"] = float((shown_K / slates * np.where(shown_K > 0, earned_K / weight_K, 0.0)).sum())
            mean_K = np.where(shown_K > 0, weight_K / shown_K, 1.0)
        gains = {f"{name}_gain": value - result["logged"] for name, value in result.items() if name != "logged"}
        return {**result, **gains, **{f"mean_weight_{slot}": float(mean) for slot, mean in enumerate(mean_K)}}


def off_policy(
    slates: LoggedSlates,
    *,
    weighing: Weighing = "prefix",
    clip: float | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> OffPolicy:
    """Estimate what a slate would have earned, had the new policy filled it.

    IPS is unbiased if the logging policy could draw all that the new one shows, and the propensities are what it drew
    with. SNIPS is consistent, often of less variance, and moves with the rewards when a constant is added to all. DR is
    unbiased as IPS is, whatever the reward model, and the better the model the less it varies.

    Args:
        weighing: see `LoggedSlates.weights`.
        clip: largest weight; larger ones are set to it, which costs bias for less variance.

    Raises:
        ValueError: if `clip` is not positive.

    Source: Horvitz and Thompson, JASA 1952; Swaminathan and Joachims, The self-normalized estimator for counterfactual
    learning, NIPS 2015; Dudik, Langford and Li, Doubly robust policy evaluation and learning, ICML 2011; for slates
    McInerney et al., Counterfactual evaluation of slate recommendations with sequential reward interactions, KDD 2020.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"weights are clipped at {clip}, expected a number above 0")
    weight_NK, shown_NK = slates.weights(weighing), slates.shown()
    clipped, bias = 0, None
    if clip is not None:
        clipped = int((weight_NK > clip).sum())
        weight_NK = weight_NK.clamp_max(clip)
        rewards = slates.reward_NK[shown_NK]
        bias = "too low" if bool((rewards >= 0).all()) else "too high" if bool((rewards <= 0).all()) else "either way"
    squares_K = weight_NK.square().sum(0)
    effective_K = torch.where(squares_K > 0, weight_NK.sum(0).square() / squares_K, 0.0)
    return OffPolicy(
        bootstrap(OffPolicyRows(slates, weight_NK, weighing), replicates=replicates, seed=seed),
        len(weight_NK),
        effective_K[shown_NK.any(0)].numpy(),
        weight_NK.amax(0)[shown_NK.any(0)].numpy(),
        clip,
        clipped,
        bias,
    )


def is_propensity(values: Tensor) -> Tensor:
    """Whether each is a probability that something can have been drawn with."""
    return (values > 0) & (values <= 1 + ROUNDING)


def check_distributions(probabilities_NKC: Tensor, shown_NK: Tensor | None = None, tolerance: float = 1e-4) -> None:
    """Whole logged distributions: what each candidate of each slot was drawn with.

    Raises:
        ValueError: if one has a negative or undefined entry, or does not sum to 1; names slate and slot.
    """
    total_NK = probabilities_NKC.double().sum(2)
    fine_NK = ((total_NK - 1).abs() <= tolerance) & (probabilities_NKC >= 0).all(2)
    fine_NK = fine_NK if shown_NK is None else fine_NK | ~shown_NK
    _require(fine_NK, total_NK, "the sum of the probabilities", "1, of numbers of which none is negative")


def _require(fine_NK: Tensor, values_NK: Tensor, what: str, expected: str) -> None:
    wrong = (~fine_NK).nonzero()
    if len(wrong):
        slate, slot = wrong[0].tolist()
        value = values_NK[slate, slot].item()
        text = f"{value:g}" if isinstance(value, float) and not math.isnan(value) else str(value)
        raise ValueError(f"slate {slate} slot {slot}: {what} is {text}, expected {expected}")
