"""A served ranker under training with what a foundation model left: labels, and a history of embeddings."""

# Shapes: B rows, T tasks, N numeric columns, D width of a code, I width of what the served head reads.

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fullrank.batch import Batch
from fullrank.data.encoders import Encoders
from fullrank.layers.mlp import OutputLayer
from fullrank.models import Ranker, RankerSpec
from fullrank.models.base import RankerOutput
from fullrank.models.registry import pass_on
from fullrank.schema import Numeric, Schema
from fullrank.training.saving import load_model, save_model
from fullrank.transfer.external import DistillationHeads, ExternalDistillation
from fullrank.transfer.histories import AGE, CODES, Columns, HistoryConfig, HistoryPooling, ServedHistory

# Column of `Batch.extra`: the teacher's probabilities of the binary labels, NaN where there is none.
TEACHER = "transfer_teacher"


class Student(Ranker):
    """Any ranker, on fewer features than the log has, that learns from a teacher's labels and reads a history of its
    embeddings.

    The pooled history enters the ranker as D numbers more, and one that says whether there is any, so that it meets the
    other features in the ranker's own way. What only training needs, heads and adapter, is dropped by `export_student`.

    In evaluation a batch without the history's columns is one of users without history; in training it is an error.
    """

    name = "student"
    source = "ExFM, arXiv 2502.17494; LoopFM, arXiv 2605.29280"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            backbone: the ranker that is served.
            without: features of the log that it does not have.
            distillation: how it learns the teacher's predictions; null for not at all.
            history: of the teacher's embeddings; null for none.
        """

        backbone: RankerSpec = Field(default="dcn_v2", validate_default=True)
        without: tuple[str, ...] = ()
        distillation: ExternalDistillation | None = None
        history: HistoryConfig | None = None

        @model_validator(mode="before")
        @classmethod
        def _shared(cls, values: Any) -> Any:
            return pass_on({"backbone": "dcn_v2", **values} if isinstance(values, dict) else values, "backbone")

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        names = {feature.name for feature in schema.features}
        for name in config.without:
            if name not in names:
                raise ValueError(f'without: the log has no feature "{name}"; it has {", ".join(sorted(names))}')
        part = schema.without(config.without)
        self.columns = Columns(schema, part)
        numbers = [f"transfer_{place}" for place in range(config.history.width + 1)] if config.history else []
        features = tuple(Numeric(name=name, transform="standard", encoding="scalar") for name in numbers)
        # Numbers go behind all others, whatever comes after them in the schema.
        self.backbone = config.backbone.build(part.model_copy(update={"features": (*part.features, *features)}))
        self.binary = [place for place, label in enumerate(schema.labels) if label.kind == "binary"]
        self.history = None
        if config.history is not None:
            self.history = HistoryPooling(config.history, part, config.backbone.config.embeddings)
        self.heads: DistillationHeads | None = None
        self._outputs = [module for module in self.backbone.modules() if isinstance(module, OutputLayer)]
        self._read: list[Tensor] = []
        if config.distillation is not None:
            if config.distillation.mode != "kd" and not self._outputs:
                raise ValueError(
                    f"{config.backbone.name} has no hidden layer below its output that a head could share: use mode kd"
                )
            if not self.binary:
                raise ValueError("distillation is of binary labels, and the schema has none")
            width = sum(layer.in_features for layer in self._outputs)
            self.heads = DistillationHeads(config.distillation, width, len(self.binary))
            for layer in self._outputs:
                layer.register_forward_pre_hook(self._keep)

    def _keep(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        if self.training:
            self._read.append(inputs[0])

    def set_progress(self, share: float) -> None:
        self.backbone.set_progress(share)

    def forward(self, batch: Batch) -> RankerOutput:
        self._read.clear()
        output: RankerOutput = self.backbone(self._seen(batch))
        config = self.config.distillation
        if self.heads is None or config is None or not self.training or config.weight == 0:
            return output
        if TEACHER not in batch.extra:
            raise ValueError(f'the batch has no column "{TEACHER}" of a teacher\'s labels')
        shared_BI = torch.cat([read.float() for read in self._read], 1) if config.mode != "kd" else None
        self._read.clear()
        loss = self.heads(
            output.logits_BT[:, self.binary].float(),
            shared_BI,
            batch.extra[TEACHER],
            batch.labels_BT[:, self.binary],
            batch.weights_B,
        )
        return replace(output, aux_losses={**output.aux_losses, "distillation": loss})

    def loss(self, output: RankerOutput, batch: Batch) -> Tensor:
        return self.backbone.loss(output, batch)

    def _seen(self, batch: Batch) -> Batch:
        """What the ranker sees of a batch."""
        seen = self.columns(batch)
        if self.history is None:
            return seen
        if CODES not in batch.extra:
            if self.training:
                raise ValueError(f'the batch has no columns "{CODES}" and "{AGE}" of a history')
            width = self.history.config.width + 1
            return replace(
                seen, numeric_BN=torch.cat([seen.numeric_BN, seen.numeric_BN.new_zeros(len(seen), width)], 1)
            )
        pooled_BD, there_B = self.history(replace(seen, extra=batch.extra))
        return replace(seen, numeric_BN=torch.cat([seen.numeric_BN, pooled_BD, there_B[:, None]], 1))


def export_student(
    bundle: Path, out: Path, *, history: ServedHistory | None = None, overwrite: bool = False
) -> Student:
    """Write a student's bundle without what only its training needed: the same predictions, fewer numbers.

    Args:
        history: which codes a server reads for it.

    Raises:
        ValueError: if the bundle holds another ranker, or `out` exists and `overwrite` is not set.
    """
    model = load_model(bundle)
    if not isinstance(model, Student):
        raise ValueError(f"{bundle} holds a {model.name}, expected a student")
    changes: dict[str, Any] = {"distillation": None}
    if model.config.history is not None:
        changes["history"] = model.config.history.model_copy(update={"served": history})
    served = Student(model.schema, model.config.model_copy(update=changes))
    served.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("heads.")})
    encoders = Encoders.load(bundle / "encoders")
    save_model(served.eval(), out, encoders, about={"exported_from": bundle.name}, overwrite=overwrite)
    return served
