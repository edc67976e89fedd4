"""The training loop against scikit-learn, PyTorch's own optimisers, and itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tables import SCHEMA, frame
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset
from fullrank.data.loader import Loader, batch_from_frame
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.metrics import auc
from fullrank.models import MODELS, Ranker, RankerOutput
from fullrank.schema import Label, Schema
from fullrank.training import Callback, Trainer, TrainerConfig, evaluate, precision
from fullrank.training.optimizers import DenseOptimizer


def _model(name: str = "dcn_v2", schema: Schema = SCHEMA, seed: int = 0, **config: Any) -> Ranker:
    torch.manual_seed(seed)
    if name == "dcn_v2":
        config = {"hidden": (16,), "embedding_dim": 4, "embedding_init": 0.01, **config}
    return MODELS[name].from_config(schema, config)


def _weights(model: Ranker) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Record(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validations: list[dict[str, float]] = []
        self.events: list[str] = []

    def start(self, model: Ranker, step: int) -> None:
        self.events.append(f"start {step}")

    def after_step(self, step: int, loss: Tensor) -> None:
        self.losses.append(float(loss))

    def after_validation(self, step: int, metrics: dict[str, float]) -> None:
        self.validations.append(metrics)

    def finish(self) -> None:
        self.events.append("finish")


def test_a_model_with_enough_weights_learns_a_tiny_set_by_heart() -> None:
    batch = batch_from_frame(frame(64, 5), SCHEMA)
    model = _model()
    config = TrainerConfig(epochs=300, learning_rate=0.02, gradient_clip=None)
    result = Trainer(config).fit(model, [batch])
    assert result.history[0]["train_loss"] > 0.01 and result.train_loss < 1e-3  # of the first epoch, of the last
    assert evaluate(model, [batch])["click"]["logloss"] < 1e-3


def test_logistic_regression_has_scikit_learns_coefficients() -> None:
    data = frame(400, 7)
    batch = batch_from_frame(data, SCHEMA)
    model = _model("lr")
    strength = 1e-2
    # scikit-learn penalises ½‖w‖² against C times the sum of losses; here λ/2 ‖w‖² against their mean. The weight of
    # the number has no penalty here, so scikit-learn gets it scaled up until its penalty vanishes.
    Trainer(
        TrainerConfig(epochs=4000, optimizer="sgd", learning_rate=2.0, gradient_clip=None),
        EmbeddingOptimizer(kind="dense", l2=strength),
    ).fit(model, [batch])
    columns = np.zeros((400, 1 + 40 + 60 + 10))
    columns[:, 0] = data["price"].to_numpy() * 1e4
    columns[np.arange(400), 1 + data["user"].to_numpy()] = 1
    columns[np.arange(400), 41 + data["item"].to_numpy()] = 1
    for row, tags in enumerate(data["tags"]):
        for tag in tags:
            columns[row, 101 + tag] += 1 / len(tags)
    oracle = LogisticRegression(C=1 / (strength * 400), solver="newton-cholesky", tol=1e-10)
    oracle.fit(columns, data["click"].to_numpy())
    state = model.state_dict()
    ours = [state[f"terms.0.weights.tables.{table}.weight"].view(-1) for table in ("user", "item", "tags")]
    assert torch.cat(ours).numpy() == pytest.approx(oracle.coef_[0, 1:], abs=1e-3)
    assert float(state["terms.0.numeric_N"]) == pytest.approx(oracle.coef_[0, 0] * 1e4, abs=1e-3)
    assert float(state["terms.0.bias"]) == pytest.approx(oracle.intercept_[0], abs=1e-3)


@pytest.mark.parametrize("kind", ["adam", "adagrad", "sgd"])
def test_the_optimiser_has_the_bits_of_pytorchs_class(kind: str) -> None:
    def fresh() -> tuple[dict[str, Tensor], torch.Generator]:
        generator = torch.Generator().manual_seed(3)
        shapes = {"a": (7, 3), "b": (5,), "never": (2,)}
        return {n: torch.randn(s, generator=generator).requires_grad_() for n, s in shapes.items()}, generator

    def gradients(parameters: dict[str, Tensor], generator: torch.Generator, step: int) -> None:
        for name in ("a", "b"):
            skip = name == "b" and step == 4
            parameters[name].grad = None if skip else torch.randn(parameters[name].shape, generator=generator)

    ours, generator = fresh()
    optimizer = DenseOptimizer(kind, ours, {"a": 0.1, "b": 0.02, "never": 0.1})  # type: ignore[arg-type]
    theirs, other = fresh()
    classes: dict[str, Any] = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}
    groups = [{"params": [theirs["a"], theirs["never"]], "lr": 0.1}, {"params": [theirs["b"]], "lr": 0.02}]
    reference = classes[kind](groups, fused=True)
    for step in range(20):
        scale = 1 - step / 20
        gradients(ours, generator, step)
        optimizer.step(scale)
        gradients(theirs, other, step)
        for group, rate in zip(reference.param_groups, (0.1, 0.02), strict=True):
            group["lr"] = rate * scale
        reference.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_clipping_is_that_of_pytorch(limit: float) -> None:
    batch = batch_from_frame(frame(64, 5), SCHEMA)
    ours, theirs = _model(), _model()
    Trainer(TrainerConfig(optimizer="sgd", learning_rate=0.5, gradient_clip=limit)).fit(ours, [batch])
    theirs.train()
    theirs.start_at_base_rate(batch)
    theirs.loss(theirs(batch), batch).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    assert _equal(_weights(ours), _weights(theirs))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(dataset: Dataset) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        model = _model(dropout=0.3)
        loader = Loader(dataset, "train", 64, shuffle=True, seed=seed, workers=2)
        Trainer(TrainerConfig(epochs=2, seed=seed)).fit(model, loader)
        return _weights(model)

    first = run(1)
    assert _equal(first, run(1))
    assert not _equal(first, run(2))


def test_validation_does_not_change_what_is_learnt(dataset: Dataset) -> None:
    def run(**extra: Any) -> dict[str, Tensor]:
        model = _model(dropout=0.3, batch_norm=True)
        valid = Loader(dataset, "valid", 64) if extra else None
        train = Loader(dataset, "train", 64, shuffle=True)
        # So slow that every step lowers the loss: the last weights are the best and remain.
        Trainer(TrainerConfig(max_steps=9, patience=0, learning_rate=1e-4, **extra)).fit(model, train, valid)
        return _weights(model)

    assert _equal(run(), run(validate_every=2, monitor="logloss"))


def test_the_best_validation_is_the_one_whose_weights_remain(dataset: Dataset) -> None:
    class Snapshots(Callback):
        def __init__(self) -> None:
            self.model: Ranker | None = None
            self.weights: dict[int, dict[str, Tensor]] = {}

        def start(self, model: Ranker, step: int) -> None:
            self.model = model

        def after_validation(self, step: int, metrics: dict[str, float]) -> None:
            assert self.model is not None
            self.weights[step] = _weights(self.model)

    snapshots = Snapshots()
    model = _model()
    config = TrainerConfig(epochs=30, learning_rate=0.05, schedule="plateau", patience=2)
    train, valid = Loader(dataset, "train", 64, shuffle=True), Loader(dataset, "valid", 64)
    result = Trainer(config, callbacks=[snapshots]).fit(model, train, valid)
    scores = [validation["auc"] for validation in result.history]
    assert result.stopped_early and result.epochs < 30
    assert result.best["auc"] == max(scores)
    assert result.best["step"] < result.steps
    assert _equal(_weights(model), snapshots.weights[int(result.best["step"])])
    assert evaluate(model, valid) == result.best_tasks
    assert result.best_tasks["click"].items() <= result.best.items()
    gains = [score > max(scores[:place], default=0) + 1e-6 for place, score in enumerate(scores)]
    assert [v["learning_rate"] for v in result.history] == pytest.approx(
        [0.05 * 0.1 ** gains[:place].count(False) for place in range(len(scores))]
    )


def test_the_linear_schedule_falls_to_zero_over_all_steps() -> None:
    # One weight under a constant gradient of SGD moves by the sum of the learning rates.
    batch = batch_from_frame(frame(1, 5), SCHEMA)

    class Slope(Ranker):
        name = "slope"

        def __init__(self) -> None:
            super().__init__(SCHEMA, Ranker.Config())
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, batch: Batch) -> RankerOutput:
            return RankerOutput(self.weight.expand(len(batch), 1))

        def loss(self, output: RankerOutput, batch: Batch) -> Tensor:
            return output.logits_BT.mean()

    model = Slope()
    config = TrainerConfig(epochs=8, optimizer="sgd", learning_rate=0.5, schedule="linear", gradient_clip=None)
    Trainer(config).fit(model, [batch, batch])
    assert float(model.weight.detach()) == pytest.approx(-0.5 * sum(1 - step / 16 for step in range(16)))


@pytest.mark.parametrize("kind", ["dense", "adagrad", "row_wise_adagrad", "adam", "sgd"])
def test_tables_learn_at_their_own_rate(kind: Any) -> None:
    batch = batch_from_frame(frame(64, 5), SCHEMA)

    def moved(rate: float | None) -> float:
        model = _model()
        before = _weights(model)
        config = TrainerConfig(optimizer="sgd", learning_rate=1e-3, gradient_clip=None)
        Trainer(config, EmbeddingOptimizer(kind=kind, learning_rate=rate)).fit(model, [batch])
        key = next(name for name in before if name.endswith("tables.user.weight"))
        return float((model.state_dict()[key] - before[key]).norm())

    assert moved(1e-2) == pytest.approx(10 * moved(1e-3), rel=1e-2)
    assert moved(None) == moved(1e-3)


def test_fused_tables_of_two_collections_all_learn(dataset: Dataset) -> None:
    model = _model("deepfm", hidden=(8,), embedding_dim=4, embedding_init=0.01)
    before = _weights(model)
    Trainer(TrainerConfig(), EmbeddingOptimizer(kind="adagrad", learning_rate=0.01)).fit(
        model, Loader(dataset, "train", 64)
    )
    after = model.state_dict()
    tables = [name for name in before if ".tables." in name]
    assert len(tables) == 6
    assert all(not torch.equal(before[name], after[name]) for name in tables)


def test_an_infinite_loss_names_its_step_and_leaves_the_weights_before_it() -> None:
    good = batch_from_frame(frame(32, 5), SCHEMA)
    bad = batch_from_frame(frame(32, 6), SCHEMA)
    bad.numeric_BN[3, 0] = math.nan
    model, clean = _model(), _model()
    record = Record()
    with pytest.raises(ValueError, match="the loss is nan at step 3"):
        Trainer(TrainerConfig(), callbacks=[record]).fit(model, [good, good, bad, good])
    Trainer(TrainerConfig()).fit(clean, [good, good])
    assert _equal(_weights(model), _weights(clean))
    assert record.events == ["start 0", "finish"]


def test_callbacks_see_every_step_and_validation(dataset: Dataset) -> None:
    record = Record()
    train, valid = Loader(dataset, "train", 64), Loader(dataset, "valid", 64)
    result = Trainer(TrainerConfig(epochs=2, patience=0), callbacks=[record]).fit(_model(), train, valid)
    assert len(record.losses) == result.steps == 2 * len(train)
    assert [v["step"] for v in record.validations] == [10, 20]
    assert result.history[0]["train_loss"] == pytest.approx(np.mean(record.losses[:10]))
    assert result.history[1]["train_loss"] == pytest.approx(np.mean(record.losses[10:]))


def test_validation_every_few_steps_also_ends_with_one(dataset: Dataset) -> None:
    train, valid = Loader(dataset, "train", 64), Loader(dataset, "valid", 64)
    config = TrainerConfig(epochs=3, max_steps=14, validate_every=4, patience=0)
    result = Trainer(config).fit(_model(), train, valid)
    assert [v["step"] for v in result.history] == [4, 8, 12, 14]
    assert result.steps == 14 and result.epochs == 1


def test_bfloat16_training_stays_near_float32(dataset: Dataset) -> None:
    def loss(precision: Any) -> float:
        model = _model(hidden=(32, 16))
        config = TrainerConfig(epochs=3, learning_rate=5e-3, precision=precision)
        Trainer(config).fit(model, Loader(dataset, "train", 64, shuffle=True))
        assert all(value.dtype != torch.bfloat16 for value in model.state_dict().values())
        return evaluate(model, Loader(dataset, "test", 64))["click"]["logloss"]

    assert loss("bfloat16") == pytest.approx(loss("float32"), abs=5e-3)


def test_evaluation_equals_the_metrics_of_all_rows_at_once(dataset: Dataset) -> None:
    model = _model(batch_norm=True, embedding_init=1.0)
    metrics = evaluate(model, Loader(dataset, "test", 33))["click"]
    whole = next(iter(Loader(dataset, "test", 200)))
    model.eval()
    with torch.no_grad():
        logits_B = model(whole).logits_BT[:, 0]
    assert metrics["auc"] == pytest.approx(auc(logits_B, whole.labels_BT[:, 0]), abs=1e-9)
    assert metrics["rows"] == 200 and "gauc" in metrics


def test_several_labels_have_their_metrics_and_unobserved_ones_are_left_out() -> None:
    schema = SCHEMA.model_copy(update={"labels": (Label(name="click"), Label(name="spent", kind="regression"))})
    batch = batch_from_frame(frame(50, 5).with_columns(spent=2.0 * frame(50, 5)["price"]), schema)
    batch.labels_BT[::2, 1] = math.nan
    model = _model("lr", schema)
    metrics = evaluate(model, [batch[:20], batch[20:]])
    expected = batch.labels_BT[1::2, 1].double()
    assert metrics["spent"]["rows"] == 25
    assert metrics["spent"]["rate"] == pytest.approx(float(expected.mean()))
    with torch.no_grad():
        error = model(batch).logits_BT[1::2, 1].double() - expected
    assert metrics["spent"]["mse"] == pytest.approx(float(error.square().mean()))


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batches"):
        Trainer(TrainerConfig()).fit(_model(), [])


def test_auto_precision_is_what_the_machine_is_fast_in_and_a_resumed_run_keeps_it(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {torch.bfloat16: 400.0, torch.float32: 100.0}
    monkeypatch.setattr(precision, "gemm_gflops", lambda dtype, seconds: speeds[dtype])
    config = TrainerConfig(epochs=2, precision="auto")

    def fit(out: Path, *, resume: bool = False, callbacks: Sequence[Callback] = ()) -> tuple[str, Any]:
        torch.manual_seed(0)
        model = _model(hidden=(32, 16))
        loader = Loader(dataset, "train", 64, shuffle=True)
        result = Trainer(config, callbacks=callbacks).fit(model, loader, run_directory=out, resume=resume)
        return result.precision, model.state_dict()

    chosen, whole = fit(tmp_path / "whole")
    assert chosen == "bfloat16"

    class Stop(Callback):
        def after_step(self, step: int, loss: torch.Tensor) -> None:
            if step == len(Loader(dataset, "train", 64)) + 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", callbacks=[Stop()])
    speeds[torch.bfloat16] = 50.0
    chosen, resumed = fit(tmp_path / "cut", resume=True)
    assert chosen == "bfloat16"
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert fit(tmp_path / "new")[0] == "float32"
