"""MoNN: towers of users, items and interactions, whose vectors meet in a network instead of one inner product."""

# Shapes: B users, I items, M items of a user, U vectors of a user, N of an item, X of an interaction, D width of a
# vector, E = N D width of an item, K user inputs, J item inputs, F interaction inputs, H hidden, T tasks.

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fullrank.layers.mlp import MLP
from fullrank.models.base import Hidden, NonEmptyHidden
from fullrank.models.dhen import DHENLayer
from fullrank.models.wukong import WukongLayer


class MoNN(nn.Module):
    """Logits of pairs from U vectors of the user, N of the item and X of their interaction.

    The towers run once per user and once per item; only the over-arch runs per pair. An item is one vector of width
    E = N D to the outside, so that an index can hold it.

    Over-arches: `mlp` reads all U N inner products beside the item, the interaction and a summary of the user; `wukong`
    and `dhen` run layers of these rankers on all vectors as tokens; `dot` is the sum of the inner products, and with
    U = N = 1 a two-tower model.

    Args:
        user_inputs: K.
        item_inputs: J; None if items come as vectors, as nodes of an index do.
        interaction_inputs: F, 0 for no tower of interactions.
        num_tasks: T.

    Source: Hierarchical Structured Neural Network (arXiv 2408.06653), which names towers, sizes and DHEN's over-arch.
    Deviation: towers are plain MLPs, and all vectors have one width, to which a tower's last layer projects.
    """

    class Config(BaseModel):
        """Sizes of one network.

        Attributes:
            user_vectors: vectors of a user.
            item_vectors: vectors of an item.
            interaction_vectors: vectors of an interaction.
            vector_dim: width of each.
            hidden: widths of the hidden layers of the user's and the item's tower.
            interaction_hidden: of the interaction's.
            over_arch: what the vectors meet in: `mlp`, `wukong`, `dhen` or `dot`.
            over_arch_layers: of Wukong or DHEN.
            over_arch_hidden: widths of the hidden layers of the MLP, above those layers if there are any.
        """

        model_config = ConfigDict(extra="forbid", frozen=True)

        user_vectors: int = Field(default=8, ge=1)
        item_vectors: int = Field(default=1, ge=1)
        interaction_vectors: int = Field(default=1, ge=1)
        vector_dim: int = Field(default=32, ge=1)
        hidden: Hidden = (64,)
        interaction_hidden: Hidden = (16,)
        over_arch: Literal["mlp", "wukong", "dhen", "dot"] = "mlp"
        over_arch_layers: int = Field(default=1, ge=1)
        over_arch_hidden: NonEmptyHidden = (32, 16)

        @property
        def item_dim(self) -> int:
            """E."""
            return self.item_vectors * self.vector_dim

    def __init__(
        self,
        user_inputs: int,
        item_inputs: int | None,
        interaction_inputs: int = 0,
        num_tasks: int = 1,
        config: Config | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or self.Config()
        width = config.vector_dim
        self.user_tower = MLP(user_inputs, config.hidden, config.user_vectors * width)
        self.item_tower = None if item_inputs is None else MLP(item_inputs, config.hidden, config.item_dim)
        crossed = config.interaction_vectors * width if interaction_inputs else 0
        self.interaction_tower = MLP(interaction_inputs, config.interaction_hidden, crossed) if crossed else None
        self.interaction_dim = crossed
        sizes = (config.user_vectors, config.item_vectors, crossed // width)
        self.over_arch: nn.Module
        if config.over_arch == "mlp":
            self.over_arch = PairMLP(*sizes, width, config.over_arch_hidden, num_tasks)
        elif config.over_arch == "dot":
            if num_tasks > 1 or crossed:
                raise ValueError("over_arch: a dot product has one task and reads no interactions")
            self.over_arch = DotProduct()
        else:
            self.over_arch = TokenOverArch(sum(sizes), config, num_tasks)

    def encode_users(self, inputs_BK: Tensor) -> Tensor:
        """vectors_BUD."""
        vectors: Tensor = self.user_tower(inputs_BK)
        return vectors.view(len(vectors), -1, self.config.vector_dim)

    def encode_items(self, inputs_IJ: Tensor) -> Tensor:
        """items_IE."""
        assert self.item_tower is not None, "this network takes items as vectors"
        items: Tensor = self.item_tower(inputs_IJ)
        return items

    def encode_interactions(self, inputs_BMF: Tensor) -> Tensor | None:
        """Vectors of interactions side by side, (B, M, X D); None without a tower."""
        return None if self.interaction_tower is None else self.interaction_tower(inputs_BMF)

    def score_grid(self, users_BUD: Tensor, items: Tensor, interactions: Tensor | None = None) -> Tensor:
        """logits_BMT of each user with M items.

        Args:
            items: each user's own, (B, M, E), or the same for all, (M, E), which is cheaper.
            interactions: what `encode_interactions` gives of these pairs, or of one pair (1, 1, X D), for all alike.
        """
        tokens = items.view(*items.shape[:-1], self.config.item_vectors, self.config.vector_dim)
        logits: Tensor = self.over_arch(users_BUD, tokens, interactions)
        return logits

    def score_pairs(self, users_BUD: Tensor, items_BE: Tensor, interactions: Tensor | None = None) -> Tensor:
        """logits_BT of each row's user with its item; `interactions` of shape (B, X D)."""
        crossed = None if interactions is None else interactions[:, None]
        return self.score_grid(users_BUD, items_BE[:, None], crossed).squeeze(1)

    def flops_per_pair(self) -> int:
        """Floating-point operations of a further item of a user, a multiply-add as 2: what the over-arch costs."""
        counts = []
        users_1UD = torch.zeros(1, self.config.user_vectors, self.config.vector_dim)
        for items in (2, 3):
            crossed = torch.zeros(1, items, self.interaction_dim) if self.interaction_tower is not None else None
            # PyTorch's counter hooks onto gradients, so they stay enabled.
            with torch.enable_grad(), FlopCounterMode(display=False) as counter:
                self.score_grid(users_1UD, torch.zeros(1, items, self.config.item_dim), crossed)
            counts.append(int(counter.get_total_flops()))
        return counts[1] - counts[0]


class PairMLP(nn.Module):
    """MLP([u_a·v_b for all a, b, v, x, summary of u]). Its first layer is a sum: the user's part is computed once."""

    def __init__(
        self, user_vectors: int, item_vectors: int, crossed: int, width: int, hidden: tuple[int, ...], num_tasks: int
    ) -> None:
        super().__init__()
        self.of_products = nn.Linear(user_vectors * item_vectors, hidden[0])
        self.of_user = nn.Linear(user_vectors * width, hidden[0], bias=False)
        self.of_item = nn.Linear(item_vectors * width, hidden[0], bias=False)
        self.of_interaction = nn.Linear(crossed * width, hidden[0], bias=False) if crossed else None
        self.mlp = MLP(hidden[0], hidden[1:], num_tasks)

    def forward(self, users_BUD: Tensor, items: Tensor, interactions: Tensor | None) -> Tensor:
        hidden_BMH = self.of_products(_products(users_BUD, items))
        hidden_BMH = hidden_BMH + self.of_user(users_BUD.flatten(1))[:, None] + self.of_item(items.flatten(-2))
        if self.of_interaction is not None:
            hidden_BMH = hidden_BMH + self.of_interaction(interactions)
        logits: Tensor = self.mlp(F.relu(hidden_BMH))
        return logits


class DotProduct(nn.Module):
    """Σ u_a·v_b."""

    def forward(self, users_BUD: Tensor, items: Tensor, interactions: Tensor | None) -> Tensor:
        return _products(users_BUD, items).sum(2, keepdim=True)


class TokenOverArch(nn.Module):
    """Layers of Wukong or DHEN on all vectors of a pair as tokens, then an MLP."""

    def __init__(self, tokens: int, config: MoNN.Config, num_tasks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width, out = config.vector_dim, max(2, tokens // 2)
        for _ in range(config.over_arch_layers):
            layer: WukongLayer | DHENLayer
            if config.over_arch == "wukong":
                layer = WukongLayer(tokens, out, out, width, min(8, tokens), config.over_arch_hidden)
            else:
                layer = DHENLayer(tokens, width, ("dlrm", "linear"), out)
            layers.append(layer)
            tokens = layer.out_tokens
        self.layers = nn.Sequential(*layers)
        self.mlp = MLP(tokens * width, config.over_arch_hidden, num_tasks, normalized=True)

    def forward(self, users_BUD: Tensor, items: Tensor, interactions: Tensor | None) -> Tensor:
        rows, width = users_BUD.shape[0], users_BUD.shape[2]
        items_BMND = items.expand(rows, *items.shape[-3:])
        pairs = items_BMND.shape[1]
        parts = [users_BUD[:, None].expand(-1, pairs, -1, -1), items_BMND]
        if interactions is not None:
            parts.append(interactions.expand(rows, pairs, -1).reshape(rows, pairs, -1, width))
        tokens = torch.cat(parts, 2).flatten(0, 1)
        logits: Tensor = self.mlp(self.layers(tokens).flatten(1))
        return logits.view(rows, pairs, -1)


def _products(users_BUD: Tensor, items: Tensor) -> Tensor:
    """All inner products of a pair's vectors, (B, M, U N), from items (B, M, N, D) or (M, N, D)."""
    if items.ndim == 3:
        products = users_BUD.flatten(0, 1) @ items.flatten(0, 1).T
        shape = (*users_BUD.shape[:2], *items.shape[:2])
        return products.view(shape).permute(0, 2, 1, 3).flatten(2)
    products = torch.bmm(items.flatten(1, 2), users_BUD.transpose(1, 2))
    return products.view(*items.shape[:3], -1).transpose(2, 3).flatten(2)
