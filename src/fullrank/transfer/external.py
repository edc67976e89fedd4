"""Losses of external distillation: a teacher's logged predictions as further labels.

    kd                L = h(y_S, y) + w h(y_S, y_F)
    aux_head          L = h(y_S, y) + w h(y_D, min(1, α y_F)),         y_D = H_D(GS_β(b(x)))
    aux_head+adapter  L = the same + w h(y_D2, t),                     t = stop_grad(σ(y_SA))

h is cross-entropy on logits, b(x) what the served head reads, and GS_β passes values as they are and gradients β times.
"""

# Shapes: B rows, T tasks, H hidden units of the adapter, I width of b(x).

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.layers.mlp import Float32Linear

# Probabilities of a teacher are held this far from 0 and 1 before their logits are taken.
NEAREST = 1e-6


class ExternalDistillation(BaseModel):
    """How a student learns from a teacher's predictions.

    Attributes:
        mode: `kd`, the served head learns them beside the labels; `aux_head`, a head of their own does, so that the
            teacher's bias does not reach what is served; `aux_head+adapter`, and a second such head learns what a small
            network makes of them that is fitted to the fresh labels.
        alpha: what predictions are multiplied by, up to 1; a long tail near 0 teaches more when it is stretched.
        beta: what the heads' gradients into the shared part are multiplied by.
        weight: of each head's loss.
        adapter_hidden: units of the adapter's hidden layer.
        adapter_rate: learning rate of its own optimiser, Adam.
        adapter_head: the adapter's head is its `own`, or it takes the place of the other (`replace`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["kd", "aux_head", "aux_head+adapter"] = "aux_head"
    alpha: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    beta: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    adapter_hidden: int = Field(default=8, ge=1)
    adapter_rate: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    adapter_head: Literal["own", "replace"] = "own"

    @model_validator(mode="after")
    def _of_the_head(self) -> Self:
        if self.mode == "kd" and (self.alpha != 1 or self.beta != 1):
            raise ValueError("alpha and beta are of the auxiliary head, which kd has not")
        return self


def soft_label_bce(logits_BT: Tensor, targets_BT: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """Σ over tasks of the mean cross-entropy with a probability; a NaN target is masked.

    It is least at σ(z) = E[target | x], and its gradient by z is σ(z) - target.

    Raises:
        ValueError: if a target is outside [0, 1]; says how many.
    """
    there_BT = ~targets_BT.isnan()
    target_BT = torch.where(there_BT, targets_BT, 0.0)
    if bad := int(((target_BT < 0) | (target_BT > 1)).sum()):
        raise ValueError(f"{bad} labels of the teacher are outside [0, 1]")
    loss_BT = F.binary_cross_entropy_with_logits(logits_BT, target_BT, reduction="none")
    weight_BT = there_BT.to(loss_BT.dtype) if weights_B is None else there_BT * weights_B[:, None]
    total: Tensor = ((loss_BT * weight_BT).sum(0) / weight_BT.sum(0).clamp_min(1e-12)).sum()
    return total


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x, whose gradient is multiplied on its way back."""
    scaled: Tensor = _ScaledGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return scaled


