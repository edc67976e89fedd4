"""Products in bfloat16: emulated against the hardware's path, what stays float32, and whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tables import SCHEMA
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.bfloat16 import to_bf16
from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import MODELS, Ranker
from fullrank.training import Callback, Trainer, TrainerConfig, evaluate, load_model, mixed_precision, save_model
from fullrank.training.mixed_precision import products_in

CPU = torch.device("cpu")


def within_an_ulp(left: Tensor, right: Tensor) -> bool:
    """As bfloat16; numbers near zero within a unit of the largest of their tensor's 2^-8 part."""
    left, right = left.detach().float(), right.detach().float()
    scale = torch.maximum(left.abs(), right.abs())
    return bool(((left - right).abs() <= torch.maximum(scale, scale.max() * 2.0**-8) * 2.0**-7).all())


def both(run: Callable[[], Tensor], *leaves: Tensor) -> list[list[Tensor]]:
    """A result and its gradients, by emulation and by autocast."""
    found = []
    for precision in ("bfloat16_emulated", "bfloat16"):
        for leaf in leaves:
            leaf.grad = None
        with products_in(precision, CPU):  # type: ignore[arg-type]
            result = run()
        weights = torch.linspace(-1, 1, result.numel()).view(result.shape)
        (result.float() * weights).sum().backward()
        found.append([result, *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)])
    return found


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_()


PRODUCTS: dict[str, tuple[tuple[Tensor, ...], Callable[..., Tensor]]] = {
    "linear": ((random(64, 48), random(32, 48), random(32)), F.linear),
    "of tokens": ((random(8, 5, 48), random(32, 48), random(32)), F.linear),
    "matmul": ((random(6, 7, 16), random(6, 16, 9)), lambda a, b: a @ b),
    "bmm": ((random(6, 7, 16), random(6, 16, 9)), torch.bmm),
    "addmm": ((random(9), random(7, 16), random(16, 9)), torch.addmm),
    "einsum": ((random(5, 7), random(4, 7, 6)), lambda w, x: torch.einsum("on,bnd->bod", w, x)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_emulated_products_are_the_hardwares_to_a_unit(name: str) -> None:
    leaves, product = PRODUCTS[name]
    emulated, hardware = both(lambda: product(*leaves), *leaves)
    assert len(emulated) == len(hardware) == 1 + len(leaves)
    assert emulated[0].dtype == torch.float32 and hardware[0].dtype == torch.bfloat16
    for left, right in zip(emulated, hardware, strict=True):
        assert torch.equal(left, left.bfloat16().float())  # nothing but numbers of bfloat16
        assert within_an_ulp(left, right)
    with torch.no_grad():
        assert not torch.equal(emulated[0], product(*leaves))


def test_each_way_of_rounding_rounds_factors_and_result() -> None:
    x, weight = random(64, 48).detach(), random(32, 48).detach()
    results = {}
    for rounding in ("rne", "trunc", "sr"):
        torch.manual_seed(0)
        with products_in("bfloat16_emulated", CPU, rounding):  # type: ignore[arg-type]
            results[rounding] = F.linear(x, weight)
    for rounding in ("rne", "trunc"):
        left, right = (to_bf16(value, rounding).float() for value in (x, weight))  # type: ignore[arg-type]
        assert torch.equal(results[rounding], to_bf16(left @ right.t(), rounding).float())  # type: ignore[arg-type]
    error = {name: (value - F.linear(x, weight)) for name, value in results.items()}
    shrunk = {name: float((value * F.linear(x, weight)).sum()) for name, value in error.items()}
    assert shrunk["trunc"] < 10 * -abs(shrunk["rne"]) and abs(shrunk["sr"]) < 0.3 * -shrunk["trunc"]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.RMSNorm(32), nn.BatchNorm1d(32), nn.Softmax(1)])
def test_norms_and_softmax_compute_in_float32_on_the_units(norm: nn.Module) -> None:
    """Their one rounding is that of the result, though their inputs are bfloat16."""
    hidden = (3 * random(64, 32).detach() + 5).bfloat16()
    with products_in("bfloat16", CPU):
        result = norm(hidden)
    assert torch.equal(result, norm(hidden.float()).bfloat16())
    assert all(value.dtype == torch.float32 for value in norm.state_dict().values() if value.is_floating_point())


def test_what_says_so_itself_is_float32_and_nothing_lasts() -> None:
    layer, x = nn.Linear(48, 32), random(2, 48)
    exact = F.linear(x, layer.weight, layer.bias)
    for precision in ("bfloat16", "bfloat16_emulated"):
        with products_in(precision, CPU):  # type: ignore[arg-type]
            assert not torch.equal(layer(x).float(), exact)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(layer(x), exact)
        assert torch.equal(layer(x), exact)


