"""Generalised dot-product attention: any activation in the place of the softmax."""

# Shapes: B rows, H heads, Q queries, K keys, E width of a head.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ScaleMode = Literal["pre", "post"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
}


def gdpa(
    query_BHQE: Tensor,
    key_BHKE: Tensor,
    value_BHKE: Tensor,
    activation: str | Sequence[str] = "gelu_tanh",
    *,
    scale: float = 1.0,
    scale_mode: ScaleMode = "post",
    window: int | None = None,
    query_mask_BQ: Tensor | None = None,
    key_mask_BK: Tensor | None = None,
) -> Tensor:
    """act(q kᵀ) · scale @ v, or act(q kᵀ · scale) @ v with `scale_mode` "pre".

    With keys and values that are made per row this is a two-layer network of every query, act(q W1) W2 with W1 = kᵀ and
    W2 = v, whose hidden width is the number of keys. The meaning is the same on every device; "softmax" is one of the
    activations and then gives ordinary attention.

    Args:
        activation: one name for all heads, or one per head.
        window: keys further than this from the query's place count as absent.
        query_mask_BQ, key_mask_BK: true where a token is real; absent keys add nothing and absent queries get zero.

    Returns:
        Shape (B, H, Q, E).

    Raises:
        ValueError: if an activation is unknown, their number is not that of the heads, or the window is negative.

    Source: Kunlun, arXiv 2602.10016, section on GDPA; the published kernels scale after the activation ("post"), the
    paper inside it ("pre").
    """
    heads, queries, keys = query_BHQE.shape[1], query_BHQE.shape[2], key_BHKE.shape[2]
    names = check_activations(activation, heads)
    if window is not None and window < 0:
        raise ValueError(f"expected a window of at least 0, got {window}")
    known: Tensor | None = None
    if key_mask_BK is not None:
        known = key_mask_BK[:, None, None, :]
    if window is not None:
        place = torch.arange(max(queries, keys), device=query_BHQE.device)
        band_QK = (place[:queries, None] - place[None, :keys]).abs() <= window
        known = band_QK if known is None else known & band_QK
    score_BHQK = query_BHQE @ key_BHKE.transpose(2, 3)
    if scale_mode == "pre":
        score_BHQK = score_BHQK * scale
    if len(set(names)) == 1:
        weight_BHQK = _activate(names[0], score_BHQK, known)
    else:
        parts = [_activate(name, score_BHQK[:, head : head + 1], known) for head, name in enumerate(names)]
        weight_BHQK = torch.cat(parts, 1)
    mixed_BHQE = weight_BHQK @ value_BHKE
    if scale_mode == "post":
        mixed_BHQE = mixed_BHQE * scale
    if query_mask_BQ is not None:
        mixed_BHQE = mixed_BHQE.masked_fill(~query_mask_BQ[:, None, :, None], 0.0)
    return mixed_BHQE


def check_activations(activation: str | Sequence[str], heads: int) -> list[str]:
    """One name per head.

    Raises:
        ValueError: if a name is unknown, or their number is not that of the heads.
    """
    names = [activation] * heads if isinstance(activation, str) else list(activation)
    if len(names) != heads:
        raise ValueError(f"expected one activation for all heads or one for each of {heads}, got {len(names)}")
    for name in names:
        if name != "softmax" and name not in ACTIVATIONS:
            raise ValueError(f'activation "{name}" is unknown; choose one of {", ".join(ACTIVATIONS)}, softmax')
    return names


def _activate(name: str, score_BHQK: Tensor, known: Tensor | None) -> Tensor:
    if name == "softmax":
        if known is None:
            return torch.softmax(score_BHQK, 3)
        some = known.any(-1, keepdim=True)
        weight = torch.softmax(score_BHQK.masked_fill(~(known | ~some), -torch.inf), 3)
        return weight.masked_fill(~some, 0.0)
    weight = ACTIVATIONS[name](score_BHQK)
    # Never -inf before the activation: gelu and silu of it are NaN.
    return weight if known is None else weight.masked_fill(~known, 0.0)
