"""Test-time training: the nodes that a user's recent items have in common are examples that cost no label."""

# Shapes: B users, E events, I items, G nodes of a level, P pairs, J nodes that a beam keeps, N levels, T tasks.

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank.batch import Batch, RowGather
from fullrank.retrieval.hierarchy.hsnn import HSNN
from fullrank.retrieval.hierarchy.network import Users
from fullrank.retrieval.vectors.base import places_of

BATCH = 256


@dataclass(frozen=True)
class Events:
    """Positive interactions of some users.

    Attributes:
        user_E: int64, row of the user.
        key_E: int64, key of the item.
        time_E: of the interaction, in any unit.
    """

    user_E: Tensor
    key_E: Tensor
    time_E: Tensor

    def some(self, which_E: Tensor) -> Events:
        return Events(self.user_E[which_E], self.key_E[which_E], self.time_E[which_E])


@dataclass(frozen=True)
class Pairs:
    """Users and nodes, with labels.

    Attributes:
        users: their features.
        level_P: int64, level of the node.
        user_P: int64, row of `users`.
        codes_PN: int64, the node's codes; those below its level are 0 and mean nothing.
        label_P: 1 for a node of the user's interest, 0 for one that the beam keeps and the user has nothing under.
    """

    users: RowGather
    level_P: Tensor
    user_P: Tensor
    codes_PN: Tensor
    label_P: Tensor

    def __len__(self) -> int:
        return len(self.level_P)


@dataclass(frozen=True)
class Adaptation:
    """What came of a training.

    Attributes:
        pairs: learnt from.
        before: cross-entropy of the pairs held out, before; None if there are none.
        after: afterwards.
        kept: whether the network is the adapted one.
    """

    pairs: int
    before: float | None
    after: float | None
    kept: bool


