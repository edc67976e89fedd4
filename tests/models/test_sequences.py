"""BST, DIEN and TransAct."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.layers.encoder import EncoderLayer, LengthGroups
from fullrank.layers.histories import Events
from fullrank.layers.mlp import OutputLayer
from fullrank.layers.recurrent import Steps
from fullrank.models import BST, DIEN, MODELS, Ranker, TransAct
from fullrank.models.bst import BehaviourTransformer
from fullrank.models.dien import InterestEvolution, NextBehaviour
from fullrank.models.transact import RecentActions
from fullrank.schema import Categorical, EventId, EventNumber, Label, Schema, Sequence

NAMES = ("bst", "dien", "transact")
HISTORY = 6


def schema(*, timed: bool = False) -> Schema:
    numbers = (EventNumber(name="age", transform="log1p"),) if timed else ()
    return Schema(
        features=(
            Categorical(name="item", role="item", num_embeddings=30),
            Categorical(name="hour", num_embeddings=5),
            Sequence(
                name="history",
                max_length=HISTORY,
                fields=(EventId(name="item", table="item", num_embeddings=30), *numbers),
            ),
        ),
        labels=(Label(name="click"),),
    )


def batch_of(histories: list[list[int]], ages: list[list[float]] | None = None) -> Batch:
    lengths = torch.tensor([[len(history) for history in histories]])
    seconds = [age for row in ages or [] for age in row]
    return Batch(
        numeric_BN=torch.zeros(len(histories), 0),
        ids_BF=torch.tensor([[row % 30, row % 5] for row in range(len(histories))]),
        jagged_keys=("history.item",),
        jagged_values=torch.tensor([event for history in histories for event in history], dtype=torch.int64),
        jagged_lengths_KB=lengths,
        event_keys=("history.age",) if ages is not None else (),
        event_values=torch.tensor(seconds).log1p(),
        event_lengths_EB=lengths if ages is not None else torch.zeros(0, len(histories), dtype=torch.int64),
        labels_BT=torch.tensor([[float(row % 2)] for row in range(len(histories))]),
    )


def build(name: str, *, timed: bool = False, **config: Any) -> Ranker:
    torch.manual_seed(0)
    defaults = {"embedding_dim": 4, "embedding_init": 0.7, "hidden": (8,)}
    values = {key: value for key, value in {**defaults, **config}.items() if value is not None}
    model = MODELS[name].from_config(schema(timed=timed), values)
    for layer in model.modules():
        if isinstance(layer, OutputLayer):
            nn.init.normal_(layer.weight)
    return model.eval()


def logits(model: Ranker, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch).logits_BT


def groups_of(lengths: Tensor) -> LengthGroups:
    rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    return LengthGroups.of(lengths, rows, torch.cat([torch.arange(length) for length in lengths.tolist()]))


@pytest.mark.parametrize(
    ("name", "config", "sees_order"),
    [
        ("dien", {}, True),
        ("bst", {}, True),
        ("bst", {"pooling": "candidate"}, True),
        ("bst", {"position": False}, False),
        ("transact", {"latest": 2}, True),
        ("transact", {"latest": 0}, False),
    ],
)
def test_order_of_events(name: str, config: dict[str, Any], sees_order: bool) -> None:
    model = build(name, **config)
    forward, backward = (logits(model, batch_of([events, [7]])) for events in ([1, 2, 3, 4], [4, 3, 2, 1]))
    assert bool((forward[0] - backward[0]).abs() > 1e-4) == sees_order
    torch.testing.assert_close(forward[1], backward[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pooling", ["mean", "concat"])
def test_a_longer_history_in_the_batch_changes_no_other_row(name: str, pooling: str) -> None:
    model = build(name, **({"pooling": pooling} if name == "bst" else {}))
    short, long = ([[5, 3], [], other] for other in ([1], [1, 2, 3, 4, 5, 6]))
    torch.testing.assert_close(logits(model, batch_of(short))[:2], logits(model, batch_of(long))[:2])


@pytest.mark.parametrize("name", NAMES)
def test_candidate_and_history_meet(name: str) -> None:
    # what the history adds depends on the candidate: no sum of a function of one and a function of the other
    torch.manual_seed(1)
    model = build(name, hidden=())
    batches = [batch_of([history] * 2) for history in ([1, 2, 3], [4, 5])]
    batches = [replace(batch, ids_BF=torch.tensor([[8, 0], [9, 0]])) for batch in batches]
    first, second = (logits(model, batch)[:, 0] for batch in batches)
    assert float((first[0] - first[1] - second[0] + second[1]).abs()) > 1e-3


# DIEN


def test_without_preference_interests_evolve_by_equal_attention() -> None:
    torch.manual_seed(0)
    evolution = InterestEvolution(3, 2, 3)
    assert evolution.bilinear is not None and evolution.evolution is not None
    nn.init.zeros_(evolution.bilinear.weight)
    lengths = torch.tensor([4, 0, 2])
    steps = Steps.of(lengths)
    events = torch.randn(6, 3)[steps.order_E]
    final, interests = evolution(events, torch.randn(3, 2), steps)
    equal = 1 / lengths[steps.row_E]
    torch.testing.assert_close(evolution.attention(interests, torch.randn(3, 2), steps), equal)
    torch.testing.assert_close(final, steps.last(evolution.evolution(interests, steps, equal)))
    torch.testing.assert_close(interests, evolution.extractor(events, steps))


def test_attention_is_a_bilinear_form_and_sums_to_one() -> None:
    torch.manual_seed(0)
    evolution = InterestEvolution(3, 2, 5)
    assert evolution.bilinear is not None
    lengths = torch.tensor([4, 0, 2])
    steps = Steps.of(lengths)
    interests, candidate = torch.randn(6, 5), torch.randn(3, 2)
    weights = evolution.attention(interests[steps.order_E], candidate, steps)
    scores = torch.einsum("eh,hd,ed->e", interests, evolution.bilinear.weight, candidate.repeat_interleave(lengths, 0))
    expected = torch.cat([part.softmax(0) for part in scores.split(lengths.tolist())])
    torch.testing.assert_close(weights, expected[steps.order_E])
    assert float(weights.detach().sum()) == pytest.approx(2)


def test_a_single_event_is_fully_attended() -> None:
    torch.manual_seed(0)
    evolution = InterestEvolution(3, 2, 3)
    assert evolution.evolution is not None
    steps = Steps.of(torch.tensor([1]))
    event = torch.randn(1, 3)
    final, _ = evolution(event, torch.randn(1, 2), steps)
    torch.testing.assert_close(final, evolution.evolution(evolution.extractor(event, steps), steps))


@pytest.mark.parametrize("hidden", [(), (5,), (5, 3)])
def test_auxiliary_loss_equals_its_formula_pair_by_pair(hidden: tuple[int, ...], monkeypatch: Any) -> None:
    torch.manual_seed(0)
    width = 4
    auxiliary = NextBehaviour(width, width, hidden)
    lengths = torch.tensor([3, 1, 0, 4])
    steps = Steps.of(lengths)
    ids = torch.tensor([1, 2, 3, 9, 1, 1, 5, 6])
    table, states = torch.randn(10, width), torch.randn(8, width)
    drawn = torch.tensor([0, 3, 5, 7, 2])[torch.arange(5)]
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: drawn)
    loss = auxiliary(states[steps.order_E], table[ids][steps.order_E], ids[steps.order_E], steps)

    def score(state: Tensor, event: Tensor) -> Tensor:
        if not hidden:
            return state @ event
        assert auxiliary.from_state is not None
        both = torch.cat([auxiliary.from_state.weight, auxiliary.from_event.weight], 1)
        x = torch.relu(both @ torch.cat([state, event]) + auxiliary.from_state.bias)
        value: Tensor = auxiliary.rest(x)[0]
        return value

    # The pairs in the order of steps: second events of the longest row first.
    pairs = [(4, 5), (0, 1), (5, 6), (1, 2), (6, 7)]
    total = torch.zeros(())
    for (before, after), place in zip(pairs, drawn.tolist(), strict=True):
        other = int(steps.order_E[place])
        total = total - F.logsigmoid(score(states[before], table[ids[after]]))
        if ids[other] != ids[after]:
            total = total - F.logsigmoid(-score(states[before], table[ids[other]]))
    torch.testing.assert_close(loss, total / 5)


def test_auxiliary_loss_is_for_training_and_can_be_left_out() -> None:
    batch = batch_of([[1, 2, 3], [4, 5]])
    model = build("dien", auxiliary_weight=0.5)
    assert not model(batch).aux_losses
    torch.manual_seed(3)
    half = model.train()(batch)
    double = build("dien", auxiliary_weight=1.0).train()
    torch.manual_seed(3)
    torch.testing.assert_close(2 * half.aux_losses["next_behaviour"], double(batch).aux_losses["next_behaviour"])
    assert not build("dien", auxiliary_weight=0).train()(batch).aux_losses
    # two histories of one event have no next behaviour
    assert float(model(batch_of([[1], [2]])).aux_losses["next_behaviour"].detach()) == 0


def test_auxiliary_loss_teaches_what_follows_what() -> None:
    # in every history each event is followed by the next number: after training the interest points there
    torch.manual_seed(0)
    model = build("dien", embedding_dim=8, embedding_init=0.3).train()
    assert isinstance(model, DIEN)
    histories = [[(start + i) % 30 for i in range(HISTORY)] for start in range(30)]
    batch = batch_of(histories)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        model(batch).aux_losses["next_behaviour"].backward()
        optimizer.step()
    _, (events,) = model.features.events(batch)
    steps = Steps.of(events.lengths_B)
    interests = model.interests[0].extractor(events.channels_EC[steps.order_E], steps)  # type: ignore[union-attr, operator]
    table = model.features.ids.state_dict()["tables.item.weight"]
    ids = batch.jagged_values[steps.order_E]
    best = (interests[steps.previous] @ table.T).argmax(1)
    assert float((best == (ids[steps.previous] + 1) % 30).float().mean()) > 0.8


def test_inner_products_need_states_as_wide_as_events() -> None:
    with pytest.raises(ValueError, match="got state 7 and events 4: leave out state_dim, or give auxiliary_hidden"):
        build("dien", state_dim=7)
    assert logits(build("dien", state_dim=7, auxiliary_hidden=(3,)), batch_of([[1, 2]])).shape == (1, 1)
    assert logits(build("dien", state_dim=7, auxiliary_weight=0), batch_of([[1, 2]])).shape == (1, 1)


# BST


def transformer(**options: Any) -> BehaviourTransformer:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward": 2,
        "dropout": 0.0,
        "pooling": "mean",
    }
    timed = options.pop("timed", False)
    config = BehaviourTransformer.Config(**{**defaults, **options})
    return BehaviourTransformer(4, HISTORY, config, timed=timed, position_init=0.5).eval()


def test_without_layers_and_positions_it_is_the_mean_of_candidate_and_events() -> None:
    events = Events(torch.randn(5, 4), torch.tensor([2, 0, 3]), None)
    candidate = torch.randn(3, 4)
    pooled = transformer(num_layers=0, position=False)(events, candidate)
    parts = events.channels_EC.split([2, 0, 3])
    expected = torch.stack([torch.cat([c[None], part]).mean(0) for c, part in zip(candidate, parts, strict=True)])
    torch.testing.assert_close(pooled, expected)


def test_concatenated_outputs_begin_with_candidate_and_latest_event() -> None:
    events = Events(torch.randn(5, 4), torch.tensor([2, 0, 3]), None)
    candidate = torch.randn(3, 4)
    slots = transformer(num_layers=0, position=False, pooling="concat")(events, candidate)
    slots = slots.unflatten(1, (HISTORY + 1, 4))
    torch.testing.assert_close(slots[:, 0], candidate)
    torch.testing.assert_close(slots[2, 1:4], events.channels_EC[2:].flip(0))
    assert not slots[1, 1:].any() and not slots[2, 4:].any()


def test_layers_see_candidate_and_events_as_one_sequence() -> None:
    model = transformer(pooling="candidate", position=False)
    events = Events(torch.randn(3, 4), torch.tensor([3]), None)
    candidate = torch.randn(1, 4)
    together = torch.cat([candidate, events.channels_EC])
    expected = model.layers[0](together, groups_of(torch.tensor([4])))[:1]
    torch.testing.assert_close(model(events, candidate), expected)


def test_positions_are_ages_by_powers_of_two() -> None:
    model = transformer(num_layers=0, timed=True)
    assert model.position_PC is not None
    ages = torch.tensor([0.0, 0.9, 1.0, 2.9, 3.0, 1e9, 1e30])
    for age, bucket in zip(ages, [0, 0, 1, 1, 2, 29, 31], strict=True):
        events = Events(torch.zeros(1, 4), torch.tensor([1]), age[None])
        expected = (model.position_PC[0] + model.position_PC[1 + bucket]) / 2
        torch.testing.assert_close(model(events, torch.zeros(1, 4))[0], expected)


def test_events_of_one_age_have_no_order() -> None:
    model = build("bst", timed=True)
    same, other = (logits(model, batch_of([events], [[50.0, 50.0, 9.0]])) for events in ([1, 2, 3], [2, 1, 3]))
    torch.testing.assert_close(same, other)
    moved = logits(model, batch_of([[1, 2, 3]], [[5000.0, 50.0, 9.0]]))
    assert float((same - moved).abs().max()) > 1e-4


# TransAct


def actions(**options: Any) -> RecentActions:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward": 8,
        "dropout": 0.0,
        "latest": 2,
        "window_hours": 0.0,
    }
    return RecentActions(6, 10, RecentActions.Config(**{**defaults, **options}))


def test_without_layers_it_is_the_latest_fused_tokens_and_their_maximum() -> None:
    events = Events(torch.randn(4, 4), torch.tensor([3, 0, 1]), None)
    candidate = torch.randn(3, 2)
    output = actions(num_layers=0)(events, candidate).unflatten(1, (3, 6))
    tokens = torch.cat([events.channels_EC, candidate.repeat_interleave(events.lengths_B, 0)], 1)
    torch.testing.assert_close(output[0], torch.cat([tokens[1:3], tokens[:3].amax(0, keepdim=True)]))
    torch.testing.assert_close(output[2], torch.cat([torch.zeros(1, 6), tokens[3:], tokens[3:]]))
    assert not output[1].any()


def test_the_window_hides_the_latest_events_in_training_alone() -> None:
    model = actions(window_hours=24.0)
    old, fresh = torch.full((3,), 25 * 3600.0), torch.zeros(3)
    channels, candidate = torch.randn(3, 4), torch.randn(1, 2)

    def run(age: Tensor) -> Tensor:
        return model(Events(channels, torch.tensor([3]), age), candidate)

    whole, nothing = run(old), run(fresh)
    assert bool(whole.any()) and not nothing.any()
    model.eval()
    torch.testing.assert_close(run(fresh), whole)
    # An event of age a is kept with probability a / 24 hours.
    model.train()
    torch.manual_seed(0)
    ages = torch.full((2000,), 6 * 3600.0)
    output = model(Events(torch.randn(2000, 4), torch.ones(2000, dtype=torch.int64), ages), torch.randn(2000, 2))
    assert float(output.any(1).float().mean()) == pytest.approx(0.25, abs=0.04)


# All three


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: build("bst", num_heads=3), "num_heads must divide the width of the tokens, got 3 heads for width 4"),
        (lambda: build("transact", num_heads=3), "got 3 heads for width 8"),
        (
            lambda: build("transact", window_hours=1.0),
            'window_hours needs the age of events, sequence "history" has no number field "age"',
        ),
        (lambda: build("bst", pooling="max"), "pooling"),
        (lambda: build("dien", state_dim=0), "state_dim"),
        (lambda: build("transact", latest=-1), "latest"),
    ],
)
def test_what_is_refused(build_it: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_it()


def test_operations_equal_the_analytic_count() -> None:
    d, length, inputs = 4, HISTORY, 8  # two tokens beside the history
    bst = build("bst", feed_forward=2)
    tokens = length + 1
    encoder = tokens * 2 * (4 * d * d + 2 * d * 2 * d) + 4 * tokens * tokens * d
    assert bst.flops_per_example() == encoder + 2 * (inputs + d) * 8 + 2 * 8
    transact = build("transact", num_layers=1, feed_forward=5, latest=2, num_cross_layers=1)
    w = 2 * d
    encoder = length * 2 * (4 * w * w + 2 * w * 5) + 4 * length * length * w
    flat = inputs + 3 * w
    assert transact.flops_per_example() == encoder + 2 * flat * flat + 2 * flat * 8 + 2 * 8
    dien = build("dien")
    grus = 2 * 2 * 3 * d * (length * d + (length - 1) * d)
    assert dien.flops_per_example() == grus + 2 * d * d + 2 * (inputs + d) * 8 + 2 * 8


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, {}) for name in (*NAMES, "interformer", "kunlun")),
        ("hilomoe", {"backbone": {"name": "din", "hidden": (8,)}, "num_experts": 3, "hidden": None}),
        ("cetnet", {"members": ({"name": "interformer", "hidden": (8,)}, {"name": "dcn_v2"}), "hidden": None}),
    ],
)
def test_captured_models_give_the_same_logits_and_gradients(name: str, config: dict[str, Any]) -> None:
    model = build(name, **config).train()
    batch = batch_of([[1, 2, 3], [], [4, 5]])
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(function: Any) -> list[Tensor]:
        torch.manual_seed(1)
        output = function(batch)
        gradients = torch.autograd.grad(model.loss(output, batch), parameters, allow_unused=True)
        return [output.logits_BT, *(gradient for gradient in gradients if gradient is not None)]

    torch.testing.assert_close(step(torch.compile(model, backend="aot_eager")), step(model), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_encoder_gives_the_same_outputs_and_gradients() -> None:
    torch.manual_seed(0)
    layer, groups = EncoderLayer(4, 2, 8, nn.ReLU()), groups_of(torch.tensor([3, 0, 2]))
    tokens, target = torch.randn(5, 4), torch.randn(5, 4)

    def step(function: Any) -> list[Tensor]:
        output = function(tokens, groups)
        return [output, *torch.autograd.grad((output * target).sum(), list(layer.parameters()))]

    torch.testing.assert_close(step(torch.compile(layer)), step(layer), rtol=1e-4, atol=1e-5)


def test_a_sequence_without_a_candidate_is_summarised_all_the_same() -> None:
    alone = Schema(
        features=(
            Categorical(name="hour", num_embeddings=5),
            Sequence(name="history", max_length=HISTORY, fields=(EventId(name="item", num_embeddings=30),)),
        ),
        labels=(Label(name="click"),),
    )
    for model_class in (BST, DIEN, TransAct):
        torch.manual_seed(0)
        model = model_class.from_config(alone, {"embedding_dim": 4, "embedding_init": 0.7, "hidden": ()}).eval()
        for layer in model.modules():
            if isinstance(layer, OutputLayer):
                nn.init.normal_(layer.weight)
        batches = [batch_of([history]) for history in ([1, 2], [3, 4])]
        first, second = (logits(model, replace(batch, ids_BF=torch.zeros(1, 1).long())) for batch in batches)
        assert math.isfinite(float(first)) and float((first - second).abs()) > 1e-4
