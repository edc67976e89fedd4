"""Dice, the activation that gates by how far a number is from its mean; alone, and with the layers around it."""

# Shapes: E rows (events), I inputs, A width.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Rows of one block: with 64 units, what is worked on at a time fits the second-level caches of two or more cores.
BLOCK_ROWS = 8192


class Dice(nn.Module):
    """dice(x) = p ⊙ x + (1-p) ⊙ α ⊙ x with p = σ of x standardised over the batch (in evaluation by running moments).

    Momentum and epsilon are those of public implementations (0.01 and about 0).

    Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018, section 5.3.
    """

    mean_A: Tensor
    variance_A: Tensor

    def __init__(self, width: int, *, momentum: float = 0.01, epsilon: float = 1e-8) -> None:
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.alpha_A = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean_A", torch.zeros(width))
        self.register_buffer("variance_A", torch.ones(width))

    def forward(self, x_EA: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # the same, for any number of rows
            standard_EA = (x_EA - self.mean_A) * torch.rsqrt(self.variance_A + self.epsilon)
        else:
            standard_EA = nn.functional.batch_norm(
                x_EA, self.mean_A, self.variance_A, None, None, self.learns(x_EA.shape[0]), self.momentum, self.epsilon
            )
        return x_EA * torch.lerp(self.alpha_A.to(x_EA.dtype), torch.ones_like(x_EA), torch.sigmoid(standard_EA))

    def learn(self, mean_A: Tensor, variance_A: Tensor, count: int) -> None:
        """Move the running moments towards mean and biased variance of `count` rows."""
        self.mean_A.lerp_(mean_A.to(self.mean_A.dtype), self.momentum)
        self.variance_A.lerp_((variance_A * (count / (count - 1))).to(self.variance_A.dtype), self.momentum)

    def learns(self, count: int) -> bool:
        """Whether moments are those of the batch: not in evaluation, nor of a single row, which has no variance."""
        return self.training and count > 1


def dice_scores(z_EI: Tensor, weight_AI: Tensor, bias_A: Tensor, dice: Dice, score_A: Tensor) -> Tensor:
    """dice(z Wᵀ + b) · score, shape (E,).

    On a CPU nothing of size (E, A) is stored, which is as exact as the plain formula and faster: rows are taken in
    blocks whose intermediates stay in cache. Three facts allow it:

    * The moments of x = z Wᵀ + b follow from those of z: mean W μ + b and variance diag(W C Wᵀ), C the covariance of z.
    * Standardisation is affine, so its result y = z (c W)ᵀ + c (b - mean), c = 1/√(variance + ε), is itself a product.
    * The backward pass can compute the numbers of a block anew.

    Computes in float32, or in float64 if `z_EI` is.
    """
    with torch.autocast(z_EI.device.type, enabled=False):
        if z_EI.dtype.itemsize < 4:
            z_EI = z_EI.float()
        # A compiler fuses the plain formula by itself, and an accelerator has the memory bandwidth for it.
        if z_EI.device.type != "cpu" or torch.compiler.is_compiling():
            gated_EA: Tensor = dice(nn.functional.linear(z_EI, weight_AI, bias_A))
            return gated_EA @ score_A
        with torch.no_grad():
            norm = _Norm.of(z_EI, weight_AI, bias_A, dice)
        direct_A = score_A * dice.alpha_A
        scores: Tensor = _DiceScores.apply(  # type: ignore[no-untyped-call]
            z_EI, weight_AI, bias_A, direct_A, score_A - direct_A, norm
        )
        return scores


def _blocks(count: int) -> Iterator[slice]:
    return (slice(begin, min(begin + BLOCK_ROWS, count)) for begin in range(0, count, BLOCK_ROWS))


def _moments(z_EI: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance."""
    count, width = z_EI.shape
    # Of differences from a point among the rows: no cancellation where these are all far from 0.
    origin_I = z_EI[:BLOCK_ROWS].mean(0)
    mean_I, square_II = z_EI.new_zeros(width), z_EI.new_zeros(width, width)
    ones = z_EI.new_ones(BLOCK_ROWS)
    for rows in _blocks(count):
        difference = z_EI[rows] - origin_I
        mean_I.addmv_(difference.t(), ones[: difference.shape[0]], alpha=1 / count)  # faster than a sum over rows
        square_II.addmm_(difference.t(), difference, alpha=1 / count)
    return origin_I + mean_I, square_II.addr_(mean_I, mean_I, alpha=-1)


@dataclass(frozen=True)
class _Norm:
    """y = (x - mean) ⊙ scale; `learnt` holds the moments of z if mean and scale are of this batch."""

    mean_A: Tensor
    scale_A: Tensor
    learnt: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, z_EI: Tensor, weight_AI: Tensor, bias_A: Tensor, dice: Dice) -> _Norm:
        count = z_EI.shape[0]
        if not dice.learns(count):
            return cls(dice.mean_A.clone(), (dice.variance_A + dice.epsilon).rsqrt(), None)
        mean_I, covariance_II = _moments(z_EI)
        mean_A = weight_AI @ mean_I + bias_A
        variance_A = ((weight_AI @ covariance_II) * weight_AI).sum(1).clamp_min_(0)
        dice.learn(mean_A, variance_A, count)
        return cls(mean_A, (variance_A + dice.epsilon).rsqrt(), (mean_I, covariance_II))

    def product(self, weight_AI: Tensor, bias_A: Tensor) -> tuple[Tensor, Tensor]:
        """Matrix (I, A) and vector (A,) that give y from z."""
        return (weight_AI * self.scale_A[:, None]).t().contiguous(), (bias_A - self.mean_A) * self.scale_A


class _DiceScores(torch.autograd.Function):
    """s = x · d + (p ⊙ x) · u with x = z Wᵀ + b, y = c ⊙ (x - mean), p = σ(y).

    For dice(x) · w: d = w ⊙ α, u = w ⊙ (1 - α). The gradient of x, with g = ∂/∂s and t = c ⊙ x ⊙ p ⊙ (1-p), is

        g (d + u ⊙ (p + t)) - u/E ⊙ (Σ g t + y ⊙ Σ g t ⊙ y),

    the last two terms (batch normalisation's) only if mean and c are of this batch. Those are affine in z, so their
    part of the gradients of W and b follows from the moments of z, and that of the gradient of z is one more product.
    """

    @staticmethod
    def forward(
        ctx: Any, z_EI: Tensor, weight_AI: Tensor, bias_A: Tensor, direct_A: Tensor, gated_A: Tensor, norm: _Norm
    ) -> Tensor:
        ctx.save_for_backward(z_EI, weight_AI, bias_A, direct_A, gated_A)
        ctx.norm = norm
        product_IA, shift_A = norm.product(weight_AI, bias_A)
        direct_I, direct = direct_A @ weight_AI, direct_A @ bias_A
        of_gate_A, of_gated_A = gated_A * norm.mean_A, gated_A / norm.scale_A  # p ⊙ x = p ⊙ mean + p ⊙ y / c
        scores_E = z_EI.new_empty(z_EI.shape[0])
        store = z_EI.new_empty(2, BLOCK_ROWS, shift_A.numel())
        for rows in _blocks(z_EI.shape[0]):
            z = z_EI[rows]
            y, p = store[:, : z.shape[0]].unbind()
            torch.mm(z, product_IA, out=y).add_(shift_A)
            torch.sigmoid(y, out=p)
            s = torch.mv(z, direct_I, out=scores_E[rows]).add_(direct)
            s.addmv_(p, of_gate_A).addmv_(y.mul_(p), of_gated_A)
        return scores_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_E: Tensor) -> tuple[Tensor | None, ...]:
        z_EI, weight_AI, bias_A, direct_A, gated_A = ctx.saved_tensors
        count, norm = grad_E.numel(), ctx.norm
        product_IA, shift_A = norm.product(weight_AI, bias_A)
        offset_A = norm.mean_A * norm.scale_A  # c ⊙ x = y + offset
        grad_E = grad_E.contiguous()
        grad_z_EI = torch.empty_like(z_EI)
        grad_weight_AI, sum_z_I = torch.zeros_like(weight_AI), torch.zeros_like(weight_AI[0])
        # Σ ∂x, Σ g p, Σ g p ⊙ y, Σ g t, Σ g t ⊙ y
        grad_bias_A, sum_p_A, sum_py_A, sum_t_A, sum_ty_A = weight_AI.new_zeros(5, bias_A.numel()).unbind()
        ones = weight_AI.new_ones(BLOCK_ROWS)
        store = weight_AI.new_empty(3, BLOCK_ROWS, shift_A.numel())
        for rows in _blocks(count):
            z, g = z_EI[rows], grad_E[rows]
            y, p, other = store[:, : z.shape[0]].unbind()
            torch.mm(z, product_IA, out=y).add_(shift_A)
            torch.sigmoid(y, out=p)
            sum_p_A.addmv_(p.t(), g)
            sum_py_A.addmv_(torch.mul(p, y, out=other).t(), g)
            torch.add(y, offset_A, out=other)
            t = torch.ops.aten.sigmoid_backward.grad_input(other, p, grad_input=other)
            sum_t_A.addmv_(t.t(), g)
            sum_ty_A.addmv_(y.mul_(t).t(), g)
            grad_x = torch.addcmul(direct_A, p.add_(t), gated_A, out=y).mul_(g[:, None])
            grad_bias_A.addmv_(grad_x.t(), ones[: g.numel()])
            sum_z_I.addmv_(z.t(), g)
            grad_weight_AI.addmm_(grad_x.t(), z)
            torch.mm(grad_x, weight_AI, out=grad_z_EI[rows])
        if norm.learnt is not None:
            mean_I, covariance_II = norm.learnt
            # ∂x -= u/E ⊙ (Σ g t + y ⊙ Σ g t ⊙ y) with y = c ⊙ W (z - mean_I)
            constant_A, per_x_A = -gated_A * sum_t_A / count, -gated_A * sum_ty_A * norm.scale_A / count
            grad_bias_A += count * constant_A
            grad_weight_AI += count * torch.outer(constant_A, mean_I)
            grad_weight_AI += count * per_x_A[:, None] * (weight_AI @ covariance_II)
            per_z_II = weight_AI.t() @ (per_x_A[:, None] * weight_AI)
            constant_I = constant_A @ weight_AI - mean_I @ per_z_II
            for rows in _blocks(count):
                grad_z_EI[rows].addmm_(z_EI[rows], per_z_II).add_(constant_I)
        grad_direct_A = weight_AI @ sum_z_I + bias_A * grad_E.sum()
        grad_gated_A = sum_py_A / norm.scale_A + norm.mean_A * sum_p_A
        return grad_z_EI, grad_weight_AI, grad_bias_A, grad_direct_A, grad_gated_A, None
