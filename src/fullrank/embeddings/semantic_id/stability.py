"""How stable a ranker is: over segments of items, over time, between copies of an item, and in its attention."""

# Shapes: n rows, I items, B histories, T tokens, S tokens attended to, D width.

from __future__ import annotations

import math

import torch
from torch import Tensor

from fullrank.metrics import BinaryRows, bootstrap, normalized_entropy

# Shares of the training impressions after which the head and the torso of the items end.
HEAD, TORSO = 0.25, 0.75
SEGMENTS = ("head", "torso", "tail", "new")


def item_segments(impressions_I: Tensor) -> Tensor:
    """Segment of each item, places in `SEGMENTS`: items in order of their training impressions, the head those with the
    first 25 % of all of them, the torso those up to 75 %, the tail the rest; new those without one.

    The item at a border belongs to the more popular segment.
    """
    order = torch.argsort(-impressions_I, stable=True)
    total = impressions_I.sum().clamp_min(1)
    before_I = torch.empty_like(impressions_I, dtype=torch.float64)
    before_I[order] = (impressions_I[order].cumsum(0) - impressions_I[order]).double() / total
    segment_I = (before_I >= HEAD).long() + (before_I >= TORSO).long()
    return torch.where(impressions_I > 0, segment_I, 3)


def segment_report(
    logits: Tensor, labels: Tensor, items: Tensor, impressions_I: Tensor, users: Tensor | None = None, seed: int = 0
) -> dict[str, dict[str, float | tuple[float, float]]]:
    """Rows and normalised entropy of all rows, of items seen in training, and of each segment of the items.

    Args:
        logits, labels: shape (n,).
        items: of each row, in 0 .. I - 1.
        impressions_I: how many training rows each item has.
        users: of each row, integers; with them each entropy has a 95 % interval from resampled users.

    Returns:
        By segment `rows`, `ne`, NaN where there is one class only, and `interval`.
    """
    segment_n = item_segments(impressions_I)[items]
    masks = {"all": torch.ones_like(segment_n, dtype=torch.bool), "seen": segment_n < 3}
    masks |= {name: segment_n == place for place, name in enumerate(SEGMENTS)}
    report: dict[str, dict[str, float | tuple[float, float]]] = {}
    for name, mask_n in masks.items():
        rows = int(mask_n.sum())
        classes = len(torch.unique(labels[mask_n]))
        found: dict[str, float | tuple[float, float]] = {"rows": rows, "ne": math.nan}
        if classes == 2:
            found["ne"] = float(normalized_entropy(logits[mask_n], labels[mask_n]))
            if users is not None:
                rows_of = BinaryRows(logits[mask_n], labels[mask_n], clusters=users[mask_n])
                found["interval"] = bootstrap(rows_of, seed=seed).interval("ne")
        report[name] = found
    return report


def drift_sensitivity(early: tuple[Tensor, Tensor], late: tuple[Tensor, Tensor]) -> float:
    """NE of one model on rows from before the end of its training less NE on its last ones; smaller is better.

    In the paper the early rows are those of 48 to 42 hours before the end of the training stream, the late ones those
    of its last 6 hours: what the model has forgotten meanwhile.

    Args:
        early, late: logits and labels.
    """
    return float(normalized_entropy(*early)) - float(normalized_entropy(*late))


def aar(first: Tensor, second: Tensor, epsilon: float = 1e-12) -> Tensor:
    """2 |p1 - p2| / (p1 + p2 + ε) of the predictions for two copies of an item with different ids; 0 if they agree.

    Args:
        first, second: probabilities, of one shape.
    """
    return 2 * (first - second).abs() / (first + second + epsilon)


def partition_quality(weights_ID: Tensor, assignment: Tensor) -> dict[str, float]:
    """How alike the items of a row are, in the vectors of a model that has a row for each item.

    Args:
        assignment: shape (I,), number of the part, such as the row of a table, that each item is in.

    Returns:
        variance: within parts of two and more items, mean over numbers of a vector and over parts.
        distance: mean between the means of two parts.

    Raises:
        ValueError: if there are less than two parts, or none has two items.
    """
    _, part_I, count = torch.unique(assignment, return_inverse=True, return_counts=True)
    if len(count) < 2 or int(count.max()) < 2:
        raise ValueError(
            f"{len(count)} parts of at most {int(count.max())} items: expected two parts, one with two items"
        )
    vectors = weights_ID.double()
    mean = (
        torch.zeros(len(count), vectors.shape[1], dtype=torch.float64).index_add_(0, part_I, vectors) / count[:, None]
    )
    squares = torch.zeros_like(mean).index_add_(0, part_I, (vectors - mean[part_I]).square())
    several = count > 1
    variance = (squares[several] / count[several, None]).mean(1)
    # Σ over pairs without a matrix of all pairs, block by block.
    total = sum(float(torch.cdist(block, mean).sum()) for block in torch.split(mean, 1024))
    return {"variance": float(variance.mean()), "distance": total / (len(count) * (len(count) - 1))}


def attention_stats(attention_BTS: Tensor, mask_BS: Tensor) -> dict[str, float]:
    """Where attention goes; each a mean over histories and tokens that attend.

    Args:
        attention_BTS: each row a distribution.
        mask_BS: which tokens are real.

    Returns:
        first: weight on the first token.
        padding: weight on tokens that are not real.
        entropy: of a row, in bits.
        self: weight of a token on itself; only if T = S.
    """
    weight = attention_BTS.detach().double()
    found = {
        "first": float(weight[:, :, 0].mean()),
        "padding": float((weight * ~mask_BS[:, None, :]).sum(2).mean()),
        "entropy": float(-(weight * weight.clamp_min(1e-300).log2()).sum(2).mean()),
    }
    if weight.shape[1] == weight.shape[2]:
        found["self"] = float(weight.diagonal(dim1=1, dim2=2).mean())
    return found


def click_loss_rate(labels: Tensor, swapped_labels: Tensor) -> float:
    """(CTR(S') - CTR(S)) / CTR(S): what clicks are lost where items are swapped by others with the same prefix.

    Raises:
        ValueError: if S has no click.
    """
    rate = float(labels.double().mean())
    if rate == 0:
        raise ValueError("there is no click, so no rate can be lost")
    return (float(swapped_labels.double().mean()) - rate) / rate
