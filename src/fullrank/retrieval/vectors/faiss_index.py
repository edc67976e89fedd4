"""Indexes of FAISS: inverted files of compressed vectors, and a graph."""

# Shapes: B queries, S items, D width, N items found.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from fullrank.extras import needs
from fullrank.retrieval.vectors.graph import GraphIndex
from fullrank.retrieval.vectors.ivf import ROWS_AT_ONCE, TRAINING_ROWS, cells, k_means
from fullrank.retrieval.vectors.snapshot import QUERIES, TYPICAL, SnapshotIndex, ladder

# Vectors that levels of numbers are chosen by.
TRAINED_ON = 100_000

_FILE, _BASIS = "index.faiss", "basis.safetensors"

# Queries of a pass over four-bit codes: 3 and 3, a fifth faster than what FAISS takes by default.
QUERIES_OF_A_PASS = 0x33

# Weight of queries of any direction beside typical ones.
ANY_DIRECTION = 0.5

# Times as many items as asked for that are scored again, to choose from.
REFINES = (1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


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


class Based(NamedTuple):
    """An index of vectors in another basis.

    Attributes:
        basis_DD: what queries are multiplied by.
        index: that of FAISS.
    """

    basis_DD: Tensor
    index: Any


class FaissIVF4Bit(_FaissIVF):
    """Inverted file of FAISS whose vectors take four bits a number, scanned in registers; the best of that are scored
    again.

    Vectors are put into a basis in which the distance of two items is how far their scores differ for typical queries,
    where these are given, so that a cell has what the same queries find; and are turned at random, see `Faiss4Bit`.
    Cells are the nearest centroids, and those with the largest product are searched. Codes are of what is left of a
    vector without its centroid.

    Source: André et al., Quicker ADC: unlocking the hidden potential of product quantization with SIMD, TPAMI 2021.
    """

    class Config(_FaissIVF.Config):
        """Hyper-parameters.

        Attributes:
            refine: times as many items as asked for are scored again in float32; default the least with which a search
                of all cells misses no more than half of what `recall` lets it miss.
        """

        refine: float | None = Field(default=None, ge=1)

    name = "faiss_ivf_4bit"
    config: Config

    def _clear(self) -> None:
        super()._clear()
        self.refine = self.config.refine or REFINES[0]

    def _quantizer(self) -> str:
        return f"PQ{self.width}x4fsr"

    def _build(self, vectors_SD: Tensor) -> Based:
        faiss, number = self.faiss, cells(self.config.cells, len(vectors_SD))
        items_DD, queries_DD = bases(self.width, self._learnt_from())
        rows = torch.randperm(len(vectors_SD), generator=torch.Generator().manual_seed(0))
        sample_RD = vectors_SD[rows[: max(TRAINED_ON, TRAINING_ROWS * number)]] @ items_DD
        centroids_CD = k_means(sample_RD, number)
        nearest, largest = faiss.IndexFlatL2(self.width), faiss.IndexFlatIP(self.width)
        nearest.add(centroids_CD.numpy())
        largest.add(centroids_CD.numpy())
        index = faiss.IndexIVFPQFastScan(nearest, self.width, number, self.width, 4, faiss.METRIC_INNER_PRODUCT)
        index.by_residual = True
        index.train(sample_RD[:TRAINED_ON].numpy())
        for begin in range(0, len(vectors_SD), ROWS_AT_ONCE):
            index.add((vectors_SD[begin : begin + ROWS_AT_ONCE] @ items_DD).numpy())
        # What has put items into cells by distance is asked for them by product; the index owns it from here on.
        largest.this.disown()
        index.quantizer, index.own_fields = largest, True
        return Based(queries_DD, index)

    def _learnt_from(self) -> Tensor | None:
        typical_QD = self.typical_QD
        return typical_QD if typical_QD is None or len(typical_QD) <= QUERIES else typical_QD[QUERIES:TYPICAL]

    def tune(self, queries_QD: Tensor | None = None) -> None:
        snapshot = self.snapshot
        if snapshot is not None and self.config.refine is None:
            queries_QD = self.queries() if queries_QD is None else queries_QD
            _, best_QK = snapshot.scan(queries_QD, min(self.config.results, self.live_S.numel()))
            self.effort = snapshot.library.index.nlist
            for self.refine in REFINES:
                if float(self._share(queries_QD, best_QK).mean()) >= (1 + self.config.recall) / 2:
                    break
        super().tune(queries_QD)

    def _asked(self, count: int) -> int:
        return round(self.refine * count)

    def _find(self, library: Based, queries_BD: Tensor, count: int, effort: int) -> Tensor:
        return super()._find(library.index, queries_BD @ library.basis_DD, count, effort)

    def _write(self, library: Based, directory: Path) -> bool:
        save_file({"basis": library.basis_DD}, directory / _BASIS)
        return super()._write(library.index, directory)

    def _map(self, directory: Path) -> Based:
        return Based(load_file(directory / _BASIS)["basis"], super()._map(directory))

    def _chosen(self) -> dict[str, Any]:
        return {**super()._chosen(), "refine": self.refine}

    def _choose(self, chosen: dict[str, Any]) -> None:
        super()._choose(chosen)
        self.refine = chosen["refine"]


def bases(width: int, queries_QD: Tensor | None) -> tuple[Tensor, Tensor]:
    """What vectors of items, and queries, are multiplied by, (D, D) each; their inner products stay as they are.

    With S = E[q qᵀ] the squared distance |S^½ (x - y)|² of two items is E[(q·x - q·y)²].
    """
    weights_DD = torch.eye(width, dtype=torch.float64)
    if queries_QD is not None and bool(queries_QD.any()):
        typical_DD = queries_QD.T.double() @ queries_QD.double()
        weights_DD = ANY_DIRECTION * weights_DD + typical_DD * (width / typical_DD.trace())
    values_D, vectors_DD = torch.linalg.eigh(weights_DD)
    generator = torch.Generator().manual_seed(0)
    turn_DD = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    items_DD = vectors_DD * values_D.sqrt() @ vectors_DD.T @ turn_DD
    return items_DD.float(), (vectors_DD * values_D.rsqrt() @ vectors_DD.T @ turn_DD).float()


class Faiss4Bit(_Faiss):
    """Four bits of each number of every item, scanned in registers; the best of that are scored again.

    A search looks at all items, and costs a fraction of scoring them. Its effort is how many times as many items are
    scored again as are wanted, in tenths. Vectors are turned at random first: all numbers are then alike, none with
    outliers that four bits cannot tell apart.

    Source: André et al., Quicker ADC: unlocking the hidden potential of product quantization with SIMD, TPAMI 2021.
    """

    name = "faiss_4bit"

    def _build(self, vectors_SD: Tensor) -> Any:
        kind = f"RR{self.width},PQ{self.width}x4fs"
        index = self.faiss.index_factory(self.width, kind, self.faiss.METRIC_INNER_PRODUCT)
        self.faiss.downcast_index(index.index).qbs = QUERIES_OF_A_PASS
        index.train(vectors_SD[:: max(1, len(vectors_SD) // TRAINED_ON)].numpy())
        index.add(vectors_SD.numpy())
        return index

    def _find(self, library: Any, queries_BD: Tensor, count: int, effort: int) -> Tensor:
        count = min(effort * count // 10, self.live_S.numel())
        return torch.from_numpy(library.search(queries_BD.numpy(), count)[1])

    def _efforts(self, size: int) -> Sequence[int]:
        return ladder(10, 640)

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