class TestTimeTrainer:
    """Teaches the networks of nodes what users have turned to since the index was trained.

    From the leaf of each recent item it climbs up to `depth` levels. A node that has at least `interest_rate` of the
    user's recent items below it is a positive pair; negatives are nodes of the same level that the user's beam keeps
    and that have none. One pass over the pairs moves the user towers and over-arches of the nodes' networks; items,
    tables and codewords stay, and with them all that the index holds. The last part of the recent items is kept out:
    unless the loss of its nodes falls, everything goes back.

    Args:
        depth: levels to climb, the leaf being the first; 0 gives no pairs. Coarser nodes say less.
        interest_rate: share of a user's items that a node needs, of the leaf and of each level above; the last number
            holds for all further ones.
        negatives: for each positive pair.
        lr_scale: of the learning rate of training.
        guard: hold out the last fifth of the events, and go back if they get worse.

    Raises:
        ValueError: if an argument is out of range.

    Source: Efficient Retrieval Scaling with Hierarchical Indexing (arXiv 2604.12965), which has the idea, the depth of
    2 and rates of .4 to .8 by level. Negatives, the learning rate and the guard are ours.
    """

    __test__ = False  # to pytest it looks like a test

    def __init__(
        self,
        retriever: HSNN,
        *,
        depth: int = 2,
        interest_rate: Sequence[float] = (0.4, 0.8),
        negatives: int = 4,
        lr_scale: float = 0.1,
        guard: bool = True,
        seed: int = 0,
    ) -> None:
        if depth < 0 or negatives < 1 or lr_scale <= 0 or not interest_rate or min(interest_rate) <= 0:
            raise ValueError(
                f"depth {depth}, negatives {negatives}, lr_scale {lr_scale}, interest_rate {tuple(interest_rate)}: "
                "expected at least 0, at least 1, and numbers above 0"
            )
        self.retriever, self.network = retriever, retriever.network
        self.depth, self.interest_rate, self.negatives = depth, tuple(interest_rate), negatives
        self.lr_scale, self.guard = lr_scale, guard
        self.generator = torch.Generator().manual_seed(seed)
        self._before: dict[str, Tensor] | None = None

    def build_pairs(self, users: Batch, events: Events, cut: float) -> tuple[Pairs, Pairs]:
        """Pairs to learn from, and pairs to judge by.

        Args:
            users: their features as of the cut.
            events: of any time; only those before the cut, of items that are in the index, are looked at.

        Raises:
            ValueError: if nothing has been indexed.
        """
        codes = _codes_of(self.retriever, events.key_E)
        past_E = (events.time_E < cut) & (codes[:, 0] >= 0)
        events, codes_EN = events.some(past_E), codes[past_E]
        last = _last_of_each_user(events, 0.2) if self.guard else torch.zeros(len(codes_EN), dtype=torch.bool)
        batch = RowGather(users)
        with torch.no_grad():
            encoded = self.network.encode_users(users)
        kept = self._beam(encoded)
        learn = self._pairs(batch, events.some(~last), codes_EN[~last], kept, self.interest_rate)
        judge = self._pairs(batch, events.some(last), codes_EN[last], kept, (1e-9,))
        return learn, judge

    def _pairs(
        self, users: RowGather, events: Events, codes_EN: Tensor, kept: list[Tensor], rates: Sequence[float]
    ) -> Pairs:
        levels = self.network.num_levels
        count_B = torch.bincount(events.user_E, minlength=len(users))
        parts: list[tuple[Tensor, ...]] = []
        for height in range(min(self.depth, levels)):
            level, rate = levels - 1 - height, rates[min(height, len(rates) - 1)]
            node_E = self._numbers(codes_EN, level)
            key = torch.stack([events.user_E, node_E], 1)
            below, times = torch.unique(key, dim=0, return_counts=True)
            chosen = below[times >= rate * count_B[below[:, 0]]]
            parts.append(self._labelled(chosen, 1.0, level))
            drawn = []
            for user, node_J in enumerate(kept[level]):
                wanted = self.negatives * int((chosen[:, 0] == user).sum()) if len(chosen) else 0
                if wanted:
                    free = node_J[(node_J >= 0) & ~torch.isin(node_J, below[below[:, 0] == user, 1])]
                    some = free[torch.randperm(len(free), generator=self.generator)[:wanted]]
                    drawn.append(torch.stack([torch.full_like(some, user), some], 1))
            if drawn:
                parts.append(self._labelled(torch.cat(drawn), 0.0, level))
        if not parts:
            none = torch.zeros(0, dtype=torch.int64)
            return Pairs(users, none, none, torch.zeros((0, levels), dtype=torch.int64), torch.zeros(0))
        return Pairs(users, *(torch.cat(part) for part in zip(*parts, strict=True)))

    def _labelled(self, pairs_P2: Tensor, label: float, level: int) -> tuple[Tensor, ...]:
        """Columns of `Pairs` for pairs of user and number of a node of a level."""
        rows = len(pairs_P2)
        codes_PN = torch.zeros((rows, self.network.num_levels), dtype=torch.int64)
        rest = pairs_P2[:, 1]
        for above in reversed(range(level + 1)):
            size = self.retriever.nodes.config.num_nodes[above]
            codes_PN[:, above], rest = rest % size, rest // size
        return torch.full((rows,), level), pairs_P2[:, 0], codes_PN, torch.full((rows,), label)

    def _numbers(self, codes_EN: Tensor, level: int) -> Tensor:
        """Nodes of a level as numbers: their codes as digits."""
        number_E = torch.zeros(len(codes_EN), dtype=torch.int64)
        for above in range(level + 1):
            number_E = number_E * self.retriever.nodes.config.num_nodes[above] + codes_EN[:, above]
        return number_E

    @torch.no_grad()
    def _beam(self, users: Users) -> list[Tensor]:
        """Of each level, numbers of the nodes that the beam of each user keeps, (B, J); -1 for none."""
        assert self.retriever.hierarchy is not None
        codes_IN = self.retriever.codes(self.retriever.hierarchy.state()["vectors"])
        kept: list[Tensor] = []
        parts: list[Tensor] = []
        for level, width in enumerate(self.retriever.config.beam):
            codes_GN = torch.unique(codes_IN[:, : level + 1], dim=0)
            node_G = self._numbers(codes_GN, level)
            if parts:  # columns of the level above, repeated for their children
                above = self._numbers(torch.unique(codes_IN[:, :level], dim=0), level - 1)
                parent_G = torch.searchsorted(above, self._numbers(codes_GN[:, :level], level - 1))
                parts = [part[:, parent_G] for part in parts]
            parts.append(self.network.node_logits(level, users, self.retriever.nodes.node_vectors(codes_GN)))
            score_BG = self.network.ensemble(level, parts) @ self.retriever._weights()
            if level:
                parents_G = self._numbers(codes_GN[:, :level], level - 1)
                score_BG = score_BG.masked_fill(~_among(parents_G, kept[-1]), -torch.inf)
            best_BJ, place_BJ = score_BG.topk(min(width, len(node_G)), dim=1)
            kept.append(node_G[place_BJ].masked_fill(best_BJ == -torch.inf, -1))
        return kept

    def adapt(self, pairs: tuple[Pairs, Pairs]) -> Adaptation:
        """Learn from pairs, once through, and keep it if those held out get better; undone by `rollback`."""
        learn, judge = pairs
        self._before = copy.deepcopy(self.network.state_dict())
        before = self._loss_of(judge)
        parameters = [
            parameter
            for network in self.network.node_networks
            for name, parameter in network.named_parameters()
            if name.startswith(("user_tower.", "over_arch."))
        ]
        optimizer = torch.optim.Adam(parameters, lr=self.lr_scale * self.retriever.config.training.learning_rate)
        for rows in torch.split(torch.randperm(len(learn), generator=self.generator), BATCH):
            if not len(rows):
                break
            loss = self._loss(learn, rows)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        after = self._loss_of(judge)
        kept = not self.guard or (before is not None and after is not None and after < before)
        if not kept:
            self.rollback()
        return Adaptation(len(learn), before, after, kept)

    def rollback(self) -> None:
        """The network as it was before the last `adapt`, to the bit."""
        if self._before is not None:
            self.network.load_state_dict(self._before)
            self._before = None

    def _loss(self, pairs: Pairs, rows: Tensor) -> Tensor:
        """Mean cross-entropy of some pairs."""
        total = torch.zeros(())
        for level in torch.unique(pairs.level_P[rows]).tolist():
            some = rows[pairs.level_P[rows] == level]
            users = self.network.encode_users(pairs.users.take(pairs.user_P[some]))
            parts = [
                self.network.node_logits(
                    above, users, self.retriever.nodes.node_vectors(pairs.codes_PN[some, : above + 1])[:, None]
                )
                for above in range(level + 1)
            ]
            logit_P = (self.network.ensemble(level, parts) @ self.retriever._weights()).squeeze(1)
            total = total + F.binary_cross_entropy_with_logits(logit_P, pairs.label_P[some], reduction="sum")
        return total / len(rows)

    @torch.no_grad()
    def _loss_of(self, pairs: Pairs) -> float | None:
        if not len(pairs):
            return None
        parts = torch.split(torch.arange(len(pairs)), BATCH)
        return float(sum(self._loss(pairs, rows) * len(rows) for rows in parts)) / len(pairs)


