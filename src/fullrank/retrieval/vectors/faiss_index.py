"""Indexes of FAISS: inverted files of compressed vectors, and a graph."""

# Shapes: B queries, S items, D width, N items found.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fullrank.extras import needs
from fullrank.retrieval.vectors.graph import GraphIndex
from fullrank.retrieval.vectors.ivf import cells
from fullrank.retrieval.vectors.snapshot import SnapshotIndex, ladder

# Vectors that levels of numbers are chosen by.
TRAINED_ON = 100_000

_FILE = "index.faiss"


def _faiss(name: str) -> Any:
    with needs("retrieval", f"index {name}"):
        import faiss
    return faiss


class _Faiss(SnapshotIndex):
    """An index of FAISS, whose inverted files, graphs and vectors are mapped; of four-bit codes there are no more than
    half a byte a number, which each process reads."""

    def __init__(self, width: int, config: Any = None) -> None:
        self.faiss = _faiss(self.name)
        super().__init__(width, config)

    def _write(self, library: Any, directory: Path) -> bool:
        self.faiss.write_index(library, str(directory / _FILE))
        return True

    def _map(self, directory: Path) -> Any:
        return self.faiss.read_index(str(directory / _FILE), self.faiss.IO_FLAG_MMAP_IFC)


class _FaissIVF(_Faiss):
    """An inverted file of FAISS, by inner products."""

    class Config(SnapshotIndex.Config):
        """Hyper-parameters.

        Attributes:
            cells: number of cells; default the power of 2 next to the square root of the number of items.
            probes: cells that a search scores; default the least that reach `recall`.
        """

        cells: int | None = Field(default=None, ge=1)
        probes: int | None = Field(default=None, ge=1)

    config: Config

    @abstractmethod
    def _quantizer(self) -> str:
        """How vectors are stored, in the language of FAISS's index factory."""

    def _build(self, vectors_SD: Tensor) -> Any:
        number = cells(self.config.cells, len(vectors_SD))
        index = self.faiss.index_factory(
            self.width, f"IVF{number},{self._quantizer()}", self.faiss.METRIC_INNER_PRODUCT
        )
        index.train(vectors_SD.numpy())
        index.add(vectors_SD.numpy())
        return index

    def _find(self, library: Any, queries_BD: Tensor, count: int, effort: int) -> Tensor:
        asked = self.faiss.SearchParametersIVF(nprobe=effort)
        return torch.from_numpy(library.search(queries_BD.numpy(), count, params=asked)[1])

    def _efforts(self, size: int) -> Sequence[int]:
        last = cells(self.config.cells, size)
        return ladder(min(last, 4), last) if self.config.probes is None else [min(last, self.config.probes)]

    def _scored(self, size: int, effort: int) -> int:
        number = cells(self.config.cells, size)
        return number + size * min(effort, number) // number


class FaissIVFSQ8(_FaissIVF):
    """Inverted file of FAISS whose vectors take a byte a number."""

    name = "faiss_ivf_sq8"

    def _quantizer(self) -> str:
        return "SQ8"


class FaissIVFPQ(_FaissIVF):
    """Inverted file of FAISS whose vectors are product-quantised, and the best of which are scored again.

    Source: Jégou et al., Product Quantization for Nearest Neighbor Search, TPAMI 2011.
    """

    class Config(_FaissIVF.Config):
        """Hyper-parameters.

        Attributes:
            numbers_per_code: numbers of a vector that share a code of one byte.
            refine: times as many items as asked for are scored again in float32.
        """

        numbers_per_code: int = Field(default=2, ge=1)
        refine: float = Field(default=3, ge=1)

    name = "faiss_ivf_pq"
    config: Config

    def _quantizer(self) -> str:
        # The number of codes has to divide the width.
        most = max(1, self.width // self.config.numbers_per_code)
        return f"PQ{next(codes for codes in range(most, 0, -1) if self.width % codes == 0)}"

    def _asked(self, count: int) -> int:
        return round(self.config.refine * count)


class Faiss4Bit(_Faiss):
    """Four bits of each number of every item, scanned in registers; the best of that are scored again.

    A search looks at all items, and costs a fraction of scoring them. Its effort is how many times as many items are
    scored again as are wanted.

    Source: André et al., Quicker ADC: unlocking the hidden potential of product quantization with SIMD, TPAMI 2021.
    """

    name = "faiss_4bit"

    def _build(self, vectors_SD: Tensor) -> Any:
        index = self.faiss.index_factory(self.width, f"PQ{self.width}x4fs", self.faiss.METRIC_INNER_PRODUCT)
        index.train(vectors_SD[:: max(1, len(vectors_SD) // TRAINED_ON)].numpy())
        index.add(vectors_SD.numpy())
        return index

    def _find(self, library: Any, queries_BD: Tensor, count: int, effort: int) -> Tensor:
        count = min(effort * count, self.live_S.numel())
        return torch.from_numpy(library.search(queries_BD.numpy(), count)[1])

    def _efforts(self, size: int) -> Sequence[int]:
        return ladder(1, min(64, size))

    def _scored(self, size: int, effort: int) -> int:
        return size


class FaissHNSW(_Faiss, GraphIndex):
    """The graph of FAISS.

    Source: Malkov and Yashunin, Efficient and robust approximate nearest neighbor search using HNSW graphs, TPAMI 2018.
    """

    name = "faiss_hnsw"

    def _graph(self, points_SE: Tensor) -> Any:
        index = self.faiss.IndexHNSWFlat(points_SE.shape[1], self.config.links, self.faiss.METRIC_L2)
        index.hnsw.efConstruction = self.config.build_effort
        index.add(points_SE.numpy())
        return index

    def _walk(self, graph: Any, queries_BE: Tensor, count: int, effort: int) -> Tensor:
        asked = self.faiss.SearchParametersHNSW(efSearch=effort)
        return torch.from_numpy(graph.search(queries_BE.numpy(), count, params=asked)[1])

    def links(self) -> tuple[Tensor, int] | None:
        if self.snapshot is None:
            return None
        hnsw, size = self.snapshot.library.hnsw, self.live_S.numel()
        links = torch.from_numpy(self.faiss.vector_to_array(hnsw.neighbors)).long()
        offsets = torch.from_numpy(self.faiss.vector_to_array(hnsw.offsets).astype("int64"))
        return links[offsets[:size, None] + torch.arange(hnsw.nb_neighbors(0))], int(hnsw.entry_point)
