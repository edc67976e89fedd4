"""ScaNN's tree of anisotropically quantised vectors."""

# Shapes: B queries, S items, D width, N items found.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fullrank.extras import needs
from fullrank.retrieval.vectors.snapshot import SnapshotIndex, ladder


class ScannIndex(SnapshotIndex):
    """A tree whose leaves are scored by anisotropic codes, and whose best items are scored again.

    ScaNN comes for Linux on x86 alone.

    Source: Guo et al., Accelerating Large-Scale Inference with Anisotropic Vector Quantization, ICML 2020; Sun et al.,
    SOAR: Improved Indexing for Approximate Nearest Neighbor Search, NeurIPS 2023.
    """

    class Config(SnapshotIndex.Config):
        """Hyper-parameters.

        Attributes:
            leaves: number of leaves; default twice the square root of the number of items.
            probes: leaves that a search scores; default the least that reach `recall`.
            refine: times as many items as asked for that are scored again.
            spill: weight of SOAR, which puts every item in a second leaf as well; null: in one.
        """

        leaves: int | None = Field(default=None, ge=1)
        probes: int | None = Field(default=None, ge=1)
        refine: float = Field(default=20, ge=1)
        spill: float | None = Field(default=1.5, gt=0)

    name = "scann"
    config: Config

    def __init__(self, width: int, config: Config | None = None) -> None:
        with needs("ann", f"index {self.name}"):
            import scann
        self.scann = scann.scann_ops_pybind
        super().__init__(width, config)

    def _leaves(self, size: int) -> int:
        return min(size, round(2 * size**0.5)) if self.config.leaves is None else min(size, self.config.leaves)

    def _build(self, vectors_SD: Tensor) -> Any:
        size = len(vectors_SD)
        builder = self.scann.builder(vectors_SD.numpy(), 100, "dot_product")
        builder.set_n_training_threads(torch.get_num_threads())
        builder = builder.tree(
            num_leaves=self._leaves(size),
            num_leaves_to_search=1,
            training_sample_size=min(size, 250_000),
            soar_lambda=self.config.spill,
            overretrieve_factor=None if self.config.spill is None else 2.0,
        )
        return builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build()

    def _find(self, library: Any, queries_BD: Tensor, count: int, effort: int) -> Tensor:
        size = int(library.size())
        again = min(size, round(self.config.refine * count))
        if len(queries_BD) == 1:
            found_1N = library.search(queries_BD[0].numpy(), count, again, effort)[0][None]
        else:
            found_1N = library.search_batched(queries_BD.numpy(), count, again, effort)[0]
        # Where it finds fewer, it fills up with places beyond the last.
        found_BN = torch.from_numpy(np.asarray(found_1N).astype("int64"))
        return found_BN.masked_fill(found_BN >= size, -1)

    def _efforts(self, size: int) -> Sequence[int]:
        last = self._leaves(size)
        return ladder(min(last, 4), last) if self.config.probes is None else [min(last, self.config.probes)]

    def _scored(self, size: int, effort: int) -> int:
        leaves = self._leaves(size)
        copies = 1 if self.config.spill is None else 2
        return leaves + size * copies * min(effort, leaves) // leaves
