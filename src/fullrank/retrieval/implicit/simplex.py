"""SimpleX: a user's own vector and the mean of the items taken, under the cosine contrastive loss."""

# Shapes: B users of a batch, Q their pairs, U users, I items, D width of vectors.

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fullrank.retrieval.base import Progress
from fullrank.retrieval.implicit.base import ImplicitRetriever, descend
from fullrank.retrieval.implicit.interactions import Interactions
from fullrank.retrieval.implicit.losses import cosine_contrastive_loss


class SimpleX(ImplicitRetriever):
    """Score = cosine of g p_u + (1 - g) W mean of e_i over the items that u took, and e_i.

    Only negatives whose cosine is above a margin push, so that the few hard ones among all items decide. A high margin
    leaves room for some hundred items near each user, whose order the positives then make.

    Deviation: own vectors start at 0, so that each user begins as what it took; the paper draws them.

    Source: Mao et al., SimpleX: A Simple and Strong Baseline for Collaborative Filtering, CIKM 2021.
    """

    class Config(ImplicitRetriever.Config):
        """Hyper-parameters.

        Attributes:
            margin: cosine below which a negative is left alone.
            negative_weight: of the mean over negatives, against 1 for the positive.
            own_weight: g, the share of the user's own vector; the rest is the history's.
            dropout: share of the numbers of a user's vector that a step leaves out.
        """

        margin: float = Field(default=0.9, ge=-1, lt=1)
        negative_weight: float = Field(default=250.0, gt=0)
        own_weight: float = Field(default=0.5, ge=0, le=1)
        dropout: float = Field(default=0.1, ge=0, lt=1)

    name = "simplex"
    config: Config

    def learn(self, pairs: Interactions, progress: Progress | None) -> tuple[Tensor, Tensor]:
        config = self.config
        item_ID = self.start(pairs)[1]
        own_UD = torch.zeros(pairs.users, config.dim).requires_grad_()
        mixing_DD = torch.eye(config.dim).requires_grad_()

        def users(user_B: Tensor, row_Q: Tensor, item_Q: Tensor) -> Tensor:
            taken_BD = torch.zeros(user_B.numel(), config.dim).index_add(0, row_Q, item_ID.index_select(0, item_Q))
            history_BD = taken_BD / pairs.per_user_U[user_B, None] @ mixing_DD
            own_BD = own_UD.index_select(0, user_B)
            return F.normalize(config.own_weight * own_BD + (1 - config.own_weight) * history_BD, dim=1)

        def loss(user_B: Tensor) -> Tensor:
            row_Q, item_Q = pairs.of_users(user_B)
            value = cosine_contrastive_loss(
                F.dropout(users(user_B, row_Q, item_Q), config.dropout),
                F.normalize(item_ID, dim=1),
                row_Q,
                item_Q,
                margin=config.margin,
                negative_weight=config.negative_weight,
            )
            return value + self.penalty(own_UD[user_B], item_ID[item_Q])

        descend((own_UD, item_ID, mixing_DD), loss, pairs.users, config, progress)
        with torch.no_grad():
            user_UD = users(torch.arange(pairs.users), pairs.user_P, pairs.item_P)
            return user_UD, F.normalize(item_ID, dim=1)
