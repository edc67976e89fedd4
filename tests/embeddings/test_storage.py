"""Tables stored in bfloat16 and in two planes, in each fused kind."""

# Shapes: R rows, D width, N ids.

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fullrank.batch import Batch
from fullrank.bfloat16 import join_fp32, split_fp32, to_bf16
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer, Tables
from fullrank.embeddings.row_buffer import RowBuffer
from fullrank.schema import Categorical, MultiCategorical, Schema

FUSED = ("sgd", "adagrad", "row_wise_adagrad", "adam")
ROWS, WIDTH = 40, 6
SCHEMA = Schema(
    features=(
        Categorical(name="user", num_embeddings=50),
        Categorical(name="plain", num_embeddings=11),
        MultiCategorical(name="liked", num_embeddings=30),
    ),
)
KINDS: dict[str, Any] = {"user": {"kind": "quotient_remainder", "collisions": 3}}


def a_collection(optimizer: EmbeddingOptimizer | None = None) -> EmbeddingCollection:
    torch.manual_seed(0)
    return EmbeddingCollection(SCHEMA, Tables(embedding_dim=8, init_std=0.5, kinds=KINDS), optimizer=optimizer)


def a_batch(seed: int, rows: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths_1B = torch.randint(0, 5, (1, rows), generator=generator)
    return Batch(
        numeric_BN=torch.zeros(rows, 0),
        ids_BF=torch.stack([torch.randint(0, below, (rows,), generator=generator) for below in (50, 11)], 1),
        jagged_keys=("liked",),
        jagged_values=torch.randint(0, 30, (int(lengths_1B.sum()),), generator=generator),
        jagged_lengths_KB=lengths_1B,
        event_keys=(),
        event_values=torch.zeros(0),
        event_lengths_EB=torch.zeros(0, rows, dtype=torch.int64),
        labels_BT=torch.zeros(rows, 0),
    )


def a_buffer(storage: str, kind: str = "sgd", start_RD: Tensor | None = None, **options: Any) -> RowBuffer:
    if start_RD is None:
        start_RD = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    buffer = RowBuffer(start_RD.clone(), "torch")
    buffer.set_optimizer(EmbeddingOptimizer.model_validate({"kind": kind, "storage": storage, **options}))
    return buffer.train()


def gradients(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(0, ROWS, (30,), generator=generator), torch.randn(30, WIDTH, generator=generator))
        for _ in range(steps)
    ]


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("kind", FUSED)
def test_two_planes_move_as_float32_does_bit_for_bit(kind: str, l2: float) -> None:
    lazy = {"l2": l2, "l2_mode": "lazy"} if l2 else {}
    plain, split = (a_buffer(storage, kind, learning_rate=0.05, **lazy) for storage in ("float32", "split"))
    for ids_N, gradient_ND in gradients(30):
        for buffer in (plain, split):
            # A lookup applies the decay that is due; what it gives is the upper plane of `split`.
            vectors_ND = buffer(ids_N)
            buffer.update(ids_N, gradient_ND.clone())
            buffer.after_step()
        assert torch.equal(vectors_ND, vectors_ND.bfloat16().float())
    for buffer in (plain, split):
        buffer.flush()
    assert torch.equal(plain.weight_RD, split.read(slice(None)))
    assert all(torch.equal(state, split.states[name]) for name, state in plain.states.items())


def test_training_that_looks_up_both_planes_is_float32_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowBuffer, "looked_up", RowBuffer.read)

    def trained(storage: str) -> dict[str, Tensor]:
        optimizer = EmbeddingOptimizer.model_validate({"kind": "adagrad", "learning_rate": 0.1, "storage": storage})
        collection = a_collection(optimizer=optimizer).train()
        for seed in range(5):
            (collection(a_batch(seed)).flat ** 2).sum().backward()
            for parameter in collection.kind_modules.parameters():
                parameter.grad = None
        return dict(collection.state_dict())

    plain, split = trained("float32"), trained("split")
    assert all(torch.equal(value, split[name]) for name, value in plain.items())


