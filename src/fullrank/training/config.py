"""How a ranker is fitted."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fullrank.bfloat16 import Rounding


class TrainerConfig(BaseModel):
    """How to fit.

    Attributes:
        epochs: passes over the training rows.
        max_steps: end after so many steps even in the middle of an epoch.
        max_seconds: end after so many seconds of wall time, validations included, even in the middle of an epoch. Such
            a run is not the same twice.
        batch_size: of the loaders that `fullrank train` makes.
        shuffle: draw rows in a new order in each epoch; else they come in the order of the dataset, which is that of
            time where the log has times.
        optimizer: of everything but tables of a fused kind.
        learning_rate: at the start.
        schedule: `constant`; `linear` falls from the learning rate to zero over the whole run; `plateau` multiplies it
            by `plateau_factor` whenever the monitored metric did not improve on the validation set.
        plateau_factor: see `schedule`.
        patience: stop after so many validations without improvement; 0 never stops early.
        monitor: metric of the first label on the validation set, by default `auc`, or `mse` of a regression; `auc`,
            `gauc` and their sum are to rise, the others to fall.
        validate_every: steps between validations; 0 validates at the end of each epoch.
        gradient_clip: largest L2 norm of the gradient of all parameters of the dense optimiser (kind `dense` tables
            included). It matters with batch norm on small initial embeddings: the first gradients are hundreds of times
            larger than later ones and would fill Adam's second moment for the rest of the epoch.
        precision: `bfloat16` computes matrix products of the training steps in bfloat16 (weights, optimiser state,
            logits, loss and all evaluation stay float32); `auto` does where this machine is faster so.
            `bfloat16_emulated` has the numbers of bfloat16 on any machine, slower.
        rounding: of `bfloat16_emulated`: `rne` to nearest, as the hardware does; `trunc` towards zero; `sr` at random.
        compile: run the model through `torch.compile`.
        seed: of dropout, and of the loaders and initial weights that `fullrank train` makes.
        checkpoint_every: steps between checkpoints, beside the one at each validation or end of an epoch; 0 for these
            alone.
        keep_checkpoints: how many of the newest to keep, beside the best one; 0 writes none.
        tensorboard: write events to `<run directory>/tensorboard`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    max_seconds: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=4096, ge=1)
    shuffle: bool = True
    optimizer: Literal["adam", "adagrad", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "linear", "plateau"] = "constant"
    plateau_factor: float = Field(default=0.1, gt=0, lt=1)
    patience: int = Field(default=2, ge=0)
    monitor: Literal["auc", "gauc", "auc+gauc", "logloss", "ne", "mse"] | None = None
    validate_every: int = Field(default=0, ge=0)
    gradient_clip: float | None = Field(default=10.0, gt=0)
    precision: Literal["float32", "bfloat16", "bfloat16_emulated", "auto"] = "float32"
    rounding: Rounding = "rne"
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = Field(default=0, ge=0)
    keep_checkpoints: int = Field(default=2, ge=0)
    tensorboard: bool = False

    @model_validator(mode="after")
    def _emulation_is_possible(self) -> Self:
        if self.rounding != "rne" and self.precision != "bfloat16_emulated":
            raise ValueError(
                f'rounding "{self.rounding}" is of precision "bfloat16_emulated", not of "{self.precision}": the '
                "hardware rounds to nearest"
            )
        if self.compile and self.precision == "bfloat16_emulated":
            raise ValueError('precision "bfloat16_emulated" does not go with compile')
        return self
