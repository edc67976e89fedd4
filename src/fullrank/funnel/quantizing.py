"""A funnel, or one ranker, with the tables of its rankers as codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from fullrank.compression.rankers import quantize_ranker
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.stages import RETRIEVAL
from fullrank.models import Ranker


def quantize_content(content: Funnel | Scorer, **settings: Any) -> tuple[Funnel | Scorer, dict[str, Any]]:
    """What can be saved as a bundle again and served; a retriever stays as it is.

    Args:
        settings: of `quantize_ranker`.

    Returns:
        The funnel or scorer, and a report for people and machines: `settings`, `parts` (of each table: stage, bytes
        before and after, error, why it was left if it was), `before` and `after` (bytes of all tables), `left` (other
        stages that stay as they are).

    Raises:
        ValueError: as `quantize_ranker`, or if nothing would become smaller.
    """
    smaller, report = with_each_ranker(content, partial(quantize_ranker, **settings), settings)
    if all(part["left"] for part in report["parts"]):
        raise ValueError("no table would become smaller: there is nothing to quantise")
    return smaller, report


def with_each_ranker(
    content: Funnel | Scorer, change: Callable[[Ranker], tuple[Ranker, Sequence[Any]]], settings: Mapping[str, Any]
) -> tuple[Funnel | Scorer, dict[str, Any]]:
    """The same with what `change` makes of each ranker, and a report, as of `quantize_content`, of the dataclasses that
    it says of the tables."""
    smaller, parts = {}, []
    for stage, ranker in content.rankers.items():
        smaller[stage], reports = change(ranker)
        parts += [{"stage": stage, **asdict(report)} for report in reports]
    report = {
        "settings": settings,
        "parts": parts,
        "before": sum(part["before"] for part in parts),
        "after": sum(part["after"] for part in parts),
        "left": [RETRIEVAL] if isinstance(content, Funnel) else [],
    }
    return content.with_rankers(smaller), report
