"""The graph of USearch."""

# Shapes: B queries, S items, E width of points, N items found.

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fullrank.extras import needs
from fullrank.retrieval.vectors.graph import GraphConfig, GraphIndex


class UsearchIndex(GraphIndex):
    """The graph of USearch."""

    name = "usearch"

    def __init__(self, width: int, config: GraphConfig | None = None) -> None:
        with needs("ann", f"index {self.name}"):
            import usearch.index
        self.usearch = usearch.index
        super().__init__(width, config)

    def _graph(self, points_SE: Tensor) -> Any:
        graph = self.usearch.Index(
            ndim=points_SE.shape[1],
            metric="l2sq",
            dtype="f32",
            connectivity=self.config.links,
            expansion_add=self.config.build_effort,
        )
        graph.add(np.arange(len(points_SE)), points_SE.numpy(), threads=torch.get_num_threads())
        return graph

    def _walk(self, graph: Any, queries_BE: Tensor, count: int, effort: int) -> Tensor:
        graph.expansion_search = effort
        keys_BN = graph.search(queries_BE.numpy(), count, threads=torch.get_num_threads()).keys
        # Where it finds fewer, the rest of the row is its largest number.
        return torch.from_numpy(np.atleast_2d(keys_BN).astype("int64")).clamp(-1, len(graph) - 1)