def a_model(name: str = "dcn_v2", **config: Any) -> Ranker:
    torch.manual_seed(0)
    return MODELS[name].from_config(SCHEMA, {"hidden": (32, 16), "embedding_dim": 4, "embedding_init": 0.05, **config})


@pytest.mark.parametrize("name", ["dlrm", "dcn_v2", "autoint", "dhen", "wukong"])
def test_logits_loss_gradients_and_state_are_float32(dataset: Dataset, name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name].from_config(SCHEMA, {}).train()
    batch = next(iter(Loader(dataset, "train", 64)))
    for precision in ("bfloat16", "bfloat16_emulated"):
        with products_in(precision, CPU):  # type: ignore[arg-type]
            output = model(batch)
        loss = model.loss(output, batch)
        assert output.logits_BT.dtype == loss.dtype == torch.float32
        loss.backward()  # type: ignore[no-untyped-call]
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    trainer = Trainer(TrainerConfig(max_steps=2, precision="bfloat16"), EmbeddingOptimizer(kind="adam"))
    trainer.fit(model, [batch, batch])
    assert {value.dtype for key, value in trainer.engine.state().items() if "exp_avg" in key} == {torch.float32}
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.at = step

    def after_step(self, step: int, loss: Tensor) -> None:
        if step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("storage", "precision", "rounding"),
    [("bfloat16", "bfloat16", "rne"), ("bfloat16_stochastic", "bfloat16_emulated", "sr"), ("split", "float32", "rne")],
)
def test_an_interrupted_run_ends_in_the_same_bits_and_its_bundle_says_the_same(
    dataset: Dataset, tmp_path: Path, storage: Any, precision: Any, rounding: Any
) -> None:
    config = TrainerConfig(epochs=2, learning_rate=0.02, checkpoint_every=3, precision=precision, rounding=rounding)
    embedding = EmbeddingOptimizer(kind="row_wise_adagrad", l2=1e-3, l2_mode="lazy", storage=storage)

    def fit(out: Path, *callbacks: Callback, resume: bool = False) -> Ranker:
        model = a_model()
        loader = Loader(dataset, "train", 60, shuffle=True)
        valid = Loader(dataset, "valid", 200)
        Trainer(config, embedding, callbacks).fit(model, loader, valid, run_directory=out, resume=resume)
        return model

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", StopAt(14))
    torch.manual_seed(7)
    resumed = fit(tmp_path / "cut", resume=True)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    save_model(whole, tmp_path / "model")
    loaded, test = load_model(tmp_path / "model"), Loader(dataset, "test", 64)
    assert evaluate(loaded, test) == evaluate(whole, test)
    # Trained on in plain float32, tables are taken out of their storage.
    Trainer(TrainerConfig(max_steps=1)).fit(whole, Loader(dataset, "train", 60), warm_start=True)
    assert {value.dtype for value in whole.parameters()} == {torch.float32}


def test_emulated_training_stays_near_the_hardwares(dataset: Dataset) -> None:
    def logloss(precision: Any) -> float:
        model = a_model()
        Trainer(TrainerConfig(epochs=3, learning_rate=5e-3, precision=precision)).fit(
            model, Loader(dataset, "train", 64, shuffle=True)
        )
        return evaluate(model, Loader(dataset, "test", 200))["click"]["logloss"]

    emulated, hardware, exact = logloss("bfloat16_emulated"), logloss("bfloat16"), logloss("float32")
    assert emulated == pytest.approx(hardware, abs=1e-3)
    assert emulated == pytest.approx(exact, abs=5e-3) and emulated != exact


def test_a_processor_without_units_is_told_once(monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    mixed_precision.warn_without_units.cache_clear()
    batches: list[Any] = []
    for _ in range(2):
        with pytest.raises(ValueError, match="no batches"):
            Trainer(TrainerConfig(precision="bfloat16")).fit(a_model(), batches)
    mixed_precision.warn_without_units(CPU)
    mixed_precision.warn_without_units(CPU)
    assert [str(w.message).split(":")[0] for w in recwarn.list] == ["precision bfloat16"]
    mixed_precision.warn_without_units.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    mixed_precision.warn_without_units(CPU)
    assert len(recwarn.list) == 1


def test_what_cannot_be_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValidationError, match='rounding "sr" is of precision "bfloat16_emulated"'):
        TrainerConfig(precision="bfloat16", rounding="sr")
    with pytest.raises(ValidationError, match="does not go with compile"):
        TrainerConfig(precision="bfloat16_emulated", compile=True)
    with pytest.raises(ValueError, match="is bfloat16, in which small steps are lost: train float32 weights"):
        Trainer(TrainerConfig()).fit(a_model().bfloat16(), Loader(dataset, "train", 64))
