"""Who gets a slot: distributions over the candidates of one slot, which are also the propensities that a log needs."""

# Shapes: U users, C candidates of a user, R of them that may be the best, N cells of an integral, Q its nodes.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fullrank.registry import Registry, Spec


class SlotPolicy(ABC):
    """Chooses among the candidates of a slot at random, with probabilities that it can name.

    A subclass has a `name` and, where it has parameters, a `Config` beside it.

    Attributes:
        pseudo_counts: impressions that a prediction is taken to rest on, for the spread of its value; None for a policy
            that asks for no spread.
    """

    class Config(BaseModel):
        """Parameters of a policy."""

        model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    pseudo_counts: float | None = None

    def __init__(self, config: Config | None = None) -> None:
        self.config = self.Config() if config is None else config

    @abstractmethod
    def probabilities(self, value_UC: Tensor, spread_UC: Tensor | None, slot: int) -> Tensor:
        """The distribution that the item of a slot is drawn from, float64.

        Args:
            value_UC: -inf where a candidate may not stand in the slot: taken by a slot above, or forbidden.
            spread_UC: standard deviations of the values; only where `pseudo_counts` is set.
            slot: 0 is the uppermost.

        Returns:
            Shape (U, C); rows sum to 1, or are 0 where no candidate is left.
        """


class Greedy(SlotPolicy):
    """The largest value, ties by the smaller place."""

    name = "greedy"

    def probabilities(self, value_UC: Tensor, spread_UC: Tensor | None, slot: int) -> Tensor:
        return _largest(value_UC)


class Epsilon(SlotPolicy):
    """The largest value, but in a share of the slots any candidate alike."""

    class Config(SlotPolicy.Config):
        """Parameters.

        Attributes:
            epsilon: share of slots whose item is drawn from all candidates that may stand there.
        """

        epsilon: float = Field(default=0.05, ge=0, le=1)

    name = "epsilon"
    config: Config

    def probabilities(self, value_UC: Tensor, spread_UC: Tensor | None, slot: int) -> Tensor:
        eligible_UC = (value_UC > -torch.inf).double()
        uniform_UC = eligible_UC / eligible_UC.sum(1, keepdim=True).clamp_min(1)
        return (1 - self.config.epsilon) * _largest(value_UC) + self.config.epsilon * uniform_UC


class Softmax(SlotPolicy):
    """Probabilities proportional to exp(value / temperature)."""

    class Config(SlotPolicy.Config):
        """Parameters.

        Attributes:
            temperature: in the unit of the value; towards 0 the largest value, towards infinity any candidate alike.
        """

        temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)

    name = "softmax"
    config: Config

    def probabilities(self, value_UC: Tensor, spread_UC: Tensor | None, slot: int) -> Tensor:
        value_UC = value_UC.double()
        # Taken off first: the difference from the largest may be divided by any temperature.
        value_UC = (value_UC - value_UC.amax(1, keepdim=True)) / self.config.temperature
        return torch.softmax(value_UC, 1).nan_to_num(0.0)


class Thompson(SlotPolicy):
    """The largest of independent normal draws, one for each candidate around its value.

    An item is drawn from the probabilities of being the largest, not by drawing values: what is logged is what it was
    drawn with.
    """

    class Config(SlotPolicy.Config):
        """Parameters.

        Attributes:
            pseudo_counts: impressions that each prediction is taken to rest on; more of them explore less.
        """

        pseudo_counts: float = Field(default=1000.0, gt=0, allow_inf_nan=False)

    name = "thompson"
    config: Config

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self.pseudo_counts = self.config.pseudo_counts

    def probabilities(self, value_UC: Tensor, spread_UC: Tensor | None, slot: int) -> Tensor:
        if spread_UC is None:
            raise ValueError("the policy thompson needs the spread of each value")
        return best_of_normals(value_UC, spread_UC)


POLICIES: Registry[type[SlotPolicy]] = Registry(
    "slot policy",
    "fullrank.slot_policies",
    {kind.name: f"{__name__}:{kind.__name__}" for kind in (Greedy, Epsilon, Softmax, Thompson)},
)


class PolicySpec(Spec):
    """A slot policy with its Config; in a recipe one mapping: the name, then the Config's fields."""

    registry: ClassVar[Registry[Any]] = POLICIES

    def build(self) -> SlotPolicy:
        """The policy."""
        policy: SlotPolicy = self.kind(self.config)
        return policy


def _largest(value_UC: Tensor) -> Tensor:
    """1 on the largest of each row, the first of equals."""
    best_U1 = value_UC.argmax(1, keepdim=True)
    probability_UC = torch.zeros(value_UC.shape, dtype=torch.float64)
    return probability_UC.scatter_(1, best_U1, (value_UC.gather(1, best_U1) > -torch.inf).double())


# Standard deviations beyond which a normal variable is not looked for: 1e-12 of it.
REACH = 7.0
NODES, WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(6))
# Numbers held at once by the integral: 32 MB.
NUMBERS_AT_ONCE = 4_000_000


