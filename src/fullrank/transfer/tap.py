"""What a trained ranker thinks on its way to a logit."""

# Shapes: B rows, T tasks, E width of the tapped layers side by side.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.models import Ranker


class Tapped(NamedTuple):
    """Of a batch: embeddings_BE and logits_BT, neither with a gradient."""

    embeddings_BE: Tensor
    logits_BT: Tensor


class EmbeddingTap:
    """A ranker's logits and the outputs of some of its layers, side by side, from one forward pass.

    The ranker is used as it is: in evaluation mode, without gradients, and as before once the call is over.

    Args:
        model: the ranker.
        layers: names of modules as in `named_modules`; of a ReLU, which may overwrite what it reads, tap the ReLU.

    Raises:
        ValueError: if a layer is unknown; names those that end in the same word, or all.
    """

    def __init__(self, model: Ranker, layers: Sequence[str]) -> None:
        known = dict(model.named_modules())
        if not layers:
            raise ValueError("layers are empty, expected names of modules to tap")
        for layer in layers:
            if not layer or layer not in known:
                names = ", ".join(name for name, module in known.items() if name and not list(module.children()))
                raise ValueError(f'{model.name} has no layer "{layer}"; its layers are {names}')
        self.model, self.layers = model, tuple(layers)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tapped:
        """Raises:
        ValueError: if a layer was not used, or its output is not a tensor with a row for each row of the batch.
        """
        seen: dict[str, Tensor] = {}
        modules = dict(self.model.named_modules())

        def keep(layer: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if not isinstance(output, Tensor) or output.shape[:1] != (len(batch),):
                    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                    raise ValueError(f'layer "{layer}" gives {shape}, expected a tensor with {len(batch)} rows')
                seen[layer] = output.flatten(1).float().clone()  # what comes after may overwrite it

            return hook

        handles = [modules[layer].register_forward_hook(keep(layer)) for layer in self.layers]
        training = self.model.training
        self.model.eval()
        try:
            logits_BT = self.model(batch).logits_BT
        finally:
            self.model.train(training)
            for handle in handles:
                handle.remove()
        for layer in self.layers:
            if layer not in seen:
                raise ValueError(f'layer "{layer}" takes no part in a prediction: tap another')
        return Tapped(torch.cat([seen[layer] for layer in self.layers], 1), logits_BT)
