"""The pairwise term of a factorisation machine."""

# Shapes: B rows, F tokens, D width, T tasks.

from __future__ import annotations

import torch
from torch import Tensor, nn


def pairwise_term(tokens_BFD: Tensor) -> Tensor:
    """Σ_{i<j} <e_i, e_j> of shape (B,), as ½(‖Σe‖² - Σ‖e‖²): O(FD), not O(F²D).

    Source: Rendle, Factorization Machines, ICDM 2010, lemma 3.1.
    """
    total_BD = tokens_BFD.sum(1)
    squares_B = tokens_BFD.flatten(1).square().sum(1)
    return 0.5 * (total_BD.square().sum(1) - squares_B)


class PairwiseTerm(nn.Module):
    """The pairwise term of each task, on tokens that the tasks share; shape (B, T).

    One task has the plain term. Of several each weighs the dimensions of the inner products by itself,
    Σ_d a_td Σ_{i<j} e_id e_jd with a = 1 at the start; without that their terms would be one and the same number.

    Deviation: factorisation machines as published have one output.
    """

    def __init__(self, width: int, num_tasks: int) -> None:
        super().__init__()
        self.weight_DT = nn.Parameter(torch.ones(width, num_tasks)) if num_tasks > 1 else None

    def forward(self, tokens_BFD: Tensor) -> Tensor:
        if self.weight_DT is None:
            return pairwise_term(tokens_BFD)[:, None]
        products_BD = 0.5 * (tokens_BFD.sum(1).square() - tokens_BFD.square().sum(1))
        return products_BD @ self.weight_DT
