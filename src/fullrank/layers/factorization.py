"""The pairwise term of a factorisation machine."""

# Shapes: B rows, F tokens, D width.

from __future__ import annotations

from torch import Tensor


def pairwise_term(tokens_BFD: Tensor) -> Tensor:
    """Σ_{i<j} <e_i, e_j> of shape (B,), as ½(‖Σe‖² - Σ‖e‖²): O(FD), not O(F²D).

    Source: Rendle, Factorization Machines, ICDM 2010, lemma 3.1.
    """
    total_BD = tokens_BFD.sum(1)
    squares_B = tokens_BFD.flatten(1).square().sum(1)
    return 0.5 * (total_BD.square().sum(1) - squares_B)
