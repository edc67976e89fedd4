"""Facts about the losses of implicit feedback."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank.retrieval.implicit import losses
from fullrank.retrieval.implicit.losses import bpr_loss, cosine_contrastive_loss, softmax_loss

USERS, ITEMS, PAIRS = 7, 50, 40


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Both kinds of products, in blocks of two users."""
    monkeypatch.setattr(losses, "has_units", lambda: request.param)
    monkeypatch.setattr(losses, "SCORES_AT_ONCE", 2 * ITEMS)
    return 0.03 if request.param else 1e-5


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    user_BD, item_ID = torch.randn(USERS, 8, generator=generator), torch.randn(ITEMS, 8, generator=generator)
    row_Q = torch.randint(USERS, (PAIRS,), generator=generator).sort().values
    item_Q = torch.randint(ITEMS, (PAIRS,), generator=generator)
    unit_BD, unit_ID = F.normalize(user_BD, dim=1), F.normalize(item_ID, dim=1)
    return unit_BD.requires_grad_(), unit_ID.requires_grad_(), row_Q, item_Q


def test_softmax_loss_is_cross_entropy_of_each_pair_over_the_catalogue(tolerance: float) -> None:
    user_BD, item_ID, row_Q, item_Q = drawn()
    expected = F.cross_entropy((3 * user_BD @ item_ID.T)[row_Q], item_Q)
    _equal(softmax_loss(3 * user_BD, item_ID, row_Q, item_Q), expected, (user_BD, item_ID), tolerance)


def test_cosine_contrastive_loss_is_the_mean_over_all_negatives(tolerance: float) -> None:
    user_BD, item_ID, row_Q, item_Q = drawn()
    scores_QI = (user_BD @ item_ID.T)[row_Q]
    own_Q = scores_QI.gather(1, item_Q[:, None])[:, 0]
    expected = (1 - own_Q).mean() + 20 * (scores_QI - 0.3).clamp_min(0).mean()
    found = cosine_contrastive_loss(user_BD, item_ID, row_Q, item_Q, margin=0.3, negative_weight=20)
    # In bfloat16 some score beside the margin changes sides.
    _equal(found, expected, (user_BD, item_ID), 7 * tolerance)


def _equal(found: Tensor, expected: Tensor, tables: tuple[Tensor, Tensor], tolerance: float) -> None:
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    for mine, theirs in zip(torch.autograd.grad(found, tables), torch.autograd.grad(expected, tables), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < tolerance


def test_bpr_loss_of_equal_scores_is_the_logarithm_of_two_and_falls_with_the_difference() -> None:
    user, item = torch.ones(3, 2), torch.ones(3, 2)
    assert float(bpr_loss(user, item, item)) == pytest.approx(0.693147, abs=1e-5)
    assert float(bpr_loss(user, 2 * item, item)) == pytest.approx(0.126928, abs=1e-5)  # log(1 + e^-2)
