"""Adam, AdaGrad and SGD over the parameters that get dense gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.sgd import sgd

Kind = Literal["adam", "adagrad", "sgd"]
# State of a parameter beside `step`: tensors like the parameter.
MOMENTS: dict[Kind, tuple[str, ...]] = {"adam": ("exp_avg", "exp_avg_sq"), "adagrad": ("sum",), "sgd": ()}


class DenseOptimizer:
    """PyTorch's functional optimisers, with fused kernels, and their state by the parameters' names.

    Its optimiser classes give the same numbers, but making one imports the compiler: 0.9 s and 70 MB in every process
    that trains.

    Args:
        parameters: by name.
        rates: full learning rate of each.

    Attributes:
        state: by the parameter's name, then the tensor's; a parameter has none before its first gradient.
    """

    def __init__(self, kind: Kind, parameters: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        self.kind: Kind = kind
        self.parameters = dict(parameters)
        self.state: dict[str, dict[str, Tensor]] = {}
        self._groups: dict[float, list[str]] = {}
        for name in self.parameters:
            self._groups.setdefault(rates[name], []).append(name)
        devices = {parameter.device.type for parameter in self.parameters.values()}
        self._fused = devices <= {"cpu", "cuda"} and not (kind == "adagrad" and "cuda" in devices)

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """Update every parameter that has a gradient, at `scale` times its full learning rate."""
        for rate, names in self._groups.items():
            seen = [name for name in names if self.parameters[name].grad is not None]
            if not seen:
                continue
            for name in seen:
                if name not in self.state:
                    self.state[name] = self._fresh(self.parameters[name])
            self._update(seen, rate * scale)

    def state_of(self, parameter: Tensor) -> Mapping[str, Tensor]:
        """The state of a parameter; empty before its first gradient."""
        name = next(name for name, own in self.parameters.items() if own is parameter)
        return self.state.get(name, {})

    def zero_grad(self) -> None:
        """Let go of all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        state = {name: torch.zeros_like(parameter) for name in MOMENTS[self.kind]}
        if self.kind != "sgd":
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if self._fused else "cpu")
        return state

    def _update(self, names: list[str], rate: float) -> None:
        parameters = [self.parameters[name] for name in names]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]

        def each(key: str) -> list[Tensor]:
            return [self.state[name][key] for name in names]

        match self.kind:
            case "adam":
                adam(
                    parameters,
                    gradients,
                    each("exp_avg"),
                    each("exp_avg_sq"),
                    [],
                    each("step"),
                    fused=self._fused,
                    amsgrad=False,
                    beta1=0.9,
                    beta2=0.999,
                    lr=rate,
                    weight_decay=0.0,
                    eps=1e-8,
                    maximize=False,
                )
            case "adagrad":
                adagrad(
                    parameters,
                    gradients,
                    each("sum"),
                    each("step"),
                    fused=self._fused,
                    lr=rate,
                    weight_decay=0.0,
                    lr_decay=0.0,
                    eps=1e-10,
                    maximize=False,
                )
            case "sgd":
                sgd(
                    parameters,
                    gradients,
                    [None] * len(parameters),
                    fused=self._fused,
                    lr=rate,
                    weight_decay=0.0,
                    momentum=0.0,
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                )
