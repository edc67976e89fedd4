"""The contract of every ranker: a batch in, logits and auxiliary losses out."""

# Shapes: B rows, T tasks.

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fullrank.batch import Batch
from fullrank.embeddings import AnyTable, EmbeddingCollection, Tables
from fullrank.schema import Schema

# Types of configuration fields: sizes that cannot be are refused where they are given.
# The descriptions are for tables of fields where a Config says nothing more special.
Hidden = Annotated[tuple[PositiveInt, ...], Field(description="widths of the hidden layers of the MLP.")]
NonEmptyHidden = Annotated[Hidden, Field(min_length=1)]
Dropout = Annotated[
    float, Field(ge=0, lt=1, description="share of each hidden layer's outputs that is zeroed in training.")
]
BatchNorm = Annotated[bool, Field(description="normalise each hidden layer over the batch.")]
InitStd = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class RankerOutput:
    """What a ranker says of a batch.

    Attributes:
        logits_BT: float32 log-odds for binary tasks, predictions for regression tasks; never probabilities.
        aux_losses: scalars that the model adds to its training loss, already weighted.
    """

    logits_BT: Tensor
    aux_losses: dict[str, Tensor] = field(default_factory=dict)


class ParameterCount(NamedTuple):
    """Trainable numbers of a model, optimiser state not counted."""

    dense: int
    embedding: int

    @property
    def total(self) -> int:
        return self.dense + self.embedding


class Ranker(nn.Module):
    """Base of every model that scores rows.

    A subclass has a `Config` beside it, builds its layers in `__init__(schema, config)` and implements `forward`.

    Attributes:
        needs_history: whether the model is about a user's events: a schema without a sequence is worth a warning.
    """

    class Config(BaseModel):
        """Hyper-parameters shared by all rankers.

        Attributes:
            embedding_dim: width of every table that the schema does not size itself.
            embedding_init: standard deviation of the normal distribution that tables start from.
            tables: how tables are stored, by the table's name; those not named have a row per id.
        """

        model_config = ConfigDict(extra="forbid", frozen=True)

        embedding_dim: int = Field(default=16, ge=1)
        embedding_init: InitStd = 1e-4
        tables: dict[str, AnyTable] = {}

        @property
        def embeddings(self) -> Tables:
            """What layers with tables are made from."""
            return Tables(embedding_dim=self.embedding_dim, init_std=self.embedding_init, kinds=self.tables)

    name: ClassVar[str]
    source: ClassVar[str]
    needs_history: ClassVar[bool] = False

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__()
        if not schema.labels:
            raise ValueError(f"{type(self).__name__} needs a schema with at least one label")
        if self.needs_history and not schema.sequences:
            item = schema.keys.item_id or "item_id"
            warnings.warn(
                f"{type(self).__name__} reads a user's history, and the schema has no sequence: add the feature "
                f'{{"kind": "sequence", "name": "history", "of": ["{item}"], "where": "{schema.labels[0].name}", '
                '"length": 50} to it and import the log again',
                stacklevel=2,
            )
        known = schema.tables()
        for table in config.tables:
            if table not in known:
                raise ValueError(f'tables: there is no table "{table}"; the schema has {", ".join(known) or "none"}')
        self.schema = schema
        self.config = config

    @classmethod
    def from_config(cls, schema: Schema, config: BaseModel | dict[str, Any] | None = None) -> Self:
        """Build the model for a fitted schema.

        Raises:
            ValueError: if the configuration has an unknown key or a wrong value (pydantic's message names it).
        """
        if isinstance(config, cls.Config):
            return cls(schema, config)
        values = config.model_dump() if isinstance(config, BaseModel) else (config or {})
        return cls(schema, cls.Config.model_validate(values))

    @property
    def num_tasks(self) -> int:
        return len(self.schema.labels)

    def forward(self, batch: Batch) -> RankerOutput:
        raise NotImplementedError

    def loss(self, output: RankerOutput, batch: Batch) -> Tensor:
        """Weighted mean of each task's loss over its observed labels, tasks summed by weight, plus auxiliary losses.

        Binary tasks use cross-entropy on logits, regression tasks squared error. A NaN label is unobserved: it adds
        neither loss nor gradient.
        """
        total = task_loss(output.logits_BT, batch.labels_BT, self.schema, batch.weights_B)
        for extra in output.aux_losses.values():
            total = total + extra
        return total

    def set_progress(self, share: float) -> None:
        """Hear how much of the training is over, from 0 to 1; the Trainer says it before each step.

        For models that learn in stages, which may switch `requires_grad` of their parameters here.
        """

    def output_biases(self) -> list[Tensor]:
        """Biases of the logits: tensors whose elements, in order, are those of the tasks; none if it has no such."""
        return []

    @torch.no_grad()
    def start_at_base_rate(self, batch: Batch) -> None:
        """Make a new model predict the mean label of each task; the Trainer calls it with the first batch.

        Training then spends no steps on the mean, and the first batch's loss is the entropy of its labels. A bias that
        is no longer 0 has learnt and stays as it is, and so does one whose task has no observed label here. Rankers
        inside this one start alike.
        """
        for ranker in self.modules():
            if isinstance(ranker, Ranker) and ranker is not self:
                ranker.start_at_base_rate(batch)
        biases = [element for bias in self.output_biases() for element in bias.view(-1).unbind()]
        weights_B = torch.ones(len(batch), device=batch.device) if batch.weights_B is None else batch.weights_B
        for label, bias, label_B in zip(self.schema.labels, biases, batch.labels_BT.unbind(1), strict=False):
            weight_B = torch.where(torch.isnan(label_B), 0.0, weights_B)
            observed = int((weight_B > 0).sum())
            if not observed or bool(bias):
                continue
            mean = (weight_B * label_B.nan_to_num()).sum() / weight_B.sum()
            if label.kind == "binary":
                # Labels of one class say that the other is rare, not impossible.
                mean = torch.logit(mean.clamp(0.5 / observed, 1 - 0.5 / observed))
            bias.fill_(mean)

    def num_parameters(self) -> ParameterCount:
        collections = [module for module in self.modules() if isinstance(module, EmbeddingCollection)]
        embedding = sum(collection.num_parameters() for collection in collections)
        owned = {id(p) for collection in collections for p in collection.parameters()}
        dense = sum(p.numel() for p in self.parameters() if p.requires_grad and id(p) not in owned)
        return ParameterCount(dense, embedding)

    def packed_tables(self) -> list[str]:
        """Tables that are stored as codes, so that the model can serve and not learn."""
        collections = [module for module in self.modules() if isinstance(module, EmbeddingCollection)]
        return sorted({name for collection in collections for name in collection.packed_tables()})

    def flops_per_example(self, sequence_length: int | None = None) -> int:
        """Floating-point operations of one row's forward pass, counted by PyTorch: matrix products, a multiply-add
        as 2; lookups and element-wise work are not in it.

        Args:
            sequence_length: events per sequence and ids per bag; default each one's maximum.
        """
        rows = 16
        batch = example_batch(self.schema, rows, sequence_length)
        training = self.training
        self.eval()
        counter = FlopCounterMode(display=False)
        # PyTorch counts attention only where it is made of matrix products, and its counter hooks onto gradients of
        # parameters that are a module's input, so gradients stay enabled.
        with torch.enable_grad(), counter, sdpa_kernel(SDPBackend.MATH):
            self(batch)
        self.train(training)
        return round(counter.get_total_flops() / rows)