@pytest.mark.parametrize("kind", FUSED)
def test_bfloat16_rounds_what_float32_gives_and_keeps_the_rules_state_in_float32(kind: str) -> None:
    rounded = a_buffer("bfloat16", kind, learning_rate=0.05)
    for ids_N, gradient_ND in gradients(10):
        plain = a_buffer("float32", kind, rounded.read(slice(None)), learning_rate=0.05)
        plain.states, plain.step = {name: state.clone() for name, state in rounded.states.items()}, rounded.step
        for buffer in (plain, rounded):
            buffer.update(ids_N, gradient_ND.clone())
        assert torch.equal(rounded.weight_RD, plain.weight_RD.bfloat16())
        assert all(torch.equal(state, plain.states[name]) for name, state in rounded.states.items())
    for storage in ("bfloat16", "bfloat16_stochastic", "split"):
        buffer = a_buffer(storage, kind)
        assert {state.dtype for state in buffer.states.values()} <= {torch.float32}
        assert buffer(torch.arange(3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("storage", "mean", "deviation"),
    [("float32", 0.0, 0.0), ("split", 0.0, 0.0), ("bfloat16", 1.0, 0.0), ("bfloat16_stochastic", 0.0, 0.04)],
)
def test_small_steps_are_lost_only_by_rounding_to_nearest(storage: str, mean: float, deviation: float) -> None:
    """A thousand steps of 1/1000 down from 1."""
    torch.manual_seed(0)
    buffer = a_buffer(storage, "sgd", torch.ones(50, 200), learning_rate=1e-3)
    ids_N, gradient_ND = torch.arange(50), torch.ones(50, 200)
    for _ in range(1000):
        buffer.update(ids_N, gradient_ND.clone())
    weight_RD = buffer.read(slice(None))
    assert float(weight_RD.mean()) == pytest.approx(mean, abs=2e-3)
    assert float(weight_RD.std()) == pytest.approx(deviation, abs=0.02)


def test_bytes_and_the_lookup_of_each_storage() -> None:
    collection = a_collection()
    floats = collection.weight_bytes()
    assert floats == 4 * sum(weight.numel() for weight in collection.weights())
    start = {name: value.clone() for name, value in collection.state_dict().items()}
    for storage, share in (("split", 1.0), ("bfloat16", 0.5), ("bfloat16_stochastic", 0.5), ("float32", 1.0)):
        collection.set_optimizer(EmbeddingOptimizer.model_validate({"kind": "sgd", "storage": storage}))
        assert collection.weight_bytes() == share * floats
        looked_up = sum(weight.nbytes for weight in collection.weights())
        assert looked_up == (1.0 if storage == "float32" else 0.5) * floats
        ids_N = torch.arange(5)
        expected = start["tables.plain.weight"][ids_N]
        if storage == "split":
            assert torch.equal(collection.vectors("plain", ids_N), expected)
        else:
            assert torch.equal(collection.vectors("plain", ids_N), expected.bfloat16().float())


@pytest.mark.parametrize("storage", ["bfloat16", "bfloat16_stochastic", "split"])
def test_a_state_brings_back_every_bit_and_is_float32(storage: str) -> None:
    options = {"kind": "adam", "learning_rate": 0.1, "l2": 0.05, "l2_mode": "lazy", "storage": storage}
    optimizer = EmbeddingOptimizer.model_validate(options)

    def steps(collection: EmbeddingCollection, seeds: range) -> None:
        for seed in seeds:
            collection(a_batch(seed)).flat.square().sum().backward()
            collection.after_step()
        collection.flush()

    whole = a_collection(optimizer=optimizer).train()
    steps(whole, range(3))
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    rule = {name: value.clone() for name, value in whole.optimizer_state().items()}
    random = torch.get_rng_state()
    assert all(value.dtype == torch.float32 for name, value in state.items() if name.startswith("tables."))
    steps(whole, range(3, 6))
    torch.manual_seed(5)
    resumed = a_collection(optimizer=optimizer).train()
    resumed.load_state_dict(state)
    resumed.load_optimizer_state(rule)
    torch.set_rng_state(random)
    steps(resumed, range(3, 6))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    # What evaluation sees is what the state holds, so that a plain collection with that state says the same.
    plain = a_collection()
    plain.load_state_dict(resumed.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(a_batch(9)).flat, resumed.eval()(a_batch(9)).flat)


def test_decay_too_small_for_bfloat16_is_lost_in_it_and_kept_on_average_or_by_two_planes() -> None:
    def decayed(storage: str) -> Tensor:
        torch.manual_seed(0)
        buffer = a_buffer(storage, "sgd", torch.ones(500, 8), learning_rate=1.0, l2=1e-3, l2_mode="lazy")
        ids_N = torch.arange(500)
        for _ in range(100):
            buffer(ids_N)
            buffer.update(ids_N, torch.zeros(500, 8))
            buffer.after_step()
        buffer.flush()
        return buffer.read(slice(None))

    assert bool((decayed("bfloat16") == 1).all())
    for storage, error in (("bfloat16_stochastic", 2e-3), ("split", 1e-6)):
        assert float(decayed(storage).mean()) == pytest.approx(0.999**100, rel=error)
    assert torch.equal(decayed("split"), decayed("float32"))


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(ValidationError, match='storage "bfloat16" does not go with kind "dense"'):
        EmbeddingOptimizer(storage="bfloat16")
    buffer = RowBuffer(torch.zeros(4, 4), "fbgemm")
    with pytest.raises(ValueError, match='^backend "fbgemm": FBGEMM trains no bfloat16 weights on CPU'):
        buffer.set_optimizer(EmbeddingOptimizer(kind="sgd", storage="split"))


def test_the_upper_plane_is_rounded_without_bias() -> None:
    start_RD = torch.randn(1000, 16, generator=torch.Generator().manual_seed(3)).abs()
    buffer = a_buffer("split", start_RD=start_RD)
    seen_RD = buffer.looked_up(torch.arange(1000))
    assert torch.equal(seen_RD, to_bf16(start_RD).float())  # no ties among these
    high, low = split_fp32(start_RD, "nearest")
    assert torch.equal(join_fp32(high, low, "nearest"), start_RD)
    assert abs(float(((seen_RD - start_RD) / start_RD).mean())) < 1e-4
