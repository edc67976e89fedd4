"""How networks and their index learn together: what a step sees, its losses, and when nodes are found anew."""

# Shapes: B rows of a step, P rows of the log, I items of a step, C items of the catalogue, E width of an item,
# A values of an item, S nodes drawn for the tail, G members of each, N levels, T tasks.

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fullrank.batch import Batch, RowGather
from fullrank.models.base import task_loss
from fullrank.retrieval.base import Progress
from fullrank.retrieval.hierarchy.learning_to_index import Mode
from fullrank.retrieval.hierarchy.losses import distillation, log_inclusion, sampled_softmax, tail_loss, tail_target
from fullrank.retrieval.hierarchy.network import HierarchicalNetwork, Users
from fullrank.schema import Schema

# Items that codewords are found from, and that nodes' members are drawn from.
SAMPLED_ITEMS = 1 << 16
# Users of a step that nodes are held against their members for, and that nodes learn a softmax of items from: there are
# far fewer nodes than items, so that they need fewer.
TAIL_USERS, NODE_USERS = 128, 64

# Beginning of the names of losses of nodes; those of items are named by what they are.
NODES = "node "
OF_ITEMS = ("softmax", "impressions", "distillation")

# Told a loss's name, the loss and its weight.
Add = Callable[[str, Tensor, float], None]