def example_batch(schema: Schema, rows: int, sequence_length: int | None = None) -> Batch:
    """A valid batch of zeros: every id 0, every bag and sequence `sequence_length` long (default its maximum)."""
    lengths = [min(bag.max_length, sequence_length or bag.max_length) for bag in schema.bags]
    event_lengths = []
    for sequence in schema.sequences:
        length = sequence_length or sequence.max_length
        lengths += [length] * len(sequence.id_fields)
        event_lengths += [length] * len(sequence.number_fields)
    return Batch(
        numeric_BN=torch.zeros(rows, len(schema.numeric_columns)),
        ids_BF=torch.zeros(rows, len(schema.categorical), dtype=torch.int64),
        jagged_keys=schema.jagged_keys,
        jagged_values=torch.zeros(rows * sum(lengths), dtype=torch.int64),
        jagged_lengths_KB=torch.tensor(lengths, dtype=torch.int64)[:, None].expand(-1, rows).contiguous(),
        event_keys=schema.event_number_keys,
        event_values=torch.zeros(rows * sum(event_lengths)),
        event_lengths_EB=torch.tensor(event_lengths, dtype=torch.int64)[:, None].expand(-1, rows).contiguous(),
        labels_BT=torch.zeros(rows, len(schema.labels)),
    )


def task_loss(logits_BT: Tensor, labels_BT: Tensor, schema: Schema, weights_B: Tensor | None) -> Tensor:
    """The supervised part of `Ranker.loss`: see there."""
    if labels_BT.shape != logits_BT.shape:
        raise ValueError(f"labels have shape {tuple(labels_BT.shape)}, logits {tuple(logits_BT.shape)}")
    total = logits_BT.new_zeros(())
    for task, label in enumerate(schema.labels):
        logit_B, label_B = logits_BT[:, task], labels_BT[:, task]
        observed_B = ~torch.isnan(label_B)
        target_B = torch.where(observed_B, label_B, 0.0)
        if label.kind == "binary":
            loss_B = F.binary_cross_entropy_with_logits(logit_B, target_B, reduction="none")
        else:
            loss_B = (logit_B - target_B).square()
        weight_B = observed_B.to(logit_B.dtype) if weights_B is None else observed_B * weights_B
        total = total + label.weight * (loss_B * weight_B).sum() / weight_B.sum().clamp_min(1e-12)
    return total
