"""CETNet: different rankers with tables of their own, trained together and fused by confidence."""

# Shapes: M members, B rows, T tasks.

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.batch import Batch
from fullrank.models.base import Ranker, RankerOutput, task_loss
from fullrank.models.registry import RankerSpec, pass_on
from fullrank.schema import Schema

DCN_AND_DLRM: Any = ("dcn_v2", "dlrm")
Fusion = Literal["confidence", "mean", "logit_mean", "learned"]


class ConfidenceFusion(nn.Module):
    """One logit from the logits of M members.

    `confidence` weighs the members' probabilities row by row with w = softmax_m(-H(p_m) / temperature), where H is the
    entropy of a click with probability p_m: a member that is sure of a row speaks louder there. `mean` averages the
    probabilities, `logit_mean` the logits, `learned` has one softmax weight per member and task.

    The weights are no function of the members' outputs in the backward pass unless `detach` is false: otherwise the
    loss of the mixture would reward a member for becoming extreme.

    Deviation: one public reading of the paper writes softmax(1 / H). At click rates of a few percent the entropy of
    the *lower* prediction is nearly 0, so that form takes the lowest member almost always and predicts up to 40 % too
    few clicks; the paper's "negation entropy", -H, stays within a few percent, which `intercept` of `CETNet` removes.
    """

    def __init__(
        self, fusion: Fusion, num_members: int, num_tasks: int, *, temperature: float = 1.0, detach: bool = True
    ) -> None:
        super().__init__()
        self.fusion, self.temperature, self.detach = fusion, temperature, detach
        self.score_MT = nn.Parameter(torch.zeros(num_members, num_tasks)) if fusion == "learned" else None

    def log_weights(self, logits_MBT: Tensor) -> Tensor:
        """Logarithm of what each member counts in each row, shape (M, B, T); the weights sum to 1 over the members."""
        if self.score_MT is not None:
            return torch.log_softmax(self.score_MT, 0)[:, None, :].expand_as(logits_MBT)
        if self.fusion != "confidence":
            return torch.full_like(logits_MBT, -math.log(logits_MBT.shape[0]))
        entropy_MBT = binary_entropy(logits_MBT.detach() if self.detach else logits_MBT)
        return torch.log_softmax(-entropy_MBT / self.temperature, 0)

    def forward(self, logits_MBT: Tensor) -> Tensor:
        """Log-odds of the fused probability, shape (B, T)."""
        if self.fusion == "logit_mean":
            return logits_MBT.mean(0)
        log_weight_MBT = self.log_weights(logits_MBT)
        click_BT = torch.logsumexp(log_weight_MBT + F.logsigmoid(logits_MBT), 0)
        return click_BT - torch.logsumexp(log_weight_MBT + F.logsigmoid(-logits_MBT), 0)


def binary_entropy(logits: Tensor) -> Tensor:
    """-p ln p - (1-p) ln(1-p) of p = σ(logits), in nats, finite for any finite logit."""
    return F.softplus(logits) - logits * torch.sigmoid(logits)


def symmetric_divergence(logits_MBT: Tensor) -> Tensor:
    """½ (KL(p_a‖p_b) + KL(p_b‖p_a)) = ½ (p_a - p_b)(z_a - z_b), averaged over pairs of members, rows and tasks."""
    pairs = list(combinations(logits_MBT, 2))
    if not pairs:
        return logits_MBT.new_zeros(())
    total = sum((0.5 * (torch.sigmoid(a) - torch.sigmoid(b)) * (a - b)).mean() for a, b in pairs)
    return cast(Tensor, total) / len(pairs)


@dataclass(frozen=True)
class EnsembleOutput(RankerOutput):
    """A `RankerOutput` that remembers its members.

    Attributes:
        members: what each of them says.
    """

    members: tuple[RankerOutput, ...] = field(default=())

    @property
    def member_logits_MBT(self) -> Tensor:
        return torch.stack([member.logits_BT for member in self.members])


