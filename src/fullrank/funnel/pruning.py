"""A funnel, or one ranker, without the rows of some ids."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from fullrank.compression.pruning import prune_ranker
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.quantizing import rankers_of, with_rankers
from fullrank.funnel.scorer import Scorer
from fullrank.funnel.stages import RETRIEVAL


def prune_content(content: Funnel | Scorer, **settings: Any) -> tuple[Funnel | Scorer, dict[str, Any]]:
    """What can be saved as a bundle again and served; a retriever stays as it is.

    Args:
        settings: of `prune_ranker`; counts are those of the vocabularies.

    Returns:
        The funnel or scorer, and a report: `settings`, `parts` (of each table: stage, rows, rows kept, bytes before and
        after, why it was left if it was), `before` and `after` (bytes of all tables), `left` (other stages that stay
        as they are).

    Raises:
        ValueError: as `prune_ranker`.
    """
    counts = {name: torch.from_numpy(known.id_counts) for name, known in content.encoders.vocabularies.items()}
    smaller, parts = {}, []
    for stage, ranker in rankers_of(content).items():
        smaller[stage], reports = prune_ranker(ranker, counts, **settings)
        parts += [{"stage": stage, **asdict(report)} for report in reports]
    report = {
        "settings": settings,
        "parts": parts,
        "before": sum(part["before"] for part in parts),
        "after": sum(part["after"] for part in parts),
        "left": [RETRIEVAL] if isinstance(content, Funnel) else [],
    }
    return with_rankers(content, smaller), report
