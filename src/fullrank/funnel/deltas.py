"""A funnel, or a single ranker, that is brought up to date by the deltas of a stream."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.stages import FINAL
from fullrank.training.deltas import Position, apply_delta


def with_deltas(
    content: Funnel | Scorer, deltas: Sequence[Path], position: Position, *, in_place: bool = False
) -> tuple[Funnel | Scorer, Position]:
    """The same with deltas applied, and its position after them; `content` stays as it is, and can be asked meanwhile.

    Of a funnel, all rankers are brought up to date, and items are looked at anew by the early stages that do so
    beforehand. The catalogue and the index are the same: those change with the next bundle.

    Args:
        deltas: directories, in order.
        position: of `content`, see `fullrank.training.deltas`.
        in_place: its rankers are written to; `content` is not to be used any more.

    Raises:
        ValueError: as `apply_delta`.
    """
    rankers = content.rankers if in_place else copy.deepcopy(content.rankers)
    for delta in deltas:
        position = apply_delta(rankers if isinstance(content, Funnel) else rankers[FINAL], delta, position)
    return content.with_rankers(rankers), position