class CETNet(Ranker):
    """Collaborative ensemble: loss = BCE(y, p) + Σ_m BCE(y, p_m) + λ · symmetric divergence of the members.

    Members learn from the labels and from one another: the divergence pulls both sides of every pair, unlike
    distillation, which pulls one. Only members with different tables are an ensemble of different views, so each has
    its own. The weights of the loss's terms are our reading: the paper's values could not be read.
    """

    name = "cetnet"
    source = "A Collaborative Ensemble Framework for CTR Prediction, arXiv 2411.13700, 2024"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            members: for each member its `name` and the fields of that model's Config; `embedding_dim` is that of this
                config unless the member has its own.
            fusion: how the members' predictions become one, see `ConfidenceFusion`.
            temperature: of the confidence fusion; large is the mean, towards 0 the surest member alone.
            detach_confidence: take the weights of the confidence fusion as constants in the backward pass.
            collaboration: λ.
            member_loss: weight of the members' own losses.
            stop_gradient: pull each pair only from one side at a time, as in distillation.
            intercept: learn one number per task that is added to the fused logit. Confidence fusion predicts slightly
                too few clicks where clicks are rare; this removes it.
        """

        members: tuple[RankerSpec, ...] = Field(default=DCN_AND_DLRM, validate_default=True)
        fusion: Fusion = "confidence"
        temperature: float = Field(default=1.0, gt=0)
        detach_confidence: bool = True
        collaboration: float = Field(default=0.1, ge=0)
        member_loss: float = Field(default=1.0, ge=0)
        stop_gradient: bool = False
        intercept: bool = False

        @field_validator("members")
        @classmethod
        def _some(cls, members: tuple[RankerSpec, ...]) -> tuple[RankerSpec, ...]:
            if not members:
                raise ValueError("expected at least one member")
            return members

        @model_validator(mode="before")
        @classmethod
        def _members_inherit(cls, values: Any) -> Any:
            return pass_on({"members": DCN_AND_DLRM, **values} if isinstance(values, dict) else values, "members")

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        regressions = [label.name for label in schema.labels if label.kind != "binary"]
        if regressions:
            raise ValueError(f"CETNet fuses probabilities: its labels must be binary, {regressions[0]} is not")
        self.members = nn.ModuleList(spec.build(schema) for spec in config.members)
        self.fusion = ConfidenceFusion(
            config.fusion,
            len(self.members),
            self.num_tasks,
            temperature=config.temperature,
            detach=config.detach_confidence,
        )
        self.intercept_T = nn.Parameter(torch.zeros(self.num_tasks)) if config.intercept else None

    def forward(self, batch: Batch) -> EnsembleOutput:
        outputs = tuple(cast(RankerOutput, ranker(batch)) for ranker in self.members)
        logits_MBT = torch.stack([output.logits_BT for output in outputs])
        fused_BT = self.fusion(logits_MBT)
        if self.intercept_T is not None:
            fused_BT = fused_BT + self.intercept_T
        extra = {
            f"member{index}.{name}": loss
            for index, output in enumerate(outputs, 1)
            for name, loss in output.aux_losses.items()
        }
        if self.config.collaboration and len(outputs) > 1:
            extra["collaboration"] = self.config.collaboration * self._divergence(logits_MBT)
        return EnsembleOutput(fused_BT, extra, outputs)

    def _divergence(self, logits_MBT: Tensor) -> Tensor:
        if not self.config.stop_gradient:
            return symmetric_divergence(logits_MBT)
        fixed = logits_MBT.detach()
        sides = [
            symmetric_divergence(torch.cat([logits_MBT[index : index + 1], fixed[other : other + 1]]))
            for index in range(len(logits_MBT))
            for other in range(len(logits_MBT))
            if index != other
        ]
        return torch.stack(sides).mean()

    def loss(self, output: RankerOutput, batch: Batch) -> Tensor:
        total = super().loss(output, batch)
        assert isinstance(output, EnsembleOutput)
        for own in output.members:
            own_loss = task_loss(own.logits_BT, batch.labels_BT, self.schema, batch.weights_B)
            total = total + self.config.member_loss * own_loss
        return total

    @torch.no_grad()
    def member_predictions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Probabilities p_MBT of the members and their fusion weights w_MBT."""
        logits_MBT = self(batch).member_logits_MBT
        return torch.sigmoid(logits_MBT), self.fusion.log_weights(logits_MBT).exp()


class MultiEmbedding(Ranker):
    """K copies of one backbone, each with tables of its own; the mean of their logits is trained and served.

    Source: Guo et al., On the Embedding Collapse when Scaling up Recommendation Models, ICML 2024.
    """

    name = "multi_embedding"
    source = "Guo et al., On the Embedding Collapse when Scaling up Recommendation Models, ICML 2024"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            backbone: `name` and Config fields of the model that is copied.
            num_tables: how many copies, each with tables of its own.
        """

        backbone: RankerSpec = Field(default="dcn_v2", validate_default=True)
        num_tables: int = Field(default=2, ge=1)

        @model_validator(mode="before")
        @classmethod
        def _backbone_inherits(cls, values: Any) -> Any:
            return pass_on({"backbone": "dcn_v2", **values} if isinstance(values, dict) else values, "backbone")

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.members = nn.ModuleList(config.backbone.build(schema) for _ in range(config.num_tables))

    def forward(self, batch: Batch) -> RankerOutput:
        outputs = [cast(RankerOutput, ranker(batch)) for ranker in self.members]
        extra = {f"member{i}.{name}": loss for i, out in enumerate(outputs, 1) for name, loss in out.aux_losses.items()}
        return RankerOutput(torch.stack([output.logits_BT for output in outputs]).mean(0), extra)