def _codes_of(retriever: HSNN, key_E: Tensor) -> Tensor:
    """Codes of items that are in the index, (E, N); -1 of others."""
    if retriever.hierarchy is None:
        raise ValueError("test-time training needs the items to be indexed")
    held = retriever.hierarchy.state()
    keys_I, order_I = held["keys"].sort()
    codes_IN = retriever.codes(held["vectors"])
    codes_EN = torch.full((len(key_E), codes_IN.shape[1]), -1)
    if len(keys_I):
        place_E = places_of(key_E, keys_I)
        found_E = place_E >= 0
        codes_EN[found_E] = codes_IN[order_I[place_E[found_E]]]
    return codes_EN


def _last_of_each_user(events: Events, share: float) -> Tensor:
    """Which events are among the last of their user; the one event of a user is not."""
    order = events.time_E.argsort(stable=True)
    order = order[events.user_E[order].argsort(stable=True)]
    user_E = events.user_E[order]
    count_B = torch.bincount(user_E)
    place_E = torch.arange(len(user_E)) - (count_B.cumsum(0) - count_B)[user_E]
    last = torch.zeros(len(user_E), dtype=torch.bool)
    held_B = (share * count_B).ceil().long().minimum((count_B - 1).clamp_min(0))
    last[order] = place_E >= (count_B - held_B)[user_E]
    return last


def _among(number_G: Tensor, kept_BJ: Tensor) -> Tensor:
    """Which numbers each row has, (B, G)."""
    return (number_G[None, :, None] == kept_BJ[:, None, :]).any(2)
