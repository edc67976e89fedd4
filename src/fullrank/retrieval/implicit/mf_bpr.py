"""Matrix factorisation with the pairwise loss BPR: the baseline of implicit feedback."""

# Shapes: B pairs of a batch, U users, I items, D width of vectors.

from __future__ import annotations

from torch import Tensor

from fullrank.retrieval.base import Progress
from fullrank.retrieval.implicit.base import ImplicitRetriever, descend
from fullrank.retrieval.implicit.interactions import Interactions
from fullrank.retrieval.implicit.losses import bpr_loss


class MatrixFactorization(ImplicitRetriever):
    """Score = u·v with free vectors; each pair is to score above the same user with an item drawn evenly.

    Source: Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, UAI 2009.
    """

    class Config(ImplicitRetriever.Config):
        """Hyper-parameters."""

        epochs: int = 40
        l2: float = 1e-4

    name = "mf_bpr"
    config: Config

    def learn(self, pairs: Interactions, progress: Progress | None) -> tuple[Tensor, Tensor]:
        user_UD, item_ID = self.start(pairs)

        def loss(pair_B: Tensor) -> Tensor:
            user_B = pairs.user_P[pair_B]
            users_BD, items_BD = user_UD[user_B], item_ID[pairs.item_P[pair_B]]
            others_BD = item_ID[pairs.others(user_B)]
            return bpr_loss(users_BD, items_BD, others_BD) + self.penalty(users_BD, items_BD, others_BD)

        descend((user_UD, item_ID), loss, len(pairs), self.config, progress)
        return user_UD.detach(), item_ID.detach()
