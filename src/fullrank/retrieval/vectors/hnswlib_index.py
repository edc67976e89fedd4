"""The graph of hnswlib."""

# Shapes: B queries, S items, E width of points, N items found.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fullrank.extras import needs
from fullrank.retrieval.vectors.graph import GraphConfig, GraphIndex


class HnswlibIndex(GraphIndex):
    """The graph of hnswlib.

    Source: Malkov and Yashunin, Efficient and robust approximate nearest neighbor search using HNSW graphs, TPAMI 2018.
    """

    name = "hnswlib"

    def __init__(self, width: int, config: GraphConfig | None = None) -> None:
        with needs("hnswlib", f"index {self.name}"):
            import hnswlib
        self.hnswlib = hnswlib
        super().__init__(width, config)

    def _graph(self, points_SE: Tensor) -> Any:
        graph = self.hnswlib.Index(space="l2", dim=points_SE.shape[1])
        graph.init_index(len(points_SE), ef_construction=self.config.build_effort, M=self.config.links)
        # Its own default is all cores, whatever OMP_NUM_THREADS says.
        graph.set_num_threads(torch.get_num_threads())
        graph.add_items(points_SE.numpy())
        return graph

    def _walk(self, graph: Any, queries_BE: Tensor, count: int, effort: int) -> Tensor:
        graph.set_ef(effort)
        return torch.from_numpy(graph.knn_query(queries_BE.numpy(), count)[0].astype("int64"))