def best_of_normals(mean_UC: Tensor, spread_UC: Tensor) -> Tensor:
    """The probability of each of independent normal variables to be the largest of its row.

    P(i) = integral of phi_i(x) prod_{j != i} Phi_j(x) dx, by Gauss-Legendre on cells as wide as the narrowest variable
    that is there; within 1e-8 for spreads of any ratio.

    Args:
        mean_UC: -inf takes no part.
        spread_UC: standard deviations; 0 is taken as a billionth of the largest number of the row.

    Returns:
        float64; rows sum to 1, or are 0 where no variable takes part.
    """
    result_UC = torch.zeros(mean_UC.shape, dtype=torch.float64)
    row_V = (mean_UC > -torch.inf).any(1).nonzero().squeeze(1)
    if not row_V.numel():
        return result_UC
    mean_UC, spread_UC = mean_UC[row_V].double(), spread_UC[row_V].double()
    there_UC = mean_UC > -torch.inf
    scale_U1 = torch.where(there_UC, mean_UC.abs() + spread_UC, 0.0).amax(1, keepdim=True)
    spread_UC = spread_UC.maximum(1e-9 * scale_U1 + 1e-300)
    # Whatever reaches less than the one that surely lies highest is never the largest.
    low_U1 = (mean_UC - REACH * spread_UC).amax(1, keepdim=True)
    reach_UC = mean_UC + REACH * spread_UC
    count = int((reach_UC >= low_U1).sum(1).max())
    place_UR = reach_UC.topk(count, 1).indices
    mean_UR, spread_UR = mean_UC.gather(1, place_UR), spread_UC.gather(1, place_UR)
    apart_UR = reach_UC.gather(1, place_UR) < low_U1
    edge_UN = _cells(mean_UR, spread_UR, low_U1)
    at_once = max(1, NUMBERS_AT_ONCE // (count * (edge_UN.shape[1] - 1) * len(NODES)))
    pieces = [
        _integral(mean_UR[i : i + at_once], spread_UR[i : i + at_once], edge_UN[i : i + at_once])
        for i in range(0, len(row_V), at_once)
    ]
    probability_UR = torch.cat(pieces).masked_fill(apart_UR, 0.0)
    probability_UR /= probability_UR.sum(1, keepdim=True)
    result_UC[row_V] = torch.zeros(mean_UC.shape, dtype=torch.float64).scatter_(1, place_UR, probability_UR)
    return result_UC


def _cells(mean_UR: Tensor, spread_UR: Tensor, low_U1: Tensor) -> Tensor:
    """Edges of cells from `low` to the highest reach, none wider than the spread of a variable that is there."""
    ends_UE = torch.cat([mean_UR - REACH * spread_UR, mean_UR + REACH * spread_UR], 1).maximum(low_U1).sort(1).values
    middle_UE = (ends_UE[:, 1:] + ends_UE[:, :-1]) / 2
    there_UER = (middle_UE[:, :, None] - mean_UR[:, None]).abs() < REACH * spread_UR[:, None]
    finest_UE = torch.where(there_UER, spread_UR[:, None], torch.inf).amin(2)
    # The number of cells up to each end grows by one for each finest spread; edges stand where it is whole.
    steps_UE = (ends_UE[:, 1:] - ends_UE[:, :-1]) / finest_UE
    steps_UE = torch.nn.functional.pad(steps_UE.cumsum(1), (1, 0))
    cells = max(1, math.ceil(float(steps_UE[:, -1].max())))
    wanted_UN = steps_UE[:, -1:] * torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    right_UN = torch.searchsorted(steps_UE, wanted_UN).clamp(1, steps_UE.shape[1] - 1)
    before_UN, after_UN = steps_UE.gather(1, right_UN - 1), steps_UE.gather(1, right_UN)
    share_UN = ((wanted_UN - before_UN) / (after_UN - before_UN).clamp_min(1e-300)).clamp(0, 1)
    left_UN = ends_UE.gather(1, right_UN - 1)
    return left_UN + share_UN * (ends_UE.gather(1, right_UN) - left_UN)


def _integral(mean_UR: Tensor, spread_UR: Tensor, edge_UN: Tensor) -> Tensor:
    half_UN = (edge_UN[:, 1:] - edge_UN[:, :-1]) / 2
    x_UQ = (edge_UN[:, :-1, None] + half_UN[:, :, None] * (1 + NODES)).flatten(1)
    weight_UQ = (half_UN[:, :, None] * WEIGHTS).flatten(1)
    z_URQ = (x_UQ[:, None] - mean_UR[:, :, None]) / spread_UR[:, :, None]
    below_URQ: Tensor = torch.special.log_ndtr(z_URQ)
    log_density_URQ = -0.5 * z_URQ.square() - (spread_UR * math.sqrt(2 * math.pi)).log()[:, :, None]
    log_URQ = log_density_URQ - below_URQ + below_URQ.sum(1, keepdim=True)
    return log_URQ.exp().mul_(weight_UQ[:, None]).sum(2)
