"""HiLoMoE: any ranker whose linear layers get hierarchical low-rank experts, trained in three stages."""

# Shapes: B rows, N inputs of a layer, L expert layers, K experts.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.layers.hilomoe import HiLoMoELinear, Stage
from fullrank.models.base import Ranker, RankerOutput
from fullrank.models.registry import RankerSpec, pass_on
from fullrank.schema import Schema


def convert_to_hilomoe(
    model: nn.Module,
    target: Sequence[str] | Callable[[str, nn.Linear], bool],
    **options: int | bool | None,
) -> list[str]:
    """Put a `HiLoMoELinear` around linear layers of a model, in place; the model's outputs do not change.

    Args:
        target: patterns of module names such as `mlp.layers.*` (`fnmatch`; those that match other modules than plain
            `nn.Linear` are skipped unless the pattern is the exact name), or a predicate of name and layer.
        options: of `HiLoMoELinear`.

    Returns:
        Names of the layers that were converted.

    Raises:
        TypeError: if an exact name is not a plain linear layer.
        ValueError: if nothing matches.
    """
    modules = dict(model.named_modules())
    if not callable(target):
        for name in target:
            if name in modules and type(modules[name]) is not nn.Linear:
                raise TypeError(f"{name} is a {type(modules[name]).__name__}, expected an nn.Linear")
    plain = {name: module for name, module in modules.items() if type(module) is nn.Linear}
    chosen = [
        name
        for name, module in plain.items()
        if (target(name, module) if callable(target) else any(fnmatch(name, pattern) for pattern in target))
    ]
    if not chosen:
        raise ValueError(f"no linear layer matches {target}; there are {', '.join(plain) or 'none'}")
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, HiLoMoELinear.from_linear(plain[name], **options))
    return chosen


