"""The quantiser of a directory, whatever its kind."""

from __future__ import annotations

import json
from pathlib import Path

from fullrank.embeddings.semantic_id.quantizer import DESCRIPTION, Quantizer
from fullrank.embeddings.semantic_id.rq_kmeans import RQKMeans
from fullrank.embeddings.semantic_id.rq_vae import RQVAE

_KINDS: dict[str, type[Quantizer]] = {kind.kind: kind for kind in (RQKMeans, RQVAE)}


def load_quantizer(directory: Path | str) -> Quantizer:
    """What `Quantizer.save` wrote.

    Raises:
        ValueError: if a file is missing or damaged, or the kind is unknown.
    """
    place = Path(directory) / DESCRIPTION
    try:
        kind = json.loads(place.read_text(encoding="utf-8"))["kind"]
    except FileNotFoundError:
        raise ValueError(f"{directory} holds no quantiser: {DESCRIPTION} is missing") from None
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{place} is damaged") from None
    if kind not in _KINDS:
        raise ValueError(f'{place}: quantiser "{kind}" is unknown, expected one of {", ".join(_KINDS)}')
    return _KINDS[kind].load(Path(directory))
