"""A funnel, or one ranker, without the rows of some ids."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fullrank.compression.pruning import prune_ranker
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.quantizing import with_each_ranker
from fullrank.funnel.scorer import Scorer


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
    return with_each_ranker(content, partial(prune_ranker, counts=counts, **settings), settings)