class StudentAdapter(nn.Module):
    """y_SA = x + w_2 · relu(w_1 x + b_1) + b_2 of the teacher's log-odds x, for each task.

    It begins as the teacher (w_2 = b_2 = 0), and learns by an optimiser of its own. All of it are buffers: no optimiser
    of the student moves it, and a checkpoint has its moments.

    Deviation: the paper's adapter is an MLP; here it is one beside the identity, so that it is of use from the start.
    """

    NAMES = ("w_1", "b_1", "w_2", "b_2")

    def __init__(self, tasks: int, hidden: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        shapes = {"w_1": (tasks, hidden), "b_1": (tasks, hidden), "w_2": (tasks, hidden), "b_2": (tasks,)}
        for name, shape in shapes.items():
            start = torch.randn(shape) if name.endswith("_1") else torch.zeros(shape)
            self.register_buffer(name, start)
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_square", torch.zeros(shape))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, teacher_BT: Tensor) -> Tensor:
        """Logits_BT; NaN where the teacher's probability is."""
        return self._of(teacher_BT, *(self.get_buffer(name) for name in self.NAMES))

    def _of(self, teacher_BT: Tensor, w_1: Tensor, b_1: Tensor, w_2: Tensor, b_2: Tensor) -> Tensor:
        x_BT = torch.logit(teacher_BT.float(), eps=NEAREST)
        hidden_BTH = (x_BT[:, :, None] * w_1 + b_1).relu()
        return x_BT + (hidden_BTH * w_2).sum(2) + b_2

    def learn(self, teacher_BT: Tensor, labels_BT: Tensor | None, weights_B: Tensor | None = None) -> None:
        """One step towards fresh labels, where both they and the teacher's are there.

        Raises:
            ValueError: if there is no label at all: an adapter has nothing else to learn from.
        """
        if labels_BT is None or bool(labels_BT.isnan().all()):
            raise ValueError("the adapter learns from labels, and these rows have none")
        target_BT = torch.where(teacher_BT.isnan(), torch.nan, labels_BT)
        with torch.enable_grad(), torch.autocast(teacher_BT.device.type, enabled=False):
            values = [self.get_buffer(name).clone().requires_grad_() for name in self.NAMES]
            gradients = torch.autograd.grad(
                soft_label_bce(self._of(teacher_BT.nan_to_num(0.5), *values), target_BT, weights_B), values
            )
        steps = self.get_buffer("steps").add_(1)
        with torch.no_grad():
            for name, gradient in zip(self.NAMES, gradients, strict=True):
                mean = self.get_buffer(f"{name}_mean").lerp_(gradient, 0.1)
                square = self.get_buffer(f"{name}_square").lerp_(gradient.square(), 0.001)
                step = (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
                self.get_buffer(name).sub_(self.rate * step)


class DistillationHeads(nn.Module):
    """What training needs beside the student, and serving does not: heads on b(x), and the adapter.

    Args:
        config: how.
        width: I.
        tasks: T.
    """

    def __init__(self, config: ExternalDistillation, width: int, tasks: int) -> None:
        super().__init__()
        self.config = config
        adapted = config.mode == "aux_head+adapter"
        heads = {"teacher": not (adapted and config.adapter_head == "replace"), "adapted": adapted}
        present = [name for name, there in heads.items() if there and config.mode != "kd"]
        self.heads = nn.ModuleDict({name: _head(width, tasks) for name in present})
        self.adapter = StudentAdapter(tasks, config.adapter_hidden, config.adapter_rate) if adapted else None

    def forward(
        self,
        served_BT: Tensor,
        shared_BI: Tensor | None,
        teacher_BT: Tensor,
        labels_BT: Tensor,
        weights_B: Tensor | None = None,
    ) -> Tensor:
        """The weighted loss beside that of the labels; the adapter learns on the way.

        Args:
            served_BT: logits of the served head.
            shared_BI: b(x); None in `kd`.
            teacher_BT: probabilities, NaN where there is none; no gradient reaches them.
        """
        config, teacher_BT = self.config, teacher_BT.detach()
        if config.mode == "kd":
            return config.weight * soft_label_bce(served_BT, teacher_BT, weights_B)
        assert shared_BI is not None
        scaled_BI = scale_gradient(shared_BI, config.beta)
        targets = {"teacher": (config.alpha * teacher_BT).clamp(max=1.0)}
        if self.adapter is not None:
            self.adapter.learn(teacher_BT, labels_BT, weights_B)
            targets["adapted"] = torch.sigmoid(self.adapter(teacher_BT)).detach()
        for name, head in self.heads.items():
            _start(head, targets[name])
        losses = [soft_label_bce(head(scaled_BI), targets[name], weights_B) for name, head in self.heads.items()]
        return config.weight * torch.stack(losses).sum()


@torch.no_grad()
def _start(head: nn.Module, targets_BT: Tensor) -> None:
    """Let a new head predict the mean of the first targets it sees: its first gradients would else teach what it shares
    with the served head that events are rare."""
    bias_T = head.get_parameter("bias")
    if not bool(bias_T.any()):
        there_BT = ~targets_BT.isnan()
        mean_T = targets_BT.nan_to_num(0.0).sum(0) / there_BT.sum(0)
        bias_T.copy_(torch.where(there_BT.any(0), torch.logit(mean_T, eps=1e-3), bias_T))


def _head(width: int, tasks: int) -> Float32Linear:
    head = Float32Linear(width, tasks)
    nn.init.xavier_normal_(head.weight)
    nn.init.zeros_(head.bias)
    return head
