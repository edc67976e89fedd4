"""Rows of equal width in one buffer: lookup, and update of the looked-up rows inside the backward pass."""

# Shapes: R rows of the buffer, D width, N looked-up ids, U distinct ids among them.

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.bfloat16 import join_fp32, split_fp32, stochastic_round, to_bf16
from fullrank.embeddings.optimizer import EmbeddingOptimizer, Kind
from fullrank.extras import install

if TYPE_CHECKING:
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen

Backend = Literal["torch", "fbgemm"]
FBGEMM_KINDS: tuple[Kind, ...] = ("sgd", "adagrad", "row_wise_adagrad")
# Learning rate of a collection that nobody trains.
DEFAULT_RATE = 1e-3
# Rows that are taken to float32 at a time where all are.
BLOCK_ROWS = 1 << 16
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

    Attributes:
        weight_RD: in the optimiser's storage: float32, bfloat16, or the upper plane of `split`.
        low_RD: the lower plane of `split`, int16.
        fresh: rows that have started anew, in kind `dense`; `EmbeddingCollection.forget_fresh` empties it.
    """

    low_RD: Tensor | None

    def __init__(self, weight_RD: Tensor, backend: Backend) -> None:
        super().__init__()
        self.weight_RD = nn.Parameter(weight_RD)
        self.register_buffer("low_RD", None, persistent=False)
        self.backend: Backend = backend
        self.optimizer = EmbeddingOptimizer()
        self.learning_rate = DEFAULT_RATE
        self.step = 0
        self.states: dict[str, Tensor] = {}
        # Lazy decay: log of the decay since the start, now and when each row was last brought up to date.
        self.log_decay = 0.0
        self.row_log_decay_R: Tensor | None = None
        self._owes_decay = False
        self.fresh: list[Tensor] = []
        # In a list so that the kernel, itself a module, is not registered: its tensors are ours.
        self._fbgemm: list[SplitTableBatchedEmbeddingBagsCodegen] = []

    @property
    def stored(self) -> Tensor:
        """The rows as they lie in memory."""
        return self.weight_RD.detach()

    def state(self, rows: slice) -> Tensor:
        """What the state has of some rows: float32."""
        return self.read(rows)

    def rows(self, ids_N: Tensor) -> Tensor:
        """Vectors (N, D) of row ids, without an update; with kind `dense` they have a gradient."""
        return self.weight_RD.index_select(0, ids_N) if self.optimizer.kind == "dense" else self.read(ids_N)

    def numbers(self) -> int:
        """How many numbers are stored."""
        return self.weight_RD.numel()

    def misfit(self, stored_RD: Tensor) -> str | None:
        """What is wrong with rows that are to be loaded: None if nothing is."""
        is_packed = not stored_RD.is_floating_point()
        return f"has {stored_RD.dtype}, expected {self.dtype}" if is_packed else None

    def set_optimizer(self, optimizer: EmbeddingOptimizer) -> None:
        """Start anew with another rule; weights stay.

        Raises:
            ValueError: if backend `fbgemm` cannot do it.
        """
        self.flush()
        if optimizer.storage != self.optimizer.storage:
            self._store(optimizer)
        self.optimizer = optimizer
        self.learning_rate = optimizer.learning_rate or DEFAULT_RATE
        self.step = 0
        rows, width = self.weight_RD.shape
        # Not in bfloat16, whose sum of squares would stop growing at 256 times what is added.
        self.states = {
            name: self.weight_RD.new_zeros((rows,) if size == "row" else (rows, width), dtype=self.dtype)
            for name, size in STATES[optimizer.kind].items()
        }
        self.log_decay, self._owes_decay = 0.0, False
        lazy = optimizer.l2 > 0 and optimizer.l2_mode == "lazy"
        self.row_log_decay_R = self.weight_RD.new_zeros(rows, dtype=torch.float64) if lazy else None
        fused = optimizer.kind != "dense" and self.backend == "fbgemm"
        self._fbgemm = [_fbgemm_kernel(self.weight_RD, self.states, optimizer)] if fused else []

    @property
    def dtype(self) -> torch.dtype:
        """Of vectors and of the optimiser's state, whatever the storage."""
        return torch.promote_types(self.weight_RD.dtype, torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, without the optimiser's state."""
        return self.weight_RD.nbytes + (0 if self.low_RD is None else self.low_RD.nbytes)

    @torch.no_grad()
    def _store(self, optimizer: EmbeddingOptimizer) -> None:
        """Change from one storage to another; to bfloat16 by rounding to nearest."""
        weight_RD, self.low_RD = self.read(slice(None)), None
        if optimizer.storage == "split":
            self.weight_RD.data, self.low_RD = split_fp32(weight_RD, "nearest")
        else:
            self.weight_RD.data = weight_RD if optimizer.storage == "float32" else to_bf16(weight_RD)

    def read(self, rows: slice | Tensor) -> Tensor:
        """Some rows as they are meant to be, in float32: a view of the weights if these are, and named by a slice."""
        high, low = _chosen(self.weight_RD.detach(), rows), self.low_RD
        if low is not None:
            return join_fp32(high, _chosen(low, rows), "nearest")
        return high.to(self.dtype)

    def looked_up(self, ids_N: Tensor) -> Tensor:
        """Vectors (N, D) that a training step sees: the upper plane alone in storage `split`."""
        return self.weight_RD.detach().index_select(0, ids_N).to(self.dtype)

    @torch.no_grad()
    def load(self, rows: slice, value: Tensor) -> None:
        """Put weights in the place of some rows; in bfloat16 they are rounded to nearest."""
        target = self.weight_RD.data[rows]
        if self.low_RD is not None:
            high, low = split_fp32(value.to(target.device, torch.float32), "nearest")
            target.copy_(high)
            self.low_RD[rows].copy_(low)
        else:
            target.copy_(value)

    @torch.no_grad()
    def start_anew(self, rows: Tensor, like: int) -> None:
        """Make distinct rows equal to another one, without what the optimiser knew of them."""
        source = torch.tensor([like], device=rows.device)
        if self._owes_decay:
            self._catch_up(source)
        self._write(rows, self.read(source).expand(rows.numel(), -1))
        for state in self.states.values():
            state.index_fill_(0, rows, 0)
        if self.row_log_decay_R is not None:
            self.row_log_decay_R.index_fill_(0, rows, self.log_decay)
        if self.optimizer.kind == "dense":
            self.fresh.append(rows)

    def _write(self, ids_U: Tensor, rows_UD: Tensor) -> None:
        """Put float32 rows back into the storage."""
        match self.optimizer.storage:
            case "bfloat16":
                rows_UD = to_bf16(rows_UD)
            case "bfloat16_stochastic":
                rows_UD = stochastic_round(rows_UD)
            case "split":
                assert self.low_RD is not None
                rows_UD, low_UD = split_fp32(rows_UD, "nearest")
                self.low_RD.index_copy_(0, ids_U, low_UD)
        self.weight_RD.index_copy_(0, ids_U, rows_UD)

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
            return self.read(ids_N)
        if self._fbgemm:
            # Every id is a bag of its own: measured 50 times faster on CPU than FBGEMM's unpooled mode.
            offsets = torch.arange(ids_N.numel() + 1, device=ids_N.device)
            vectors: Tensor = self._fbgemm[0](ids_N, offsets)
            return vectors
        # The hook tensor makes autograd call backward though the weights themselves need no gradient.
        hook = ids_N.new_zeros((), dtype=self.dtype).requires_grad_()
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
            if self.optimizer.storage == "float32":
                self.weight_RD.mul_((self.log_decay - self.row_log_decay_R).exp().to(self.dtype)[:, None])
            else:
                for ids_U in torch.split(torch.arange(len(self.weight_RD), device=self.weight_RD.device), BLOCK_ROWS):
                    self._decay(ids_U)
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
        self._decay(ids_U)
        self.row_log_decay_R[ids_U] = self.log_decay

    def _decay(self, ids_U: Tensor) -> None:
        assert self.row_log_decay_R is not None
        rows_UD = self.read(ids_U)
        due_U = (self.log_decay - self.row_log_decay_R.index_select(0, ids_U)).exp().to(rows_UD.dtype)
        self._write(ids_U, rows_UD.mul_(due_U[:, None]))

    @torch.no_grad()
    def update(self, ids_N: Tensor, gradient_ND: Tensor) -> None:
        """Apply the rule once to each distinct row, with its gradient summed over all its occurrences."""
        sorted_N, order_N = torch.sort(ids_N, stable=True)
        ids_U, place_N = torch.unique_consecutive(sorted_N, return_inverse=True)
        gradient_UD = gradient_ND.new_zeros((ids_U.numel(), gradient_ND.shape[1]))
        gradient_UD.index_add_(0, place_N, gradient_ND.index_select(0, order_N))
        rate, eps = self.learning_rate, self.optimizer.eps
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
        rows_UD = self.read(ids_U)
        if self.row_log_decay_R is not None:  # this step's decay, on the weights that the gradient was taken at
            decay = self._step_decay()
            rows_UD.mul_(math.exp(decay))
            self.row_log_decay_R[ids_U] = self.log_decay + decay
        self._write(ids_U, rows_UD.add_(change_UD))


def _chosen(values: Tensor, rows: slice | Tensor) -> Tensor:
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


class _FusedLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hook: Tensor, ids_N: Tensor, buffer: RowBuffer) -> Tensor:
        ctx.buffer = buffer
        ctx.save_for_backward(ids_N)
        return buffer.looked_up(ids_N)

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
    elif optimizer.storage != "float32":
        obstacle = f'FBGEMM trains no bfloat16 weights on CPU, which storage "{optimizer.storage}" needs'
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
