"""Rows of equal width in one buffer: lookup, and update of the looked-up rows inside the backward pass."""

# Shapes: R rows of the buffer, D width, N looked-up ids, U distinct ids among them.

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.embeddings.optimizer import EmbeddingOptimizer, Kind
from fullrank.extras import install

if TYPE_CHECKING:
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen

Backend = Literal["torch", "fbgemm"]
FBGEMM_KINDS: tuple[Kind, ...] = ("sgd", "adagrad", "row_wise_adagrad")
# Learning rate of a collection that nobody trains.
DEFAULT_RATE = 1e-3
# Optimiser state of each kind: name -> one number per row, or per weight.
STATES: dict[Kind, dict[str, Literal["row", "weight"]]] = {
    "dense": {},
    "sgd": {},
    "adagrad": {"sum": "weight"},
    "row_wise_adagrad": {"sum": "row"},
    "adam": {"exp_avg": "weight", "exp_avg_sq": "weight"},
}


class RowBuffer(nn.Module):
    """R rows of width D with the optimiser state that belongs to them.

    `weight_RD` is a parameter in every kind; in the fused kinds it never receives a gradient, so no dense optimiser
    moves it. Its `requires_grad` says in every kind whether rows learn: without it they stand still, decay included.
    """

    def __init__(self, weight_RD: Tensor, backend: Backend) -> None:
        super().__init__()
        self.weight_RD = nn.Parameter(weight_RD)
        self.backend: Backend = backend
        self.optimizer = EmbeddingOptimizer()
        self.learning_rate = DEFAULT_RATE
        self.step = 0
        self.states: dict[str, Tensor] = {}
        # Lazy decay: log of the decay since the start, now and when each row was last brought up to date.
        self.log_decay = 0.0
        self.row_log_decay_R: Tensor | None = None
        self._owes_decay = False
        # In a list so that the kernel, itself a module, is not registered: its tensors are ours.
        self._fbgemm: list[SplitTableBatchedEmbeddingBagsCodegen] = []

    @property
    def stored(self) -> Tensor:
        """What the state has of each row."""
        return self.weight_RD.detach()

    def rows(self, ids_N: Tensor) -> Tensor:
        """Vectors (N, D) of row ids, without an update; with kind `dense` they have a gradient."""
        weight_RD = self.weight_RD if self.optimizer.kind == "dense" else self.weight_RD.detach()
        return weight_RD.index_select(0, ids_N)

    def numbers(self) -> int:
        """How many numbers are stored."""
        return self.weight_RD.numel()

    def misfit(self, stored_RD: Tensor) -> str | None:
        """What is wrong with rows that are to be loaded: None if nothing is."""
        is_packed = not stored_RD.is_floating_point()
        return f"has {stored_RD.dtype}, expected {self.weight_RD.dtype}" if is_packed else None

    def set_optimizer(self, optimizer: EmbeddingOptimizer) -> None:
        """Start anew with another rule; weights stay.

        Raises:
            ValueError: if backend `fbgemm` cannot do it.
        """
        self.flush()
        self.optimizer = optimizer
        self.learning_rate = optimizer.learning_rate or DEFAULT_RATE
        self.step = 0
        rows, width = self.weight_RD.shape
        self.states = {
            name: self.weight_RD.new_zeros((rows,) if size == "row" else (rows, width))
            for name, size in STATES[optimizer.kind].items()
        }
        self.log_decay, self._owes_decay = 0.0, False
        lazy = optimizer.l2 > 0 and optimizer.l2_mode == "lazy"
        self.row_log_decay_R = self.weight_RD.new_zeros(rows, dtype=torch.float64) if lazy else None
        fused = optimizer.kind != "dense" and self.backend == "fbgemm"
        self._fbgemm = [_fbgemm_kernel(self.weight_RD, self.states, optimizer)] if fused else []

    def set_learning_rate(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        for kernel in self._fbgemm:
            kernel.set_learning_rate(learning_rate)

    def forward(self, ids_N: Tensor) -> Tensor:
        """Vectors (N, D) of row ids; when training in a fused kind, its backward pass updates the rows."""
        if self.optimizer.kind == "dense":
            # The same numbers; on a CPU the gradient of a selection is four times cheaper than that of an embedding.
            on_cpu = self.weight_RD.device.type == "cpu"
            return self.weight_RD.index_select(0, ids_N) if on_cpu else F.embedding(ids_N, self.weight_RD)
        if self._owes_decay:
            self._catch_up(ids_N)
        if not (self.training and self.weight_RD.requires_grad and torch.is_grad_enabled()):
            return self.weight_RD.detach().index_select(0, ids_N)
        if self._fbgemm:
            # Every id is a bag of its own: measured 50 times faster on CPU than FBGEMM's unpooled mode.
            offsets = torch.arange(ids_N.numel() + 1, device=ids_N.device)
            vectors: Tensor = self._fbgemm[0](ids_N, offsets)
            return vectors
        # The hook tensor makes autograd call backward though the weights themselves need no gradient.
        hook = ids_N.new_zeros((), dtype=self.weight_RD.dtype).requires_grad_()
        result: Tensor = _FusedLookup.apply(hook, ids_N, self)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the exact L2 penalty's gradient; called between the backward pass and the dense optimiser's step."""
        if self.optimizer.l2 > 0 and self.optimizer.kind == "dense" and self.weight_RD.grad is not None:
            self.weight_RD.grad.add_(self.weight_RD, alpha=self.optimizer.l2)

    @torch.no_grad()
    def after_step(self) -> None:
        """Count the decay of one step; called once per training step."""
        if self.row_log_decay_R is not None and self.weight_RD.requires_grad:
            self.log_decay += self._step_decay()
            self._owes_decay = True

    def _step_decay(self) -> float:
        return math.log1p(-self.learning_rate * self.optimizer.l2)

    @torch.no_grad()
    def flush(self) -> None:
        """Apply all decay that is still due, so that the weights are what the optimiser means them to be."""
        if self.row_log_decay_R is not None and self._owes_decay:
            self.weight_RD.mul_((self.log_decay - self.row_log_decay_R).exp().to(self.weight_RD.dtype)[:, None])
            self.decay_is_applied()

    def decay_is_applied(self) -> None:
        """Take note that all decay so far is in the weights."""
        if self.row_log_decay_R is not None:
            self.row_log_decay_R.fill_(self.log_decay)
        self._owes_decay = False

    @torch.no_grad()
    def _catch_up(self, ids_N: Tensor) -> None:
        assert self.row_log_decay_R is not None
        ids_U = torch.unique(ids_N)
        due_U = (self.log_decay - self.row_log_decay_R.index_select(0, ids_U)).exp().to(self.weight_RD.dtype)
        self.weight_RD.index_copy_(0, ids_U, self.weight_RD.index_select(0, ids_U) * due_U[:, None])
        self.row_log_decay_R[ids_U] = self.log_decay

    @torch.no_grad()
    def update(self, ids_N: Tensor, gradient_ND: Tensor) -> None:
        """Apply the rule once to each distinct row, with its gradient summed over all its occurrences."""
        sorted_N, order_N = torch.sort(ids_N, stable=True)
        ids_U, place_N = torch.unique_consecutive(sorted_N, return_inverse=True)
        gradient_UD = gradient_ND.new_zeros((ids_U.numel(), gradient_ND.shape[1]))
        gradient_UD.index_add_(0, place_N, gradient_ND.index_select(0, order_N))
        weight_RD, rate, eps = self.weight_RD, self.learning_rate, self.optimizer.eps
        self.step += 1
        match self.optimizer.kind:
            case "sgd":
                change_UD = gradient_UD.mul_(-rate)
            case "adagrad":
                sum_UD = self.states["sum"].index_select(0, ids_U).addcmul_(gradient_UD, gradient_UD)
                self.states["sum"].index_copy_(0, ids_U, sum_UD)
                change_UD = gradient_UD.mul_(-rate).div_(sum_UD.sqrt_().add_(eps))
            case "row_wise_adagrad":
                sum_U = self.states["sum"].index_select(0, ids_U).add_(gradient_UD.square().mean(1))
                self.states["sum"].index_copy_(0, ids_U, sum_U)
                change_UD = gradient_UD.mul_((-rate / (sum_U.sqrt_().add_(eps)))[:, None])
            case "adam":
                beta1, beta2 = self.optimizer.betas
                mean_UD = self.states["exp_avg"].index_select(0, ids_U).lerp_(gradient_UD, 1 - beta1)
                square_UD = self.states["exp_avg_sq"].index_select(0, ids_U).mul_(beta2)
                square_UD.addcmul_(gradient_UD, gradient_UD, value=1 - beta2)
                self.states["exp_avg"].index_copy_(0, ids_U, mean_UD)
                self.states["exp_avg_sq"].index_copy_(0, ids_U, square_UD)
                size = rate * (1 - beta2**self.step) ** 0.5 / (1 - beta1**self.step)
                change_UD = mean_UD.mul_(-size).div_(square_UD.sqrt_().add_(eps))
            case "dense":
                raise AssertionError("kind dense is updated by the model's optimiser")
        rows_UD = weight_RD.index_select(0, ids_U)
        if self.row_log_decay_R is not None:  # this step's decay, on the weights that the gradient was taken at
            decay = self._step_decay()
            rows_UD.mul_(math.exp(decay))
            self.row_log_decay_R[ids_U] = self.log_decay + decay
        weight_RD.index_copy_(0, ids_U, rows_UD.add_(change_UD))


class _FusedLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hook: Tensor, ids_N: Tensor, buffer: RowBuffer) -> Tensor:
        ctx.buffer = buffer
        ctx.save_for_backward(ids_N)
        return buffer.weight_RD.detach().index_select(0, ids_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (ids_N,) = ctx.saved_tensors
        ctx.buffer.update(ids_N, gradients[0])
        return None, None, None


def _fbgemm_kernel(
    weight_RD: Tensor, states: dict[str, Tensor], optimizer: EmbeddingOptimizer
) -> SplitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's fused CPU kernel over our own buffers."""
    rows, width = weight_RD.shape
    obstacle = None
    if optimizer.kind not in FBGEMM_KINDS:
        obstacle = f'FBGEMM has no CPU kernel for optimiser "{optimizer.kind}"'
    elif width % 4 != 0:
        obstacle = f"FBGEMM needs an embedding width that is a multiple of 4, got {width}"
    elif optimizer.l2 > 0:
        obstacle = "FBGEMM has no lazy L2"
    elif weight_RD.device.type != "cpu":
        obstacle = "the fused backend runs on CPU tensors only"
    if obstacle is None:
        try:
            from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
            from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
                ComputeDevice,
                SplitTableBatchedEmbeddingBagsCodegen,
            )
        except (ImportError, OSError) as error:  # a CUDA build of FBGEMM on a CPU machine raises OSError
            obstacle = f"fbgemm_gpu cannot be imported ({error}); {install('fbgemm')}"
    if obstacle is not None:
        raise ValueError(f'backend "fbgemm": {obstacle}')
    logging.getLogger("fbgemm_gpu").setLevel(logging.ERROR)
    kinds = {
        "sgd": EmbOptimType.EXACT_SGD,
        "adagrad": EmbOptimType.EXACT_ADAGRAD,
        "row_wise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    }
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # its constructor logs a page of settings
    try:
        kernel = SplitTableBatchedEmbeddingBagsCodegen(
            embedding_specs=[(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=kinds[optimizer.kind],
            learning_rate=optimizer.learning_rate or DEFAULT_RATE,
            eps=optimizer.eps,
            pooling_mode=PoolingMode.SUM,
            output_dtype=SparseType.FP32,
            device=torch.device("cpu"),
        )
    finally:
        root.setLevel(level)
    kernel.weights_host.data = weight_RD.data.view(-1)
    if "sum" in states:
        kernel.momentum1_host.data = states["sum"].view(-1)
    return kernel
