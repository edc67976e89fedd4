from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.models import DIN
from fullrank.models.din import TargetAttention
from fullrank.schema import Categorical, EventId, Label, Schema, Sequence

LENGTHS = torch.tensor([2, 0, 5, 1])


def attention(hidden: tuple[int, ...], *, softmax: bool = False) -> TargetAttention:
    torch.manual_seed(3)
    layer = TargetAttention(4, hidden, softmax=softmax).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    for activation in layer.activations:
        nn.init.normal_(activation.mean_A)  # type: ignore[arg-type]
        nn.init.uniform_(activation.variance_A, 0.5, 2.0)  # type: ignore[arg-type]
    return layer


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return (
        torch.randn(4, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(8, 4, dtype=torch.float64, requires_grad=True),
    )


def paper(layer: TargetAttention, query: Tensor, events: Tensor) -> Tensor:
    """Every pair's [q, k, q-k, q⊙k] through the layers, then the weighted sum row by row."""
    row = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
    q, k = query[row], events
    x = torch.cat([q, k, q - k, q * k], 1)
    weights = [layer.weight_A4D, *(linear.weight for linear in layer.deeper)]
    biases = [layer.bias_A, *(linear.bias for linear in layer.deeper)]
    for weight, bias, activation in zip(weights, biases, layer.activations, strict=True):
        x = x @ weight.T + bias  # type: ignore[operator]
        mean, variance = (x.mean(0), x.var(0, unbiased=False)) if layer.training else (
            activation.mean_A, activation.variance_A
        )  # fmt: skip
        p = torch.sigmoid((x - mean) / (variance + 1e-8).sqrt())
        x = p * x + (1 - p) * activation.alpha_A * x
    scores = (x @ layer.score_A.T + layer.score_bias).squeeze(1)
    pooled = []
    for score, part in zip(scores.split(LENGTHS.tolist()), events.split(LENGTHS.tolist()), strict=True):
        weight = torch.softmax(score, 0) if layer.softmax else score
        pooled.append((weight[:, None] * part).sum(0))
    return torch.stack(pooled)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("hidden", [(8,), (8, 6)])
def test_attention_and_all_its_gradients_are_those_of_the_papers_formula(
    hidden: tuple[int, ...], softmax: bool, training: bool
) -> None:
    layer = attention(hidden, softmax=softmax).train(training)
    query, events = inputs()
    wanted = [query, events, *layer.parameters()]
    gradient = torch.randn(4, 4, dtype=torch.float64)
    theirs = paper(layer, query, events)
    expected = [theirs, *torch.autograd.grad(theirs, wanted, gradient)]
    ours = layer(query, events, LENGTHS)
    for a, b in zip([ours, *torch.autograd.grad(ours, wanted, gradient)], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_attention_compiles_to_the_same_numbers() -> None:
    layer = attention((8,)).eval()
    query, events = inputs()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, events, LENGTHS), layer(query, events, LENGTHS))


def schema() -> Schema:
    return Schema(
        features=(
            Categorical(name="item", role="item", num_embeddings=30),
            Categorical(name="shop", role="item", num_embeddings=9),
            Sequence(
                name="history",
                max_length=7,
                fields=(
                    EventId(name="item", table="item", num_embeddings=30),
                    EventId(name="shop", table="shop", num_embeddings=9),
                ),
            ),
        ),
        labels=(Label(name="click"),),
    )


