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

    Only negatives whose cosine is above a margin push, so that the few hard ones among all items decide.

    Source: Mao et al., SimpleX: A Simple and Strong Baseline for Collaborative Filtering, CIKM 2021.
    """

    class Config(ImplicitRetriever.Config):
        """Hyper-parameters.

        Attributes:
            margin: cosine below which a negative is left alone.
            negative_weight: of the mean over negatives, against 1 for the positive.
            own_weight: g, the share of the user's own vector; the rest is the history's.
        """

        margin: float = Field(default=0.4, ge=-1, lt=1)
        negative_weight: float = Field(default=300.0, gt=0)
        own_weight: float = Field(default=0.5, ge=0, le=1)

    name = "simplex"
    config: Config

    def learn(self, pairs: Interactions, progress: Progress | None) -> tuple[Tensor, Tensor]:
        config = self.config
        own_UD, item_ID = self.start(pairs)
        mixing_DD = torch.eye(config.dim).requires_grad_()
        mean = pairs.matrix(1 / pairs.per_user_U[pairs.user_P])

        def vectors() -> tuple[Tensor, Tensor]:
            history_UD = mean @ item_ID @ mixing_DD
            user_UD = config.own_weight * own_UD + (1 - config.own_weight) * history_UD
            return F.normalize(user_UD, dim=1), F.normalize(item_ID, dim=1)

        def loss(user_B: Tensor) -> Tensor:
            user_UD, unit_ID = vectors()
            row_Q, item_Q = pairs.of_users(user_B)
            value = cosine_contrastive_loss(
                user_UD[user_B],
                unit_ID,
                row_Q,
                item_Q,
                margin=config.margin,
                negative_weight=config.negative_weight,
            )
            return value + self.penalty(own_UD[user_B], item_ID[item_Q])

        descend((own_UD, item_ID, mixing_DD), loss, pairs.users, config, progress)
        with torch.no_grad():
            return vectors()
