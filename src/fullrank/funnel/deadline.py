"""How long the stages of a funnel may take, and what stands in for a stage that is late or fails."""

# Shapes: U users, C candidates of a user, T tasks.

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

# Candidates of each user that a ranker scores between two looks at the clock.
AT_ONCE = 64

# Seconds since some time in the past.
Clock = Callable[[], float]

log = logging.getLogger(__name__)


def check_milliseconds(what: str, milliseconds: float) -> None:
    """Raises:
    ValueError: if it is no time that can be waited for.
    """
    if not (milliseconds >= 0 and math.isfinite(milliseconds)):
        raise ValueError(f"{what} is {milliseconds!r}, expected a number of milliseconds, at least 0")


def check_deadlines(deadlines: Mapping[str, float], stages: Collection[str]) -> dict[str, float]:
    """Raises:
    ValueError: if a deadline is of no stage, or is no time.
    """
    for stage, milliseconds in deadlines.items():
        if stage not in stages:
            raise ValueError(f'a deadline is given for "{stage}"; the stages are {", ".join(stages)}')
        check_milliseconds(f"the deadline of {stage}", milliseconds)
    return {stage: float(milliseconds) for stage, milliseconds in deadlines.items()}


class Deadline:
    """Until when an answer, and each stage of it, has to be there.

    Args:
        clock: what time is read from.
        stages: milliseconds by stage, counted from its beginning; one that is not named may take any time.
        milliseconds: of the whole answer, counted from now; None for any time.
    """

    def __init__(self, clock: Clock, stages: Mapping[str, float], milliseconds: float | None) -> None:
        self.clock = clock
        self._stages = stages
        self._end = math.inf if milliseconds is None else clock() + milliseconds / 1000

    def of(self, stage: str) -> float:
        """When a stage that begins now has to end, as the clock reads then."""
        own = self._stages.get(stage)
        return self._end if own is None else min(self._end, self.clock() + own / 1000)

    def is_over(self) -> bool:
        return self.clock() >= self._end


def score_in_time(
    stage: str, score: Callable[[slice], Tensor], shape: tuple[int, int, int], deadline: Deadline, *, at_once: int
) -> tuple[Tensor, Tensor | None]:
    """Score candidates from the first on, as many as there is time for.

    No part is begun after the deadline, nor one that would end after it if it took as long as the longest before.

    Args:
        score: logits of some columns of candidates; an error ends the scoring, and is logged.
        shape: U, C and T.
        at_once: columns of a part, where the time is limited.

    Returns:
        logits_UCT, NaN where there is none, and whether each candidate was scored, shape (U, C); of a user of whom all
        logits are NaN none is. None where all were.
    """
    count_U, count_C, tasks = shape
    end, done, longest = deadline.of(stage), 0, 0.0
    part = count_C if math.isinf(end) else at_once
    pieces: list[Tensor] = []
    try:
        while done < count_C:
            begin = deadline.clock()
            if begin + longest >= end:
                break
            pieces.append(score(slice(done, done + part)))
            done = min(done + part, count_C)
            longest = max(longest, deadline.clock() - begin)
    except Exception:
        log.warning("stage %s failed; the order of the stage before it stands in", stage, exc_info=True)
    if done < count_C or not pieces:
        pieces.append(torch.full((count_U, count_C - done, tasks), torch.nan))
    logits_UCT = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    if done == count_C and not bool(logits_UCT.isnan().any()):
        return logits_UCT, None
    scored_UC = (torch.arange(count_C) < done).expand(count_U, count_C)
    nothing_U1 = logits_UCT.isnan().all(2).all(1, keepdim=True)
    return logits_UCT, scored_UC & ~nothing_U1


def behind(value_UC: Tensor, scored_UC: Tensor) -> Tensor:
    """Values under which what was not scored comes behind what was, in the order in which it stands.

    They mean nothing else. What was scored and has -inf keeps it.
    """
    nothing_UC = scored_UC & (value_UC == -torch.inf)
    lowest_U1 = value_UC.masked_fill(~scored_UC | nothing_UC, torch.inf).amin(1, keepdim=True)
    lowest_U1 = torch.where(lowest_U1.isinf(), 0.0, lowest_U1)
    # Steps that a float32 beside the lowest value can tell apart.
    step_U1 = 1e-3 * (1 + lowest_U1.abs())
    place_C = torch.arange(1, value_UC.shape[1] + 1)
    return torch.where(scored_UC | nothing_UC, value_UC, lowest_U1 - step_U1 * place_C)
