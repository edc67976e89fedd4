"""Early-stage ranker: vectors of the user and of precomputed items for all tasks, and how they meet."""

# Shapes: B rows, U users, P candidates of each user, I items, D width of a vector, W width of all vectors of a side,
# H hidden width, T tasks.

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.layers.experts import ExpertTower
from fullrank.layers.mlp import MLP, Float32Linear
from fullrank.layers.towers import Towers
from fullrank.models.base import Hidden, InitStd, Ranker, RankerOutput
from fullrank.schema import Schema


class EarlyStageRanker(Ranker):
    """One model of all that the final value is made of, cheap enough for thousands of candidates.

    A tower of the user with the context and one of the item end in vectors u_t, a_t of each task t. Tasks share what is
    below: an MLP (`shared_bottom`), experts that each task mixes by a gate of its own (`mmoe`), or these beside experts
    of each task (`ple`). The two sides meet as

        product   z_t = ⟨u_t, a_t⟩ + b_t(a) + c_t(u)
        mlp       z = W₂ relu(W_u u + W_a a + W_x (u⊙a) + b) + W_l a

    with u, a all vectors of a side; above a shared bottom `mlp` has one of each for all tasks. Only ⟨u_t, a_t⟩, or W_x
    and W₂, touch a pair, at T·D or about W·H multiplications. What else is the user's is computed once per request,
    what is the item's once per model.

    A task may happen only where another does, as a conversion after a click. In a `chain` its z_t is the log-odds given
    that one, and what is predicted is the probability of both, as in ESMM (arXiv 1804.07931):

        p_t = σ(z_t) p_s    for the task t after s

    Both are learnt from all impressions, with a label of t that is 0 where s did not happen.

    The paper's abstract names one multi-task model for all components of the final score; its body was not available,
    so towers and interactions are this library's reading.
    """

    name = "early_stage"
    source = "Early-stage ads ranking with multi-task learning, arXiv 2307.11096 (abstract)"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            bottom: what the tasks share in either tower.
            interaction: how user and item meet.
            hidden: widths of either tower's MLP, or of each expert's.
            output_dim: D of the vectors of users and items.
            interaction_hidden: H, width of the layer in which the two meet, of `mlp`.
            num_experts: shared experts of `mmoe`, and of each level of `ple`.
            num_task_experts: further ones of each task and level, of `ple`.
            num_levels: levels of experts, of `ple`.
            chain: binary tasks that happen only where another does, each with that one: `{conversion: click}`.
        """

        embedding_init: InitStd = 0.01
        bottom: Literal["shared_bottom", "mmoe", "ple"] = "shared_bottom"
        interaction: Literal["mlp", "product"] = "mlp"
        hidden: Hidden = (64,)
        output_dim: int = Field(default=32, ge=1)
        interaction_hidden: int = Field(default=32, ge=1)
        num_experts: int = Field(default=3, ge=1)
        num_task_experts: int = Field(default=1, ge=0)
        num_levels: int = Field(default=1, ge=1)
        chain: dict[str, str] = Field(default={})

        @model_validator(mode="after")
        def _experts_have_layers(self) -> Self:
            if self.bottom != "shared_bottom" and not self.hidden:
                raise ValueError(f"bottom {self.bottom} needs hidden: the widths of an expert's layers")
            return self

        @model_validator(mode="after")
        def _chain_has_a_beginning(self) -> Self:
            for task in self.chain:
                self.links(task)
            return self

        def links(self, task: str) -> int:
            """How many tasks have to happen before this one can.

            Raises:
                ValueError: if a task would have to happen before itself.
            """
            seen = [task]
            while (before := self.chain.get(seen[-1])) is not None:
                if before in seen:
                    raise ValueError(f'chain: "{before}" would have to happen before itself')
                seen.append(before)
            return len(seen) - 1

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        labels = [label.name for label in schema.labels]
        binary = [label.name for label in schema.labels if label.kind == "binary"]
        for task in (*config.chain, *config.chain.values()):
            if task not in binary:
                raise ValueError(f'chain: there is no binary label "{task}"; the schema has {", ".join(binary)}')
        # Places of tasks and of those before them, in the order in which they happen.
        tasks = sorted(config.chain, key=config.links)
        self._chain = [(labels.index(task), labels.index(config.chain[task])) for task in tasks]
        one_for_all = config.bottom == "shared_bottom" and config.interaction == "mlp"
        width, hidden = config.output_dim * (1 if one_for_all else self.num_tasks), config.interaction_hidden
        self.width = width
        self.towers = Towers(schema, config.embeddings, self._bottom)
        if config.interaction == "mlp":
            self.from_user = Float32Linear(width, hidden)
            self.from_item = Float32Linear(width, hidden, bias=False)
            self.from_pair = Float32Linear(width, hidden, bias=False)
            self.head = Float32Linear(hidden, self.num_tasks)
        else:
            self.head = Float32Linear(width, self.num_tasks)
            tasks_TT = torch.eye(self.num_tasks)
            tasks_TV = torch.cat([tasks_TT.repeat_interleave(config.output_dim, 1), tasks_TT], 1)
            self.register_buffer("_tasks_TV", tasks_TV, persistent=False)
        self.item_head = Float32Linear(width, self.num_tasks, bias=False)
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def _bottom(self, inputs: int) -> nn.Module:
        """What makes the vectors of one side, shape (B, W)."""
        config = self.config
        if config.bottom == "shared_bottom":
            return MLP(inputs, config.hidden, self.width)
        experts = {"num_shared": config.num_experts}
        if config.bottom == "ple":
            experts |= {"num_own": config.num_task_experts, "num_levels": config.num_levels}
        return ExpertTower(inputs, config.hidden, config.output_dim, self.num_tasks, **experts)

    def output_biases(self) -> list[Tensor]:
        return [self.head.bias]

    @torch.no_grad()
    def start_at_base_rate(self, batch: Batch) -> None:
        before_T = self.head.bias.clone()
        super().start_at_base_rate(batch)
        started_T = (before_T == 0) & (self.head.bias != 0)
        rate_T = torch.sigmoid(self.head.bias.double())
        for task, first in self._chain:
            if bool(started_T[task] & started_T[first] & (rate_T[task] < rate_T[first])):
                self.head.bias[task] = torch.logit(rate_T[task] / rate_T[first])

    def forward(self, batch: Batch) -> RankerOutput:
        user_BW, item_BW = self.towers(batch)
        items_B1V = self._prepared(item_BW)[:, None]
        return RankerOutput(self._meet(user_BW, items_B1V)[:, 0])

    def item_vectors(self, items: Batch) -> Tensor:
        """What `score` needs of each item: its vectors, and all that follows from them alone."""
        return self._prepared(self.towers.items(items))

    def score(self, users: Batch, items_UPV: Tensor) -> Tensor:
        """logits_UPT of P candidates of each user, given as rows of `item_vectors`: equal to `forward` on the pairs."""
        user_UW = self.towers.users(users)
        if self.config.interaction == "mlp":
            return self._meet(user_UW, items_UPV)
        # One matrix product: in the row of task t, u_t in the columns of a_t and 1 in that of b_t. The few rows stand
        # on the left, where they cost a third.
        side_UV = torch.cat([user_UW, user_UW.new_ones(len(user_UW), self.num_tasks)], 1)
        logits_UTP: Tensor = (side_UV[:, None] * self.get_buffer("_tasks_TV")) @ items_UPV.mT
        own_UT: Tensor = self.head(user_UW)
        return self._joint(logits_UTP.mT + own_UT[:, None])

    def _prepared(self, item_IW: Tensor) -> Tensor:
        """a, W_a a for `mlp`, and b(a) or W_l a, side by side: shape (I, V)."""
        hidden = [self.from_item(item_IW)] if self.config.interaction == "mlp" else []
        return torch.cat([item_IW, *hidden, self.item_head(item_IW)], 1)

    def _meet(self, user_UW: Tensor, items_UPV: Tensor) -> Tensor:
        """logits_UPT."""
        item_UPW, own_UPT = items_UPV[..., : self.width], items_UPV[..., -self.num_tasks :]
        pair_UPW = item_UPW * user_UW[:, None]
        if self.config.interaction == "product":
            logits_UPT: Tensor = pair_UPW.view(*own_UPT.shape, -1).sum(-1) + own_UPT + self.head(user_UW)[:, None]
            return self._joint(logits_UPT)
        hidden_UPH = items_UPV[..., self.width : -self.num_tasks] + self.from_user(user_UW)[:, None]
        hidden_UPH = hidden_UPH + self.from_pair(pair_UPW)
        return self._joint(self.head(torch.relu(hidden_UPH)) + own_UPT)

    def _joint(self, logits_UPT: Tensor) -> Tensor:
        """The same with the log-odds of tasks in a chain, which are given the one before, as those of both.

        1 / (σ(a) σ(b)) - 1 = e^-a + e^-b + e^-(a + b), the odds against both.
        """
        if not self._chain:
            return logits_UPT
        columns = list(logits_UPT.unbind(-1))
        for task, first in self._chain:
            a_UP, b_UP = columns[first], columns[task]
            columns[task] = -torch.logsumexp(torch.stack([-a_UP, -b_UP, -a_UP - b_UP]), 0)
        return torch.stack(columns, -1)
