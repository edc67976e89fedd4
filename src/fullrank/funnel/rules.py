"""What may not stand in a slot, given what stands above it."""

# Shapes: U users, C candidates of a user, S slots above.

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Place of no candidate.
EMPTY = -1


class Rule(Protocol):
    """Forbids candidates of a slot.

    Attributes:
        hard: whether a slot is rather left empty than the rule broken. Another rule does not count in a slot for which
            it forbids all.
    """

    hard: bool

    def allowed(self, places_US: Tensor) -> Tensor:
        """Shape (U, C): which candidates may follow those at `places_US`, -1 for none."""


class AtMost:
    """At most so many of one group, such as a category or a campaign.

    Args:
        group_UC: number of each candidate's group; -1 belongs to none and is always allowed.
        at_most: how many of one group.
        slots: neighbouring slots that are counted together; None counts all.
        before_UC: how many of the candidate's group were shown to the user before.
        hard: see `Rule`.
    """

    def __init__(
        self,
        group_UC: Tensor,
        at_most: int,
        *,
        slots: int | None = None,
        before_UC: Tensor | None = None,
        hard: bool = False,
    ) -> None:
        self.at_most, self.slots, self.hard = at_most, slots, hard
        self._free_UC = group_UC < 0
        # Groups numbered within a row, so that they can be counted in a tensor of its shape.
        ordered_UC, order_UC = group_UC.sort(1)
        new_UC = torch.zeros_like(ordered_UC)
        new_UC[:, 1:] = ordered_UC[:, 1:] != ordered_UC[:, :-1]
        self._group_UC = torch.empty_like(group_UC).scatter_(1, order_UC, new_UC.cumsum(1))
        self._before_UC = torch.zeros_like(group_UC) if before_UC is None else before_UC

    def allowed(self, places_US: Tensor) -> Tensor:
        if self.slots is not None:
            places_US = places_US[:, max(0, places_US.shape[1] - self.slots + 1) :]
        there_US = (places_US >= 0).long()
        above_US = self._group_UC.gather(1, places_US.clamp_min(0))
        count_UG = torch.zeros_like(self._group_UC).scatter_add_(1, above_US, there_US)
        return self._free_UC | (count_UG.gather(1, self._group_UC) + self._before_UC < self.at_most)


def open_values(value_UC: Tensor, places_US: Tensor, rules: Sequence[Rule] = ()) -> Tensor:
    """The values, -inf for candidates that may not stand in the slot below those at `places_US`.

    A rule that is not hard is left out for a user to whom it leaves no candidate.
    """
    # Empty slots are written into a further column.
    taken_UC = torch.zeros(value_UC.shape[0], value_UC.shape[1] + 1, dtype=torch.bool)
    taken_UC.scatter_(1, places_US.remainder(value_UC.shape[1] + 1), True)
    open_UC = value_UC.masked_fill(taken_UC[:, :-1], -torch.inf)
    for rule in sorted(rules, key=lambda rule: not rule.hard):
        allowed_UC = rule.allowed(places_US)
        if not rule.hard:
            allowed_UC = allowed_UC | ~(allowed_UC & (open_UC > -torch.inf)).any(1, keepdim=True)
        open_UC = open_UC.masked_fill(~allowed_UC, -torch.inf)
    return open_UC