class HiLoMoE(Ranker):
    """A backbone with experts in its linear layers.

    Training has three stages, whose lengths are shares of all steps:

    1. warm-up: the backbone alone; experts are off.
    2. experts: tables and backbone stand still; the experts of layer 1 learn, then those of layer 2, ..., with dense
       routing and with all auxiliary losses, diversity included. Later layers specialise given earlier choices.
    3. joint: everything learns, with top-k routing.

    The content of the stages is our reading: the paper names three stages, their text could not be read.
    """

    name = "hilomoe"
    source = "Hierarchical LoRA Mixture of Experts for CTR, arXiv 2510.10432, 2025"

    class Config(Ranker.Config):
        """Hyper-parameters.

        Attributes:
            backbone: `name` and Config fields of the ranker that gets experts.
            targets: patterns of the names of its linear layers; by default every plain one but output layers.
            num_layers: layers of experts in each linear layer.
            num_experts: experts in each of these.
            top_k: experts of a layer that a row goes through; None for all.
            project: learn a first projection of the query, which costs more than all experts together.
            hierarchical: let a layer's choice depend on those before it; without it the mixture is flat.
            warm_up, growth: shares of all steps of stages 1 and 2; both 0 trains jointly from the start.
            balance, z, diversity: weights of the auxiliary losses.
        """

        backbone: RankerSpec = Field(default="dcn_v2", validate_default=True)
        targets: tuple[str, ...] = Field(default=("*",), min_length=1)
        num_layers: int = Field(default=2, ge=1)
        num_experts: int = Field(default=8, ge=1)
        top_k: int | None = Field(default=2, ge=1)
        project: bool = False
        hierarchical: bool = True
        warm_up: float = Field(default=0.2, ge=0, lt=1)
        growth: float = Field(default=0.05, ge=0, lt=1)
        balance: float = Field(default=1e-2, ge=0)
        z: float = Field(default=1e-3, ge=0)
        diversity: float = Field(default=1e-3, ge=0)

        @model_validator(mode="before")
        @classmethod
        def _backbone_inherits(cls, values: Any) -> Any:
            return pass_on({"backbone": "dcn_v2", **values} if isinstance(values, dict) else values, "backbone")

        @model_validator(mode="after")
        def _stages_fit(self) -> Self:
            if self.warm_up + self.growth >= 1:
                raise ValueError(f"expected warm_up + growth below 1, got {self.warm_up} + {self.growth}")
            if self.top_k is not None and self.top_k > self.num_experts:
                raise ValueError(f"expected top_k between 1 and num_experts = {self.num_experts}, got {self.top_k}")
            return self

    config: Config

    def __init__(self, schema: Schema, config: Config) -> None:
        super().__init__(schema, config)
        self.backbone = config.backbone.build(schema)
        self.converted = convert_to_hilomoe(
            self.backbone,
            config.targets,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            top_k=config.top_k,
            project=config.project,
            hierarchical=config.hierarchical,
        )
        self.stage: Stage = "joint"
        self.growing = 0
        self._trainable: list[nn.Parameter] | None = None

    def expert_layers(self) -> dict[str, HiLoMoELinear]:
        """The converted layers by name."""
        return {name: cast(HiLoMoELinear, self.backbone.get_submodule(name)) for name in self.converted}

    def set_progress(self, share: float) -> None:
        share += 1e-9  # a boundary belongs to the stage that begins there, whatever the rounding
        growth_begins, joint_begins = self.config.warm_up, self.config.warm_up + self.config.growth
        if share < growth_begins:
            self._enter("warm_up", 0)
        elif share < joint_begins:
            part = (share - growth_begins) / self.config.growth
            self._enter("experts", min(self.config.num_layers - 1, math.floor(part * self.config.num_layers)))
        else:
            self._enter("joint", 0)

    def _enter(self, stage: Stage, growing: int) -> None:
        if self._trainable is not None and (stage, growing) == (self.stage, self.growing):
            return
        if self._trainable is None:
            self._trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.stage, self.growing = stage, growing
        layers = self.expert_layers().values()
        of_experts = {id(p) for layer in layers for index in range(layer.num_layers) for p in layer.experts(index)}
        of_experts |= {id(layer.project.weight) for layer in layers if layer.project is not None}
        learning = {id(p) for layer in layers for p in layer.experts(growing)}
        for parameter in self._trainable:
            is_expert = id(parameter) in of_experts
            learns = {"warm_up": not is_expert, "experts": id(parameter) in learning, "joint": True}[stage]
            parameter.requires_grad_(learns)
            if not learns:
                parameter.grad = None
        for layer in layers:
            layer.stage = stage

    def forward(self, batch: Batch) -> RankerOutput:
        output: RankerOutput = self.backbone(batch)
        extra = dict(output.aux_losses)
        layers = self.expert_layers().values()
        if self.training and self.stage != "warm_up":
            extra["balance"] = self.config.balance * _total([layer.losses["balance"] for layer in layers])
            extra["z"] = self.config.z * _total([layer.losses["z"] for layer in layers])
            if self.stage == "experts":
                extra["diversity"] = self.config.diversity * _total([layer.diversity() for layer in layers])
        return RankerOutput(output.logits_BT, extra)

    @torch.no_grad()
    def routing(self, batch: Batch) -> dict[str, Tensor]:
        """Scores (N, L, K) of every converted layer on a batch."""
        found: dict[str, Tensor] = {}

        def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                assert isinstance(layer, HiLoMoELinear)
                found[name] = layer.scores(inputs[0].reshape(-1, layer.in_features))

            return hook

        hooks = [layer.register_forward_pre_hook(record(name)) for name, layer in self.expert_layers().items()]
        training = self.training
        try:
            self.eval()
            self.backbone(batch)
        finally:
            self.train(training)
            for hook in hooks:
                hook.remove()
        return found


def expert_usage(scores_NLK: Tensor) -> tuple[Tensor, float]:
    """How often each expert scores highest, shape (L, K), and the entropy (nats) of the paths that inputs take."""
    choice_NL = scores_NLK.argmax(2)
    usage_LK = nn.functional.one_hot(choice_NL, scores_NLK.shape[2]).float().mean(0)
    _, counts = torch.unique(choice_NL, dim=0, return_counts=True)
    share = counts / counts.sum()
    return usage_LK, -float((share * share.log()).sum())


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum()
