from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fullrank.layers import dice as module
from fullrank.layers.dice import Dice, dice_scores


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)  # several blocks, the last one cut short


def case(rows: int, dtype: torch.dtype, *, far: float = 0.0) -> tuple[list[Tensor], Dice]:
    """z, W, b and the score's weights, and a Dice with alpha and running moments of some training."""
    torch.manual_seed(0)
    sizes = ((rows, 5), (7, 5), (7,), (7,))
    inputs = [torch.randn(size, dtype=dtype) for size in sizes]
    inputs[0] += far
    dice = Dice(7).to(dtype)
    nn.init.normal_(dice.alpha_A)
    nn.init.normal_(dice.mean_A)
    nn.init.uniform_(dice.variance_A, 0.5, 2.0)
    return [x.requires_grad_() for x in inputs], dice


def textbook(z: Tensor, weight: Tensor, bias: Tensor, dice: Dice, score: Tensor) -> Tensor:
    """p x + (1-p) α x with PyTorch's batch normalisation, times the score's weights."""
    norm = nn.BatchNorm1d(7, eps=dice.epsilon, momentum=dice.momentum, affine=False).to(z.dtype)
    norm.running_mean, norm.running_var = dice.mean_A, dice.variance_A
    x = z @ weight.T + bias
    p = torch.sigmoid(norm.train(dice.training and len(z) > 1)(x))
    return (p * x + (1 - p) * dice.alpha_A * x) @ score


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 16, 50])
def test_scores_gradients_and_running_moments_are_those_of_the_plain_formula(rows: int, training: bool) -> None:
    inputs, dice = case(rows, torch.float64)
    dice.train(training)
    reference = copy.deepcopy(dice)
    z, weight, bias, score = inputs
    gradient = torch.randn(rows, dtype=torch.float64)
    results = []
    for function, layer in ((dice_scores, dice), (textbook, reference)):
        scores = function(z, weight, bias, layer, score)
        gradients = torch.autograd.grad(scores, [*inputs, layer.alpha_A], gradient)
        results.append([scores.detach(), *gradients, layer.mean_A, layer.variance_A])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_gradients_equal_finite_differences() -> None:
    inputs, dice = case(20, torch.float64)
    dice.train()
    assert torch.autograd.gradcheck(lambda z, w, b, s: dice_scores(z, w, b, dice, s), inputs, atol=1e-7)


def test_the_layer_alone_is_the_plain_formula() -> None:
    (z, weight, bias, score), dice = case(50, torch.float64)
    reference = copy.deepcopy(dice)
    ours = dice(z @ weight.T + bias) @ score
    torch.testing.assert_close(ours, textbook(z, weight, bias, reference, score))
    torch.testing.assert_close(dice.variance_A, reference.variance_A)


def test_no_rows_give_no_scores_and_zero_gradients() -> None:
    inputs, dice = case(0, torch.float32)
    before = dice.mean_A.clone()
    z, weight, bias, score = inputs
    scores = dice_scores(z, weight, bias, dice.train(), score)
    assert scores.shape == (0,)
    assert all(not gradient.any() for gradient in torch.autograd.grad(scores.sum(), inputs))
    assert torch.equal(dice.mean_A, before)


def test_moments_do_not_cancel_where_inputs_are_far_from_zero() -> None:
    # float32 has 7 digits: a variance from sums of plain squares, here 1e6 times larger, would keep one of them
    (z, weight, bias, score), dice = case(5000, torch.float32, far=1000.0)
    dice.momentum = 1.0
    dice_scores(z, weight, bias, dice.train(), score)
    expected = (z.double() @ weight.double().T).var(0)
    torch.testing.assert_close(dice.variance_A.double(), expected, rtol=1e-3, atol=0)


def test_half_precision_inputs_and_autocast_still_score_in_float32() -> None:
    (z, weight, bias, score), dice = case(50, torch.float32)
    dice.eval()
    exact = dice_scores(z, weight, bias, dice, score)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dice_scores(z, weight, bias, dice, score), exact)
    rounded = z.detach().bfloat16().requires_grad_()
    scores = dice_scores(rounded, weight, bias, dice, score)
    assert torch.equal(scores, dice_scores(rounded.float(), weight, bias, dice, score))
    (gradient,) = torch.autograd.grad(scores.sum(), rounded)
    assert gradient.dtype == torch.bfloat16


def test_a_compiled_model_scores_alike() -> None:
    inputs, dice = case(40, torch.float64)
    dice.train()
    reference = copy.deepcopy(dice)
    z, weight, bias, score = inputs
    compiled = torch.compile(dice_scores, backend="aot_eager", fullgraph=True)
    results = []
    for function, layer in ((dice_scores, reference), (compiled, dice)):
        scores = function(z, weight, bias, layer, score)
        results.append([scores.detach(), *torch.autograd.grad(scores.sum(), [*inputs, layer.alpha_A])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(dice.mean_A, reference.mean_A)
