"""Which rule updates the rows of embedding tables."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["dense", "sgd", "adagrad", "row_wise_adagrad", "adam"]
Storage = Literal["float32", "bfloat16", "bfloat16_stochastic", "split"]


class EmbeddingOptimizer(BaseModel):
    """How tables learn.

    `dense` leaves them ordinary parameters of the model's own optimiser, whose step touches every row: right for small
    tables, and what published leaderboards do. The other kinds update inside the backward pass the rows that the batch
    looked up and no other, so that a step costs the same at any number of rows.

    With g the gradient of a row summed over the whole batch, w its weights, t the step, η the learning rate:

    * sgd: w -= η g
    * adagrad: v += g²; w -= η g / (√v + eps)
    * row_wise_adagrad: v += mean(g²), one number per row; w -= η g / (√v + eps)
    * adam: moments of the touched rows only, corrected for their bias by the global t (PyTorch's SparseAdam)

    Attributes:
        kind: the rule.
        learning_rate: of the tables, in every kind; default that of the rest of the model.
        eps: keeps the divisor of adagrad and adam above 0.
        betas: decay of adam's two moments.
        l2: coefficient λ of the penalty λ/2 ‖E‖² on whole tables.
        l2_mode: `exact` adds λE to the gradient of every row at every step (kind `dense` only). `lazy` multiplies a
            row, when it is next looked up, by the decay (1 - ηλ) of all steps since it was last; for sgd that equals
            the exact penalty, for the others it is decoupled weight decay.
        storage: of the weights while they learn, in the fused kinds; updates are computed in float32, and the rule's
            state is float32, in each. `bfloat16` has half the bytes and rounds what an update gives to nearest, so that
            a change of less than 1/512 of a weight is lost. `bfloat16_stochastic` has half the bytes too and rounds up
            or down at random: small changes happen now and then, with the right mean. Its draws are PyTorch's global
            ones, which the trainer seeds and a checkpoint holds. `split` has the bytes of float32 in two planes:
            training looks up the upper one, which is bfloat16, and both together are the float32 weights that updates
            move and that evaluation reads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = "dense"
    learning_rate: float | None = Field(default=None, gt=0)
    eps: float = Field(default=1e-8, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    l2: float = Field(default=0.0, ge=0)
    l2_mode: Literal["exact", "lazy"] = "exact"
    storage: Storage = "float32"

    @model_validator(mode="after")
    def _l2_is_possible(self) -> Self:
        if self.l2 > 0 and (self.kind == "dense") != (self.l2_mode == "exact"):
            raise ValueError(
                f'l2_mode "{self.l2_mode}" does not go with kind "{self.kind}": an exact penalty touches every row and '
                'needs kind "dense"; the other kinds offer "lazy"'
            )
        return self

    @model_validator(mode="after")
    def _storage_is_possible(self) -> Self:
        if self.storage != "float32" and self.kind == "dense":
            raise ValueError(
                f'storage "{self.storage}" does not go with kind "dense", whose tables are ordinary parameters of the '
                "model's own optimiser: choose a kind that updates rows itself, such as row_wise_adagrad"
            )
        return self
