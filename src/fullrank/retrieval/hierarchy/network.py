"""Networks of an index: one over the items and one over each level of nodes, on common tables, and their ensemble."""

# Shapes: B users, I items, M items of a user, U vectors of a user, D width of a vector, E width of an item, N levels,
# A values of an item, C lists, L their length, F counts of a pair, S = E + A numbers stored of an item, T tasks.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import Tables
from fullrank.layers.towers import SideInputs
from fullrank.retrieval.hierarchy.interactions import InteractionCounts
from fullrank.retrieval.hierarchy.learning_to_index import LearningToIndex, Mode
from fullrank.retrieval.hierarchy.monn import MoNN
from fullrank.schema import Schema

# Rows of a tower's forward pass when all items are encoded.
ROWS_AT_ONCE = 8192


class Users(NamedTuple):
    """Users as the networks see them.

    Attributes:
        vectors: of each level's network and last of the items', vectors_BUD.
        lists_BCL: of `InteractionCounts`.
    """

    vectors: tuple[Tensor, ...]
    lists_BCL: Tensor

    def take(self, rows: Tensor) -> Users:
        return Users(tuple(part[rows] for part in self.vectors), self.lists_BCL[rows])


class HierarchicalNetwork(nn.Module):
    """A MoNN for items, one for the nodes of each level, an index that says which nodes an item is under.

    A node comes to networks as the sum of its codewords, in place of an item's vector. The items' network scores it as
    if it were an item that has nothing in common with the user, and its level's network adds what that misses: z_n. The
    logits of level n are linear in z_1 .. z_n, each of the node's ancestor; of items, in all of them and their own.

    The items' network does not learn from nodes. Deviation: in the source a level's network scores nodes by itself; it
    then has to find out again all that the other knows, and a search finds less (`benchmarks.retrieval.index_quality`).

    An index holds of an item its vector and the values that `InteractionCounts` asks for, side by side: `stored`.

    Deviation: in the source nodes have towers of interactions, which learn from those of a node's items and serve those
    of the one item that stands for it. Here only items have: nodes then depend on nothing that can be removed.

    Args:
        items: sizes of the items' network.
        nodes: of the network of each level; none for items alone.
        index: None without levels.

    Raises:
        ValueError: if the networks differ in the vectors of an item, or in number from the levels.
    """

    def __init__(
        self,
        schema: Schema,
        tables: Tables,
        items: MoNN.Config,
        nodes: Sequence[MoNN.Config] = (),
        index: LearningToIndex.Config | None = None,
        *,
        mode: Mode = "joint",
        linear_ensemble: bool = True,
    ) -> None:
        super().__init__()
        self.inputs = SideInputs(schema, tables)
        self.counts = InteractionCounts(schema)
        tasks = max(1, len(schema.labels))
        user, item = self.inputs.side_widths["user"], self.inputs.side_widths["item"]
        self.item_network = MoNN(user, item, self.counts.width, tasks, items)
        levels = 0 if index is None else len(index.num_nodes)
        if len(nodes) != levels:
            raise ValueError(f"there are {len(nodes)} networks of nodes for {levels} levels of the index")
        for config in nodes:
            if (config.item_vectors, config.vector_dim) != (items.item_vectors, items.vector_dim):
                raise ValueError("networks of nodes take as many item vectors, of the same width, as that of items")
        self.node_networks = nn.ModuleList(MoNN(user, None, 0, tasks, config) for config in nodes)
        self.index = None if index is None else LearningToIndex(items.item_dim, index, mode=mode)
        self.ensemble = Ensemble(levels + 1, tasks, linear=linear_ensemble)
        self._flops: dict[int, int] = {}

    @property
    def num_levels(self) -> int:
        return len(self.node_networks)

    def networks(self) -> list[MoNN]:
        """Those of the levels, and last that of items."""
        return [*self.node_networks, self.item_network]

    def encode_users(self, batch: Batch) -> Users:
        inputs_BK = self.inputs.side("user", batch)
        return Users(tuple(net.encode_users(inputs_BK) for net in self.networks()), self.counts.user_lists(batch))

    def encode_items(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """vectors_IE and values_IA."""
        vectors_IE = self.item_network.encode_items(self.inputs.side("item", batch))
        return vectors_IE, self.counts.item_values(batch)

    @torch.no_grad()
    def stored(self, batch: Batch) -> Tensor:
        """stored_IS of many items, encoded in pieces."""
        pieces = []
        for begin in range(0, len(batch), ROWS_AT_ONCE):
            vectors_IE, values_IA = self.encode_items(batch[begin : begin + ROWS_AT_ONCE])
            pieces.append(torch.cat([vectors_IE, values_IA.float()], 1))
        return torch.cat(pieces) if pieces else torch.zeros(0, self.stored_width)

    @property
    def stored_width(self) -> int:
        """S."""
        return self.item_network.config.item_dim + self.counts.num_values

    def node_logits(self, level: int, users: Users, nodes: Tensor) -> Tensor:
        """z_BMT of nodes of a level, each user's own (B, M, E) or the same for all (M, E)."""
        with torch.no_grad():
            nothing = self.item_network.encode_interactions(nodes.new_zeros(1, 1, self.counts.width))
            as_items = self.item_network.score_grid(users.vectors[-1], nodes, nothing)
        return as_items + self.networks()[level].score_grid(users.vectors[level], nodes)

    def item_logits(self, users: Users, items: Tensor, values: Tensor) -> Tensor:
        """z_BMT of the items' network, likewise, with values (B, M, A) or (M, A)."""
        interactions = None
        if self.counts.width:
            interactions = self.item_network.encode_interactions(self.counts(users.lists_BCL, values))
        return self.item_network.score_grid(users.vectors[-1], items, interactions)

    def flops_per_pair(self, level: int | None) -> int:
        """Of a user and a node of a level, or an item for None; counted once."""
        place = self.num_levels if level is None else level
        if place not in self._flops:
            own = self.networks()[place].flops_per_pair()
            self._flops[place] = own if level is None else own + self.flops_per_pair(None)
        return self._flops[place]

    def stored_logits(self, users: Users, stored: Tensor) -> Tensor:
        """`item_logits` of what an index holds, (B, M, S) or (M, S)."""
        width = self.item_network.config.item_dim
        return self.item_logits(users, stored[..., :width], stored[..., width:].long())


class Ensemble(nn.Module):
    """Logits of a level: w_1 z_1 + .. + w_n z_n + b, one weight for each network down to it; those of the level's own
    network alone in the beginning, and for good unless `linear`.
    """

    def __init__(self, levels: int, num_tasks: int, *, linear: bool = True) -> None:
        super().__init__()
        self.linear = linear
        self.weights = nn.ParameterList(torch.eye(level)[-1] for level in range(1, levels + 1))
        self.bias_LT = nn.Parameter(torch.zeros(levels, num_tasks))
        self.requires_grad_(linear)

    def forward(self, level: int, logits: Sequence[Tensor]) -> Tensor:
        """From z_1 .. z_{level + 1}, of any one shape (.., T)."""
        if not self.linear:
            return logits[-1]
        total = self.bias_LT[level]
        for weight, part in zip(self.weights[level], logits, strict=True):
            total = total + weight * part
        return total

    def of_scores(self, level: int, scores_BIN: Tensor, weights_T: Tensor) -> Tensor:
        """The score by a weighted sum of tasks, (B, I), from those of the networks down to a level."""
        if not self.linear:
            return scores_BIN[..., -1]
        total: Tensor = scores_BIN @ self.weights[level] + self.bias_LT[level] @ weights_T
        return total