class Training(BaseModel):
    """What is learnt from, and how long.

    Attributes:
        softmax: weight of the softmax of a positive's item among those of the step.
        impressions: weight of the loss of each task on all rows, clicked or not.
        distillation: weight of the cross-entropy, on items drawn for a user that nobody labelled, to a slow copy.
        teacher_decay: of that copy, whose weights are the running mean of the network's.
        negatives: items drawn from the catalogue for each step, beside those of its rows.
        node_objective: what nodes learn: `bce` the losses of items, as the source has it; `tail` the logit of their
            best members, which a search needs; `both` the first while items learn, then, items and codewords being
            still, the second.
        mode: how the index learns, see `LearningToIndex`.
        index_start: share of the steps before there is an index.
        index_warmup: share of the index's steps in which the weight of its losses rises to 1.
        refresh_every: steps between two looks at the catalogue: k-means of `em` and `separate`, codewords that are
            moved, members of nodes.
        tail_steps: further steps of `both`, in which only nodes' networks and a linear ensemble learn.
        tail_nodes: nodes of a step that `tail` looks at.
        tail_members: members drawn of each.
        tail_top: best of them that a node is held against.
        batch_size: rows of a step.
        epochs: passes over the rows.
        learning_rate: of Adam; falls to 0 linearly.
        seed: of initial weights, of the order of rows and of what is drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    softmax: float = Field(default=1.0, ge=0)
    impressions: float = Field(default=0.0, ge=0)
    distillation: float = Field(default=0.0, ge=0)
    teacher_decay: float = Field(default=0.99, ge=0, lt=1)
    negatives: int = Field(default=64, ge=0)
    node_objective: Literal["bce", "tail", "both"] = "both"
    mode: Mode = "joint"
    index_start: float = Field(default=0.15, ge=0, lt=1)
    index_warmup: float = Field(default=0.2, ge=0, le=1)
    refresh_every: int = Field(default=50, ge=1)
    tail_steps: int = Field(default=300, ge=0)
    tail_nodes: int = Field(default=16, ge=1)
    tail_members: int = Field(default=48, ge=1)
    tail_top: int = Field(default=4, ge=1)
    batch_size: int = Field(default=128, ge=2)
    epochs: int = Field(default=3, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    seed: int = 0


@dataclass(frozen=True)
class TrainingData:
    """Rows of a log and the catalogue.

    Attributes:
        rows: users with their context, and labels.
        item_P: int64, the row's item as a row of `items`.
        items: the catalogue; all items of a step come from it, so that what changes with time, such as a counter, does
            not tell a positive from an item that was drawn.
    """

    rows: RowGather
    item_P: Tensor
    items: RowGather


class HierarchicalTrainer:
    """Trains a `HierarchicalNetwork`.

    Raises:
        ValueError: if there is nothing to learn from, or fewer items than nodes of a level.
    """

    def __init__(self, network: HierarchicalNetwork, data: TrainingData, schema: Schema, config: Training) -> None:
        if not (config.softmax or config.impressions):
            raise ValueError("training: one of softmax and impressions must be above 0")
        if network.index is not None and max(network.index.config.num_nodes) > len(data.items):
            raise ValueError(
                f"num_nodes {network.index.config.num_nodes}: more nodes than the {len(data.items)} items of the log"
            )
        self.network, self.data, self.schema, self.config = network, data, schema, config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.positive = next((i for i, label in enumerate(schema.labels) if label.kind == "binary"), 0)
        clicked_P = data.rows.batch.labels_BT[:, self.positive] == 1
        count_C = torch.bincount(data.item_P[clicked_P], minlength=len(data.items))
        self.frequency_C = count_C / count_C.sum().clamp_min(1)
        self.teacher = copy.deepcopy(network).requires_grad_(False) if config.distillation else None
        self.members: list[Members] = []
        self.indexing = False
        self._order = torch.zeros(0, dtype=torch.int64)
        self.tail = config.node_objective == "tail"

    def fit(self, progress: Progress | None = None) -> None:
        """All steps; progress is told every twentieth, and the loss of items, to which an index adds nothing."""
        config, network = self.config, self.network
        steps = config.epochs * max(1, len(self.data.item_P) // config.batch_size)
        start = round(config.index_start * steps)
        optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        network.train()
        for step in range(steps):
            rows = self._rows()
            if network.index is not None and step >= start:
                network.index.set_progress((step - start) / max(1, steps - start))
                if (step - start) % config.refresh_every == 0:
                    self.refresh(first=not self.indexing)
            ramp = min(1.0, (step - start + 1) / max(1.0, config.index_warmup * (steps - start)))
            losses = self.losses(rows, ramp)
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            self._teach()
            if progress is not None and (step + 1) % 20 == 0:
                progress(step + 1, steps, sum(losses[name].item() for name in OF_ITEMS if name in losses))
        network.eval()
        if network.index is not None:
            if config.mode != "joint" or not self.indexing:
                self.refresh(first=not self.indexing)
            network.index.set_progress(1.0)
            if config.node_objective == "both":
                self.learn_tails()

    def _rows(self) -> Tensor:
        """The rows of the next step; every row comes once in a pass."""
        size = self.config.batch_size
        if len(self._order) < min(size, len(self.data.item_P)):
            self._order = torch.randperm(len(self.data.item_P), generator=self.generator)
        rows, self._order = self._order[:size], self._order[size:]
        return rows

    def learn_tails(self) -> None:
        """Nodes' networks learn the best members of their nodes; the ensemble goes along. The last steps of `both`.

        From the first step on it does not do: most pairs of user and node are far from the best, and a network that
        has learnt nothing else gets those right and the few that a search turns on wrong.
        """
        config, network = self.config, self.network
        parameters = [
            *network.node_networks.parameters(),
            *(p for p in network.ensemble.parameters() if p.requires_grad),
        ]
        optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.tail_steps)
        self.tail = True
        self._find_members(self._sampled())
        for _ in range(config.tail_steps):
            rows = self._rows()
            if network.ensemble.linear:  # then items' scores hang on those of nodes
                loss = torch.stack(list(self.losses(rows).values())).sum()
            else:
                loss = self._tail(network.encode_users(self.data.rows.take(rows[:TAIL_USERS])))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def refresh(self, *, first: bool = False) -> None:
        """Look at the catalogue: codewords by k-means or moved, and which items are under which node.

        Args:
            first: begin the index: codewords by k-means of items, whatever the mode.
        """
        index, config = self.network.index, self.config
        assert index is not None
        stored_IS = self._sampled()
        vectors_IE = stored_IS[:, : index.dim]
        if first:
            index.fit(vectors_IE, seed=config.seed)
            self.indexing = True
        elif config.mode == "joint":
            index.reseed(vectors_IE, self.generator)
        else:
            index.fit(vectors_IE, iterations=3)
        if self.tail:
            self._find_members(stored_IS)

    def _sampled(self) -> Tensor:
        """stored_IS of the catalogue, or of items drawn from it."""
        kept = torch.randperm(len(self.data.items), generator=self.generator)[:SAMPLED_ITEMS].sort().values
        return self.network.stored(self.data.items.take(kept))

    def _find_members(self, stored_IS: Tensor) -> None:
        index = self.network.index
        assert index is not None
        codes_IN = index.assign(stored_IS[:, : index.dim])
        self.members = [Members.of(stored_IS, codes_IN, level) for level in range(index.num_levels)]

    def losses(self, rows: Tensor, ramp: float = 1.0) -> dict[str, Tensor]:
        """Weighted losses of some rows by name.

        Args:
            ramp: weight of what the index and its nodes learn.
        """
        config, network = self.config, self.network
        batch, own_B = self.data.rows.take(rows), self.data.item_P[rows]
        users = network.encode_users(batch)
        losses: dict[str, Tensor] = {}

        def add(name: str, loss: Tensor, weight: float) -> None:
            losses[name] = losses[name] + weight * loss if name in losses else weight * loss

        if config.impressions:
            by_level, extra = self._logits(users, own_B, pairs=True)
            for whose, logits_B1T, weight in self._weighted(by_level, ramp):
                loss = task_loss(logits_B1T[:, 0], batch.labels_BT, self.schema, batch.weights_B)
                add(f"{whose}impressions", loss, weight * config.impressions)
            for name, loss in extra.items():
                add(name, loss, ramp)
        if config.softmax or config.distillation:
            self._unlabelled(users, own_B, batch, ramp, add)
        if self.indexing and self.tail:
            add("tail", self._tail(users.take(torch.arange(len(rows))[:TAIL_USERS])), ramp)
        return losses

    def _weighted(self, by_level: list[Tensor], ramp: float) -> list[tuple[str, Tensor, float]]:
        """Logits of items, and of nodes where they learn the same, with the name and the weight of their losses."""
        nodes = [] if self.tail else by_level[:-1]
        return [("", by_level[-1], 1.0), *((NODES, logits, ramp) for logits in nodes)]

    def _unlabelled(self, users: Users, own_B: Tensor, batch: Batch, ramp: float, add: Add) -> None:
        """Losses on items that were drawn: softmax among them, and distillation."""
        config = self.config
        catalogue = len(self.data.items)
        clicked = (batch.labels_BT[:, self.positive] == 1).nonzero().squeeze(1)
        drawn = torch.randint(0, catalogue, (config.negatives,), generator=self.generator)
        items_I, place = torch.unique(torch.cat([own_B[clicked], drawn]), return_inverse=True)
        by_level, extra = self._logits(users, items_I)
        if config.softmax and len(clicked):
            log_q_I = log_inclusion(self.frequency_C[items_I], len(clicked), config.negatives, catalogue)
            for whose, logits_BIT, weight in self._weighted(by_level, ramp):
                rows = clicked[clicked < len(logits_BIT)]
                if len(rows):
                    score_BI = logits_BIT[..., self.positive][rows]
                    loss = sampled_softmax(score_BI, place[: len(rows)], log_q_I)
                    add(f"{whose}softmax", loss, weight * config.softmax)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self._logits(self.teacher.encode_users(batch), items_I, network=self.teacher)[0][-1]
            add("distillation", distillation(by_level[-1], taught), config.distillation)
        if not config.impressions:
            for name, loss in extra.items():
                add(name, loss, ramp)

    def _logits(
        self, users: Users, items_I: Tensor, *, pairs: bool = False, network: HierarchicalNetwork | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Logits of each level and, last, of items, and losses of the index itself.

        Nodes come with the first `NODE_USERS` only where nothing but their own loss hangs on them.

        Args:
            items_I: rows of the catalogue, for all users (logits_BIT), or with `pairs` one for each (logits_B1T).
        """
        network = network or self.network
        vectors_IE, values_IA = network.encode_items(self.data.items.take(items_I))

        def each(rows: Tensor) -> Tensor:
            return rows[:, None] if pairs else rows

        parts: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        if self.indexing and network.index is not None:
            out = network.index(vectors_IE)
            few = users
            if not (pairs or network.ensemble.linear):
                few = users.take(torch.arange(len(users.lists_BCL))[:NODE_USERS])
            parts = [network.node_logits(level, few, each(node)) for level, node in enumerate(out.nodes)]
            losses = {f"index {name}": loss for name, loss in out.losses.items()}
        parts.append(network.item_logits(users, each(vectors_IE), each(values_IA)))
        if not losses and len(parts) == 1:
            return parts, losses
        return [network.ensemble(level, parts[: level + 1]) for level in range(len(parts))], losses

    def _tail(self, users: Users) -> Tensor:
        """How far nodes of each level are from saying what their best members say, to each user."""
        network, config, total = self.network, self.config, []
        assert network.index is not None
        for level, members in enumerate(self.members):
            items_SG = members.draw(config.tail_nodes, config.tail_members, self.generator)
            with torch.no_grad():
                of_items = members.scores(network, users, items_SG.flatten(), self.positive)
                wanted_BS = tail_target(of_items.view(len(of_items), *items_SG.shape), config.tail_top)
            codes_SN = members.codes_IN[items_SG[:, 0]]
            nodes = [network.index.node_vectors(codes_SN[:, : above + 1]) for above in range(level + 1)]
            parts = [network.node_logits(above, users, node) for above, node in enumerate(nodes)]
            found_BS = network.ensemble(level, parts)[..., self.positive]
            total.append(tail_loss(found_BS, wanted_BS))
        return torch.stack(total).sum()

    @torch.no_grad()
    def _teach(self) -> None:
        if self.teacher is not None:
            pairs = zip(self.teacher.parameters(), self.network.parameters(), strict=True)
            for slow, fast in pairs:
                slow.lerp_(fast, 1 - self.config.teacher_decay)


