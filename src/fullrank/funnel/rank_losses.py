"""How far the values that two stages give the candidates of a list are from ordering them alike."""

# Shapes: L lists, C places of a list.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Of the values of a list, relative to the largest: below it they are equal but for rounding.
LEAST_SPREAD = 1e-6


def listwise(final_LC: Tensor, early_LC: Tensor, temperature: float | None = None) -> Tensor:
    """KL(softmax(V_F / T) ‖ softmax(V_E / T)), mean over the lists.

    It is 0 where the values differ by a constant of the list, and above 0 elsewhere.

    Args:
        final_LC: V_F, -inf where there is no candidate. Lists of equal values, or of one candidate, are left out.
        early_LC: V_E; what stands where there is no candidate is not looked at.
        temperature: T; default the standard deviation of V_F in the list.
    """
    final_LC, early_LC, there_LC = _scaled(final_LC, early_LC, temperature)
    lowest = torch.finfo(early_LC.dtype).min / 4
    log_p_LC, log_q_LC = (
        torch.log_softmax(values.masked_fill(~there_LC, lowest), 1) for values in (final_LC, early_LC)
    )
    return (log_p_LC.exp() * (log_p_LC - log_q_LC)).sum() / max(1, len(final_LC))


def pairwise(final_LC: Tensor, early_LC: Tensor, temperature: float | None = None) -> Tensor:
    """-log σ((V_E,i - V_E,j) / T) of the pairs with V_F,i > V_F,j, mean over the lists.

    A pair weighs what swapping the two in the early stage's order changes in NDCG, with V_F above the list's lowest as
    gains; the weights of a list sum to 1.

    Args:
        final_LC, early_LC, temperature: as in `listwise`.
    """
    final_LC, early_LC, there_LC = _scaled(final_LC, early_LC, temperature)
    gain_LC = torch.where(there_LC, final_LC - final_LC.masked_fill(~there_LC, torch.inf).amin(1, True), 0.0)
    order_LC = early_LC.detach().masked_fill(~there_LC, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks_C = torch.arange(2, order_LC.shape[1] + 2, device=order_LC.device, dtype=gain_LC.dtype)
    discount_LC = torch.zeros_like(gain_LC).scatter_(1, order_LC, (1 / ranks_C.log2()).expand_as(gain_LC))
    more_LCC = gain_LC[:, :, None] - gain_LC[:, None]
    both_LCC = there_LC[:, :, None] & there_LC[:, None]
    change_LCC = more_LCC.clamp_min(0) * (discount_LC[:, :, None] - discount_LC[:, None]).abs() * both_LCC
    weight_LCC = change_LCC / change_LCC.sum((1, 2), True).clamp_min(torch.finfo(gain_LC.dtype).tiny)
    loss_LCC = F.softplus(early_LC[:, None] - early_LC[:, :, None])
    return (weight_LCC * loss_LCC).sum() / max(1, len(final_LC))


def _scaled(final_LC: Tensor, early_LC: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both over T, and where there are candidates, of the lists whose values differ."""
    there_LC = final_LC.isfinite()
    known_LC = final_LC.where(there_LC, 0.0)
    count_L1 = there_LC.sum(1, True).clamp_min(1)
    centred_LC = (known_LC - known_LC.sum(1, True) / count_L1).where(there_LC, 0.0)
    spread_L1 = (centred_LC.square().sum(1, True) / count_L1).sqrt()
    kept_L = (spread_L1 > LEAST_SPREAD * known_LC.abs().amax(1, True)).squeeze(1)
    scale_L1 = spread_L1[kept_L] if temperature is None else temperature
    return known_LC[kept_L] / scale_L1, early_LC[kept_L] / scale_L1, there_LC[kept_L]


RANK_LOSSES: dict[str, Callable[[Tensor, Tensor, float | None], Tensor]] = {
    "listwise": listwise,
    "pairwise": pairwise,
}
