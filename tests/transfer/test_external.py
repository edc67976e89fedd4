"""Facts about external distillation: gradients, scales, masks, and the bias that a head of its own keeps out."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fullrank.transfer.external import (
    DistillationHeads,
    ExternalDistillation,
    StudentAdapter,
    scale_gradient,
    soft_label_bce,
)

B, T, WIDTH = 64, 2, 5


def parts(seed: int = 0, **options: object) -> tuple[nn.Linear, nn.Linear, DistillationHeads, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    backbone, served = nn.Linear(3, WIDTH), nn.Linear(WIDTH, T)
    heads = DistillationHeads(ExternalDistillation.model_validate(options), WIDTH, T)
    data = {"x": torch.randn(B, 3), "teacher": torch.rand(B, T), "labels": (torch.rand(B, T) < 0.3).float()}
    return backbone, served, heads, data


def loss_of(backbone: nn.Linear, served: nn.Linear, heads: DistillationHeads, data: dict[str, torch.Tensor]):
    shared = backbone(data["x"])
    return heads(served(shared), shared, data["teacher"], data["labels"])


def test_soft_labels_are_matched_in_the_mean_and_pull_by_the_difference() -> None:
    logits = torch.randn(B, T, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(B, T, dtype=torch.float64)
    targets[:16, 0] = torch.nan
    soft_label_bce(logits, targets).backward()
    expected = (logits.detach().sigmoid() - targets).nan_to_num(0.0) / torch.tensor([B - 16, B])
    assert torch.allclose(logits.grad, expected)
    weights = torch.arange(B).double()
    one = soft_label_bce(logits[16:, :1].detach(), targets[16:, :1], weights[16:])
    assert torch.isclose(soft_label_bce(logits[:, :1].detach(), targets[:, :1], weights), one)
    assert float(soft_label_bce(logits, torch.full_like(targets, torch.nan)).detach()) == 0.0


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_beta_scales_the_gradient_into_the_backbone_alone(beta: float) -> None:
    found = []
    for scale in (1.0, beta):
        backbone, served, heads, data = parts(mode="aux_head", beta=scale)
        loss = loss_of(backbone, served, heads, data)
        loss.backward()
        found.append((float(loss.detach()), backbone.weight.grad, heads.heads["teacher"].weight.grad))
        assert served.weight.grad is None, "the served head learns nothing from the teacher"
    (loss_1, backbone_1, head_1), (loss_b, backbone_b, head_b) = found
    assert loss_1 == loss_b and torch.equal(head_1, head_b) and torch.allclose(backbone_b, beta * backbone_1)
    x = torch.randn(4)
    assert torch.equal(scale_gradient(x, 0.1), x)


def test_weight_and_beta_are_one_for_the_backbone_and_two_for_the_head() -> None:
    grads = []
    for weight, beta in ((3.0, 1.0), (1.0, 3.0)):
        backbone, served, heads, data = parts(mode="aux_head", weight=weight, beta=beta)
        loss_of(backbone, served, heads, data).backward()
        grads.append((backbone.weight.grad, heads.heads["teacher"].weight.grad))
    assert torch.allclose(grads[0][0], grads[1][0]) and torch.allclose(grads[0][1], 3 * grads[1][1])


def test_a_stretched_prediction_stays_a_probability() -> None:
    backbone, served, heads, data = parts(mode="aux_head", alpha=5.0)
    shared = backbone(data["x"])
    found = heads(served(shared), shared, data["teacher"], data["labels"])
    expected = soft_label_bce(heads.heads["teacher"](shared), (5 * data["teacher"]).clamp(max=1))
    assert torch.equal(found, expected) and (5 * data["teacher"] > 1).any()


def test_the_adapter_and_the_student_do_not_move_each_other() -> None:
    backbone, served, heads, data = parts(mode="aux_head+adapter")
    data["teacher"].requires_grad_()
    before = {name: value.clone() for name, value in heads.adapter.named_buffers()}
    loss_of(backbone, served, heads, data).backward()
    assert data["teacher"].grad is None and not list(heads.adapter.parameters())
    assert set(heads.heads) == {"teacher", "adapted"} and heads.heads["adapted"].weight.grad.abs().sum() > 0
    moved = {name: value.clone() for name, value in heads.adapter.named_buffers()}
    assert not torch.equal(moved["b_2"], before["b_2"])
    torch.optim.SGD(backbone.parameters(), 10.0).step()
    assert all(torch.equal(value, moved[name]) for name, value in heads.adapter.named_buffers())
    _, _, replaced, _ = parts(mode="aux_head+adapter", adapter_head="replace")
    assert set(replaced.heads) == {"adapted"}


def test_the_adapters_optimiser_is_adam() -> None:
    torch.manual_seed(0)
    adapter = StudentAdapter(T, 4, 0.02)
    twin = [adapter.get_buffer(name).clone().requires_grad_() for name in adapter.NAMES]
    adam = torch.optim.Adam(twin, 0.02)
    for _ in range(30):
        teacher, labels = torch.rand(B, T), (torch.rand(B, T) < 0.4).float()
        adam.zero_grad()
        soft_label_bce(adapter._of(teacher, *twin), labels).backward()
        adam.step()
        adapter.learn(teacher, labels)
    for name, value in zip(adapter.NAMES, twin, strict=True):
        assert torch.allclose(adapter.get_buffer(name), value.detach(), atol=1e-5), name


def test_an_adapter_takes_the_bias_out_of_a_teacher_in_one_pass() -> None:
    """As the stream of the benchmark: a teacher whose log-odds are one too high."""
    torch.manual_seed(0)
    adapter, said, raw, clicks = StudentAdapter(1, 8, 0.02), 0.0, 0.0, 0.0
    for step in range(400):
        logit = torch.randn(100, 1) - 2.5
        teacher, labels = torch.sigmoid(logit + 1), torch.bernoulli(torch.sigmoid(logit))
        if step >= 200:
            said += float(torch.sigmoid(adapter(teacher)).sum())
            raw, clicks = raw + float(teacher.sum()), clicks + float(labels.sum())
        adapter.learn(teacher, labels)
    assert 0.95 < said / clicks < 1.05 and raw / clicks > 1.5


def test_one_head_takes_a_share_of_the_teachers_bias_and_two_heads_none() -> None:
    """Squared loss on the same X: w b / (1 + w), and 0."""
    torch.manual_seed(0)
    bias, weight, n = 0.7, 3.0, 500
    x = torch.cat([torch.randn(n, 3), torch.ones(n, 1)], 1).double()
    truth = x @ torch.tensor([1.0, -1.0, 0.5, 0.2]).double()
    y, teacher = truth + torch.randn(n).double(), truth + bias
    solve = torch.linalg.lstsq
    served = solve(x, y[:, None]).solution
    shared = solve(torch.cat([x, weight**0.5 * x]), torch.cat([y, weight**0.5 * teacher])[:, None]).solution
    leaked = (shared - (served + weight * solve(x, truth[:, None]).solution) / (1 + weight))[3, 0]
    assert abs(float(leaked) - weight * bias / (1 + weight)) < 1e-6


def test_what_makes_no_sense_is_refused() -> None:
    for wrong in ({"alpha": 0}, {"beta": -1}, {"weight": -0.1}, {"mode": "hint"}, {"mode": "kd", "beta": 2}):
        with pytest.raises(ValidationError):
            ExternalDistillation.model_validate(wrong)
    with pytest.raises(ValueError, match=r"3 labels of the teacher are outside \[0, 1\]"):
        soft_label_bce(torch.zeros(3, 1), torch.tensor([[1.5], [-0.5], [2.0]]))
    adapter = StudentAdapter(1, 4, 0.1)
    for labels in (None, torch.full((3, 1), torch.nan)):
        with pytest.raises(ValueError, match="the adapter learns from labels"):
            adapter.learn(torch.rand(3, 1), labels)
