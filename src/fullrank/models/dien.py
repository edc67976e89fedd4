"""DIEN: interests drawn out of the history by a GRU, and their evolution towards the candidate by a second one."""

# Shapes: B rows, E events of all rows together, P events that have a successor in their row, C channels of an event,
# D width of the candidate, H width of the states.

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.layers.histories import FeaturesAndHistories
from fullrank.layers.mlp import MLP
from fullrank.layers.recurrent import AttentionalGRU, Steps
from fullrank.models.base import BatchNorm, Dropout, Hidden, InitStd, Ranker, RankerOutput
from fullrank.schema import Schema


class NextBehaviour(nn.Module):
    """Auxiliary loss: an interest tells the event that followed from one that did not.

    Mean over events that have a successor of -log σ(s(h_t, e_{t+1})) - log(1 - σ(s(h_t, e'))), with e' an event drawn
    from the whole batch; a drawn event with the successor's id does not count. The score s is the inner product (the
    paper's formula, for states as wide as events), or an MLP on [h, e] when `hidden` is given (the authors' code).

    Deviation: the paper draws e' from all items; here from the batch's events, which is by popularity and needs no
    further look-up.
    """

    def __init__(self, state: int, channels: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.from_state: nn.Linear | None = None
        if hidden:
            # The first layer on [h, e], split: its half on e is shared by successors and drawn events.
            self.from_state = nn.Linear(state, hidden[0])
            self.from_event = nn.Linear(channels, hidden[0], bias=False)
            self.rest = MLP(hidden[0], hidden[1:], 1)
            for layer in (self.from_state, self.from_event):
                nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(self.from_state.bias)
        elif state != channels:
            raise ValueError(
                f"the inner product of states and events needs equal widths, got state {state} and events {channels}: "
                "leave out state_dim, or give auxiliary_hidden"
            )

    def forward(self, states_EH: Tensor, events_EC: Tensor, ids_E: Tensor, steps: Steps) -> Tensor:
        """A scalar; 0 when no event has a successor. All arguments are in the order of `steps`."""
        pairs = len(steps.previous)
        if not pairs:
            return states_EH.new_zeros(())
        next_P = torch.arange(len(ids_E) - pairs, len(ids_E), device=ids_E.device)
        drawn_P = _draw(len(ids_E), pairs, ids_E.device)
        states_PH = states_EH.index_select(0, steps.previous)
        events = events_EC
        if self.from_state is not None:
            states_PH, events = self.from_state(states_PH), self.from_event(events_EC)
        real_P = self._score(states_PH, events.index_select(0, next_P))
        false_P = self._score(states_PH, events.index_select(0, drawn_P))
        counts_P = ids_E[next_P] != ids_E[drawn_P]
        return (F.softplus(-real_P).sum() + (F.softplus(false_P) * counts_P).sum()) / pairs

    def _score(self, states_PH: Tensor, events_PH: Tensor) -> Tensor:
        if self.from_state is None:
            return (states_PH * events_PH).sum(1)
        score: Tensor = self.rest(torch.relu(states_PH + events_PH)).squeeze(1)
        return score


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled model draws the same events
def _draw(below: int, count: int, device: torch.device) -> Tensor:
    return torch.randint(below, (count,), device=device)


class InterestEvolution(nn.Module):
    """One history as the interest that matters for the candidate, shape (B, H); zero for an empty history.

    Interests h_t are the states of a GRU over the events; a_t = softmax_t(h_tᵀ W candidate); a second GRU over the
    interests, its updates scaled by a_t, ends in the result. Without a candidate it is the last interest.
    """

    def __init__(self, channels: int, candidate: int, state: int) -> None:
        super().__init__()
        self.extractor = AttentionalGRU(channels, state)
        self.bilinear = nn.Linear(candidate, state, bias=False) if candidate else None
        self.evolution = AttentionalGRU(state, state) if candidate else None
        if self.bilinear is not None:
            nn.init.xavier_normal_(self.bilinear.weight)

    def forward(self, events_EC: Tensor, candidate_BD: Tensor | None, steps: Steps) -> tuple[Tensor, Tensor]:
        """The final interest (B, H), and the interests (E, H) after each event; events in the order of `steps`."""
        interests_EH = self.extractor(events_EC, steps)
        if self.bilinear is None or self.evolution is None:
            return steps.last(interests_EH), interests_EH
        assert candidate_BD is not None
        attention_E = self.attention(interests_EH, candidate_BD, steps)
        return steps.last(self.evolution(interests_EH, steps, attention_E)), interests_EH

    def attention(self, interests_EH: Tensor, candidate_BD: Tensor, steps: Steps) -> Tensor:
        """Weights of the interests, shape (E,), summing to 1 in each row."""
        assert self.bilinear is not None
        query_BH = self.bilinear(candidate_BD).to(interests_EH.dtype)
        return steps.softmax((interests_EH * query_BH.index_select(0, steps.row_E)).sum(1))


class DIEN(Ranker):
    """Deep interest evolution network.

    Each sequence whose events share a table with candidate features evolves towards those; of other sequences the
    last interest is taken. Final interests and all other features go into an MLP.
    """

    name = "dien"
    source = "Zhou et al., Deep Interest Evolution Network for Click-Through Rate Prediction, AAAI 2019"
    needs_history = True

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            state_dim: width of the interests; default that of an event.
            auxiliary_weight: of the auxiliary loss; 0 leaves it out.
            auxiliary_hidden: widths of its MLP; empty for the inner product.
            hidden: widths of the output MLP.
        """

        embedding_init: InitStd = 0.05
        state_dim: int | None = Field(default=None, ge=1)
        auxiliary_weight: float = Field(default=1.0, ge=0)
        auxiliary_hidden: Hidden = ()
        hidden: Hidden = (256, 128, 64)
        batch_norm: BatchNorm = False
        dropout: Dropout = 0.0

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.features = FeaturesAndHistories(schema, config.embeddings)
        channels = self.features.channels
        states = [config.state_dim or width for width in channels]
        self.interests = nn.ModuleList(
            InterestEvolution(width, len(targets) * config.embedding_dim, state)
            for width, state, targets in zip(channels, states, self.features.targets, strict=True)
        )
        self.auxiliary = nn.ModuleList(
            NextBehaviour(state, width, config.auxiliary_hidden)
            for width, state in zip(channels, states, strict=True)
            if config.auxiliary_weight
        )
        width = self.features.num_tokens * config.embedding_dim + sum(states)
        self.mlp = MLP(width, config.hidden, self.num_tasks, batch_norm=config.batch_norm, dropout=config.dropout)

    def output_biases(self) -> list[Tensor]:
        return [self.mlp.output_bias]

    def forward(self, batch: Batch) -> RankerOutput:
        tokens_BFD, sequences = self.features.events(batch)
        parts, auxiliary = [tokens_BFD.flatten(1)], []
        for index, (events, targets) in enumerate(zip(sequences, self.features.targets, strict=True)):
            steps = Steps.of(events.lengths_B)
            events_EC = events.channels_EC.index_select(0, steps.order_E)
            candidate_BD = tokens_BFD[:, targets].flatten(1) if targets else None
            final_BH, interests_EH = self.interests[index](events_EC, candidate_BD, steps)
            parts.append(final_BH)
            if self.training and self.config.auxiliary_weight:
                ids_E = self._ids(batch, index).index_select(0, steps.order_E)
                auxiliary.append(self.auxiliary[index](interests_EH, events_EC, ids_E, steps))
        losses = {"next_behaviour": self.config.auxiliary_weight * torch.stack(auxiliary).sum()} if auxiliary else {}
        return RankerOutput(self.mlp(torch.cat(parts, 1)), losses)

    def _ids(self, batch: Batch, index: int) -> Tensor:
        """Ids of the first field of a sequence: two events with the same one are the same to the auxiliary loss."""
        sequence = self.schema.sequences[index]
        return batch.jagged(sequence.column(sequence.id_fields[0]))[0]
