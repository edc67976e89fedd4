"""Facts about codes: what rounding costs, and that every prefix is a code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fullrank.data.planted import planted_task
from fullrank.models import RankerSpec
from fullrank.models.base import example_batch
from fullrank.transfer.codec import MatryoshkaCodec, pack, unpack
from fullrank.transfer.tap import EmbeddingTap


@pytest.fixture(scope="module")
def embeddings() -> torch.Tensor:
    """Of six directions, of falling size, in 20 units of very different scales; one unit never fires."""
    torch.manual_seed(0)
    latent = torch.randn(3000, 6) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.2])
    units = (latent @ torch.randn(6, 20)).relu() * torch.logspace(-2, 2, 20)
    units[:, 3] = 0
    return units


@pytest.fixture(scope="module")
def codec(embeddings: torch.Tensor) -> MatryoshkaCodec:
    torch.manual_seed(0)
    return MatryoshkaCodec(20, 7, (2, 4)).fit(embeddings, epochs=15)


def test_four_bits_are_off_by_a_sixteenth_and_by_an_eighth_at_the_top() -> None:
    z = np.linspace(-1, 1, 4001, dtype=np.float32).reshape(-1, 1)
    off = np.abs(z - unpack(pack(z), 1))
    assert off[z <= 15 / 16].max() <= 1 / 16 and 1 / 16 < off.max() <= 1 / 8
    assert set(np.unique(8 * unpack(pack(z), 1))) == set(range(-8, 8))


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_codes_and_what_they_stand_for_go_round(dim: int) -> None:
    codes = pack(np.random.default_rng(0).uniform(-1, 1, (500, dim)).astype(np.float32))
    assert codes.shape == (500, (dim + 1) // 2)
    assert (pack(unpack(codes, dim)) == codes).all()
    whole = np.random.default_rng(0).uniform(-1, 1, (5, dim)).astype(np.float32)
    assert (unpack(pack(whole, 32), dim, 32) == whole).all()


def test_a_longer_prefix_says_more(codec: MatryoshkaCodec, embeddings: torch.Tensor) -> None:
    errors = [float(error) for error in codec.reconstruction_error(embeddings).values()]
    assert list(codec.reconstruction_error(embeddings)) == [2, 4, 7]
    assert 0.7 > errors[0] > errors[1] > errors[2]
    untrained = MatryoshkaCodec(20, 7, (2, 4)).reconstruction_error((embeddings - codec.mean_I) / codec.std_I)
    assert errors[0] < 0.7 * float(untrained[2].detach())


def test_the_standardisation_is_that_of_what_it_was_fitted_to(codec: MatryoshkaCodec, embeddings: torch.Tensor) -> None:
    assert torch.allclose(codec.mean_I, embeddings.mean(0)) and codec.std_I[3] == 1
    moved = codec.encode(embeddings + 5 * codec.std_I)
    assert (moved != codec.encode(embeddings)).any()


def test_a_codec_is_the_same_once_saved(codec: MatryoshkaCodec, embeddings: torch.Tensor, tmp_path: Path) -> None:
    codec.save(tmp_path / "codec.safetensors")
    again = MatryoshkaCodec.load(tmp_path / "codec.safetensors")
    assert (again.encode(embeddings) == codec.encode(embeddings)).all()
    assert again.decode(codec.encode(embeddings), 4).shape == (3000, 4)
    (tmp_path / "other").write_bytes(b"no codec")
    with pytest.raises(ValueError, match="no codec of embeddings"):
        MatryoshkaCodec.load(tmp_path / "other")


def test_bad_codes_are_refused(codec: MatryoshkaCodec, embeddings: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="prefix is 3, expected one of 2, 4, 7"):
        codec.decode(codec.encode(embeddings[:2]), 3)
    with pytest.raises(ValueError, match=r"expected \(n, 20\)"):
        codec.encode(embeddings[:, :4])
    with pytest.raises(ValueError, match="NaN or infinity"):
        MatryoshkaCodec(20, 7).fit(embeddings / 0)
    with pytest.raises(ValueError, match="prefix_dims are"):
        MatryoshkaCodec(20, 7, (9,))


def test_a_tap_changes_nothing_and_takes_no_gradient() -> None:
    torch.manual_seed(0)
    schema = planted_task("timed").log_schema()
    model = RankerSpec.of({"name": "din", "hidden": [8, 4], "embedding_init": 0.1}).build(schema)
    batch = example_batch(schema, 5)
    before = model.eval()(batch).logits_BT
    model.train()
    tap = EmbeddingTap(model, ["mlp.layers.1", "mlp.layers.3"])
    embeddings_BE, logits_BT = tap(batch)
    assert embeddings_BE.shape == (5, 12) and (embeddings_BE >= 0).all()
    assert torch.equal(logits_BT, before) and torch.equal(model.eval()(batch).logits_BT, before)
    # The last hidden layer is what the logit is a linear map of.
    last = model.mlp.layers[-1]
    assert torch.allclose(last(embeddings_BE[:, 8:]), before)
    codec = MatryoshkaCodec(12, 3)
    sum(codec.reconstruction_error(embeddings_BE).values()).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert codec.decoder.weight.grad.abs().sum() > 0


def test_a_layer_that_is_not_there_is_named_with_those_that_are() -> None:
    schema = planted_task("timed").log_schema()
    model = RankerSpec.of({"name": "din", "hidden": [8]}).build(schema)
    with pytest.raises(ValueError, match=r'din has no layer "mlp.9"; its layers are .*mlp.layers.1'):
        EmbeddingTap(model, ["mlp.9"])
    with pytest.raises(ValueError, match="layers are empty"):
        EmbeddingTap(model, [])
    with pytest.raises(ValueError, match="expected a tensor with 5 rows"):
        EmbeddingTap(model, ["embeddings"])(example_batch(schema, 5))