def batch(lengths: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    return Batch(
        numeric_BN=torch.zeros(len(lengths), 0),
        ids_BF=torch.stack([torch.randint(0, n, (len(lengths),), generator=generator) for n in (30, 9)], 1),
        jagged_keys=("history.item", "history.shop"),
        jagged_values=torch.cat([torch.randint(0, n, (count,), generator=generator) for n in (30, 9)]),
        jagged_lengths_KB=torch.tensor([lengths, lengths]),
        event_keys=(),
        event_values=torch.zeros(0),
        event_lengths_EB=torch.zeros(0, len(lengths), dtype=torch.int64),
        labels_BT=torch.zeros(len(lengths), 1),
    )


def build(**config: Any) -> DIN:
    torch.manual_seed(0)
    return DIN.from_config(schema(), {"embedding_init": 0.5, "hidden": (8,), **config})


def test_the_order_of_events_does_not_matter_but_their_pairing_does() -> None:
    model = build().eval()
    rows = batch([4])
    items, shops = rows.jagged_values.split(4)
    flipped = replace(rows, jagged_values=torch.cat([items.flip(0), shops.flip(0)]))
    mixed = replace(rows, jagged_values=torch.cat([items.flip(0), shops]))
    torch.testing.assert_close(model(rows).logits_BT, model(flipped).logits_BT)
    assert float((model(rows).logits_BT - model(mixed).logits_BT).abs().detach()) > 1e-6


def test_several_fields_of_an_event_meet_the_candidates_fields_of_the_same_tables() -> None:
    model = build().eval()
    rows = batch([3, 2])
    embedded = model.embeddings(rows)
    seen: dict[str, Tensor] = {}
    attention_layer = model.attentions[0]
    attention_layer.register_forward_pre_hook(lambda _, args: seen.update(query=args[0], events=args[1]))
    model(rows)
    assert torch.equal(seen["query"], embedded.flat)  # item and shop are the only single-id features, in this order
    events = torch.cat([embedded.events["history.item"], embedded.events["history.shop"]], 1)
    assert torch.equal(seen["events"], events)


def test_bfloat16_training_steps_stay_near_float32() -> None:
    rows = batch([5, 0, 7, 3, 2, 6, 1, 4])
    results = []
    for enabled in (False, True):
        model = build(attention_hidden=(8, 6)).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(rows)
        assert output.logits_BT.dtype == torch.float32
        model.loss(output, rows).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        results.append((output.logits_BT.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    for exact, rounded in zip(*results, strict=True):
        # bfloat16 rounds by 0.4 %
        assert float((exact - rounded).norm()) < 0.03 * float(exact.norm())


def test_one_attention_width_may_be_a_number() -> None:
    assert build(attention_hidden=6).config.attention_hidden == (6,)
    with pytest.raises(ValueError, match="attention_hidden"):
        build(attention_hidden=[])


def test_relu_attention_and_its_dropout_are_the_plain_layers() -> None:
    torch.manual_seed(0)
    layer = TargetAttention(4, (8, 6), softmax=False, activation="relu", dropout=0.5)
    query, events = (values.float() for values in inputs())
    row = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
    q = query[row]
    pairs = torch.cat([q, events, q - events, q * events], 1)
    deeper = layer.deeper[0]
    assert isinstance(deeper, nn.Linear)
    hidden = torch.relu(deeper(torch.relu(pairs @ layer.weight_A4D.T + layer.bias_A)))
    scores = hidden @ layer.score_A[0] + layer.score_bias
    pooled = [(weight[:, None] * part).sum(0) for weight, part in zip(
        scores.split(LENGTHS.tolist()), events.split(LENGTHS.tolist()), strict=True)]  # fmt: skip
    torch.testing.assert_close(layer.eval()(query, events, LENGTHS), torch.stack(pooled))
    dropped = [layer.train()(query, events, LENGTHS) for _ in range(2)]
    assert not torch.equal(*dropped)


def test_dice_in_the_output_mlp_adds_a_number_per_unit() -> None:
    click = Label(name="click")
    event = EventId(name="item", table="item", num_embeddings=9)
    history = Sequence(name="history", max_length=5, fields=(event,))
    schema = Schema(features=(Categorical(name="item", num_embeddings=9), history), labels=(click,))
    plain, dice = (
        DIN.from_config(schema, {"embedding_dim": 4, "hidden": (16, 8), "activation": name})
        for name in ("relu", "dice")
    )
    assert dice.num_parameters().total == plain.num_parameters().total + 16 + 8
    with pytest.raises(ValueError, match="attention_dropout"):
        DIN.from_config(schema, {"attention_dropout": 1.0})