@dataclass(frozen=True)
class Members:
    """Which of the sampled items are under each node of a level.

    Attributes:
        stored_IS: the items, ordered by node.
        codes_IN: their codes.
        node_I: their node, numbered among those that have items.
        begin_K: the first item of each node, and behind the last node the number of items.
    """

    stored_IS: Tensor
    codes_IN: Tensor
    node_I: Tensor
    begin_K: Tensor

    @classmethod
    def of(cls, stored_IS: Tensor, codes_IN: Tensor, level: int) -> Members:
        _, node_I, count_K = torch.unique(codes_IN[:, : level + 1], dim=0, return_inverse=True, return_counts=True)
        order = node_I.argsort(stable=True)
        begin_K = torch.cat([count_K.new_zeros(1), count_K.cumsum(0)])
        return cls(stored_IS[order], codes_IN[order], node_I[order], begin_K)

    def draw(self, nodes: int, members: int, generator: torch.Generator) -> Tensor:
        """Members of nodes that are drawn alike, (S, G); members may repeat."""
        count = len(self.begin_K) - 1
        nodes_S = torch.randperm(count, generator=generator)[:nodes]
        begin_S, end_S = self.begin_K[nodes_S], self.begin_K[nodes_S + 1]
        share_SG = torch.rand((len(nodes_S), members), generator=generator)
        return begin_S[:, None] + (share_SG * (end_S - begin_S)[:, None]).long()

    def scores(self, network: HierarchicalNetwork, users: Users, items: Tensor, task: int) -> Tensor:
        """What the ensemble says of items, (B, M)."""
        assert network.index is not None
        parts = [network.stored_logits(users, self.stored_IS[items])]
        if network.ensemble.linear:
            for level in reversed(range(network.num_levels)):
                codes, of_items = torch.unique(self.codes_IN[items, : level + 1], dim=0, return_inverse=True)
                nodes = network.node_logits(level, users, network.index.node_vectors(codes))
                parts.insert(0, nodes[:, of_items])
        total: Tensor = network.ensemble(network.num_levels, parts)[..., task]
        return total
