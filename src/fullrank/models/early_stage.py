"""Early-stage ranker: a small network on a user vector and precomputed item vectors."""

# Shapes: B rows, U users, P candidates of each user, D width of the vectors, H hidden width, T tasks.

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.layers.mlp import Float32Linear
from fullrank.layers.towers import Towers
from fullrank.models.base import Hidden, InitStd, Ranker, RankerOutput
from fullrank.schema import Schema


class EarlyStageRanker(Ranker):
    """logits = W₂ relu(W_u u + W_a a + W_x (u⊙a) + b) + W_l a, with u of the user and context, a of the item.

    Only W_x touches a pair, at D·H multiplications; W_u u is computed once per request, W_a a and W_l a once per item
    and model. That is what lets it score thousands of candidates while the final stage affords hundreds.

    The paper's abstract names one multi-task model for all components of the final score; its body was not available,
    so towers and interaction are this library's reading.
    """

    name = "early_stage"
    source = "Early-stage ads ranking with multi-task learning, arXiv 2307.11096 (abstract)"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            hidden: widths of either tower's MLP.
            output_dim: D of the vectors of users and items.
            interaction_hidden: H, width of the layer in which the two meet.
        """

        embedding_init: InitStd = 0.01
        hidden: Hidden = (64,)
        output_dim: int = Field(default=32, ge=1)
        interaction_hidden: int = Field(default=32, ge=1)

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.towers = Towers(
            schema,
            config.embeddings,
            hidden=config.hidden,
            output_dim=config.output_dim,
        )
        width, hidden = config.output_dim, config.interaction_hidden
        self.from_user = Float32Linear(width, hidden)
        self.from_item = Float32Linear(width, hidden, bias=False)
        self.from_pair = Float32Linear(width, hidden, bias=False)
        self.head = Float32Linear(hidden, self.num_tasks)
        self.item_head = Float32Linear(width, self.num_tasks, bias=False)
        for layer in (self.from_user, self.from_item, self.from_pair, self.head, self.item_head):
            nn.init.xavier_normal_(layer.weight)
        for layer in (self.from_user, self.head):
            nn.init.zeros_(layer.bias)

    def output_biases(self) -> list[Tensor]:
        return [self.head.bias]

    def forward(self, batch: Batch) -> RankerOutput:
        user_BD, item_BD = self.towers(batch)
        hidden_BH = self.from_user(user_BD) + self.from_item(item_BD) + self.from_pair(user_BD * item_BD)
        return RankerOutput(self.head(torch.relu(hidden_BH)) + self.item_head(item_BD))

    def item_vectors(self, items: Batch) -> Tensor:
        """What `score` needs of each item: a, W_a a and W_l a side by side, shape (I, D + H + T)."""
        item_ID = self.towers.items(items)
        return torch.cat([item_ID, self.from_item(item_ID), self.item_head(item_ID)], 1)

    def score(self, users: Batch, items_UPV: Tensor) -> Tensor:
        """logits_UPT of P candidates of each user, given as rows of `item_vectors`: equal to `forward` on the pairs."""
        config = self.config
        user_UD = self.towers.users(users)
        item_UPD = items_UPV[..., : config.output_dim]
        from_item_UPH = items_UPV[..., config.output_dim : -self.num_tasks]
        from_item_UPT = items_UPV[..., -self.num_tasks :]
        hidden_UPH = from_item_UPH + self.from_user(user_UD)[:, None, :]
        hidden_UPH = hidden_UPH + self.from_pair(item_UPD * user_UD[:, None, :])
        logits_UPT: Tensor = self.head(torch.relu(hidden_UPH)) + from_item_UPT
        return logits_UPT
