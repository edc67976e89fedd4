"""LightGCN: free vectors smoothed over the graph of users and items, and nothing else."""

# Shapes: B users (or pairs) of a batch, Q pairs of its users, P pairs, U users, I items, D width of vectors.

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fullrank.retrieval.base import Progress
from fullrank.retrieval.implicit.base import ImplicitRetriever, descend
from fullrank.retrieval.implicit.interactions import Interactions
from fullrank.retrieval.implicit.losses import bpr_loss, cosine_contrastive_loss, softmax_loss


class LightGCN(ImplicitRetriever):
    """Score = u·v, each vector the mean of a free one and of its smoothed forms after 1 to `layers` steps.

    A step gives each user the sum of its items' vectors over sqrt(pairs of the user · pairs of the item), and each item
    likewise that of its users: no weights and no activations. Without layers this is matrix factorisation.

    Deviation: the paper trains with the pairwise loss `bpr`. The two others are of the cosine and the whole catalogue:
    `softmax` is cross-entropy of the cosine over a temperature, `cosine_contrastive` the loss of SimpleX. A step costs
    one propagation, as with `bpr`, and learns from all pairs of its users, so that minutes on a processor are enough.

    Source: He et al., LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation, SIGIR 2020.
    """

    class Config(ImplicitRetriever.Config):
        """Hyper-parameters.

        Attributes:
            layers: steps of smoothing.
            loss: `softmax` and `cosine_contrastive`, in batches of users, or `bpr`, in batches of pairs.
            temperature: divides the cosine in `softmax`.
            margin: of `cosine_contrastive`: cosine below which a negative is left alone.
            negative_weight: of `cosine_contrastive`: of the mean over negatives, against 1 for the positive.
            dropout: share of the numbers of a user's vector that a step leaves out; none with `bpr`.
        """

        layers: int = Field(default=3, ge=0)
        loss: Literal["softmax", "cosine_contrastive", "bpr"] = "softmax"
        temperature: float = Field(default=0.1, gt=0)
        margin: float = Field(default=0.9, ge=-1, lt=1)
        negative_weight: float = Field(default=250.0, gt=0)
        dropout: float = Field(default=0.0, ge=0, lt=1)

    name = "lightgcn"
    config: Config

    def learn(self, pairs: Interactions, progress: Progress | None) -> tuple[Tensor, Tensor]:
        config = self.config
        user_UD, item_ID = self.start(pairs)
        smooth = pairs.matrix((pairs.per_user_U[pairs.user_P] * pairs.per_item_I[pairs.item_P]).rsqrt())
        back = smooth.transposed

        def vectors() -> tuple[Tensor, Tensor]:
            users, items = [user_UD], [item_ID]
            for _ in range(config.layers):
                last_UD, last_ID = users[-1], items[-1]
                users.append(smooth @ last_ID)
                items.append(back @ last_UD)
            mean_UD, mean_ID = sum(users, torch.zeros(())) / len(users), sum(items, torch.zeros(())) / len(items)
            if config.loss == "bpr":
                return mean_UD, mean_ID
            return F.normalize(mean_UD, dim=1), F.normalize(mean_ID, dim=1)

        def whole(user_B: Tensor) -> Tensor:
            smoothed_UD, smoothed_ID = vectors()
            row_Q, item_Q = pairs.of_users(user_B)
            users_BD = F.dropout(smoothed_UD.index_select(0, user_B), config.dropout)
            if config.loss == "softmax":
                value = softmax_loss(users_BD / config.temperature, smoothed_ID, row_Q, item_Q)
            else:
                value = cosine_contrastive_loss(
                    users_BD,
                    smoothed_ID,
                    row_Q,
                    item_Q,
                    margin=config.margin,
                    negative_weight=config.negative_weight,
                )
            return value + self.penalty(user_UD[user_B], item_ID[item_Q])

        def bpr(pair_B: Tensor) -> Tensor:
            smoothed_UD, smoothed_ID = vectors()
            user_B, item_B = pairs.user_P[pair_B], pairs.item_P[pair_B]
            other_B = pairs.others(user_B)
            value = bpr_loss(smoothed_UD[user_B], smoothed_ID[item_B], smoothed_ID[other_B])
            return value + self.penalty(user_UD[user_B], item_ID[item_B], item_ID[other_B])

        loss, rows = (bpr, len(pairs)) if config.loss == "bpr" else (whole, pairs.users)
        descend((user_UD, item_ID), loss, rows, config, progress)
        with torch.no_grad():
            return vectors()
