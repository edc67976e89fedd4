"""An inverted file in plain PyTorch: items in cells around centroids, of which a search scores the best few."""

# Shapes: B queries, S items, D width, C cells, P cells probed, N items found.

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from fullrank.retrieval.vectors.scan import top_k
from fullrank.retrieval.vectors.snapshot import SnapshotIndex, ladder

# Items that centroids are learnt from, of each cell.
TRAINING_ROWS = 64
ROUNDS = 10
ROWS_AT_ONCE = 16_384

_FILE = "cells.safetensors"


class Cells(NamedTuple):
    """Items in the order of their cells.

    Attributes:
        centroids_CD: float32.
        begins: where each cell begins, and the end of the last.
        order_S: the place of each item before it was put there.
        vectors_SD: float32; every cell is one slice, which a search multiplies without a copy.
    """

    centroids_CD: Tensor
    begins: list[int]
    order_S: Tensor
    vectors_SD: Tensor


class IVFIndex(SnapshotIndex):
    """Inverted file without a library: cells by k-means, probed by the inner product with their centroid.

    Source: Sivic and Zisserman, Video Google, ICCV 2003; Jégou et al., Product Quantization, TPAMI 2011, section 4.
    """

    class Config(SnapshotIndex.Config):
        """Hyper-parameters.

        Attributes:
            cells: number of cells; default the power of 2 next to the square root of the number of items.
            probes: cells that a search scores; default the least that reach `recall`.
        """

        cells: int | None = Field(default=None, ge=1)
        probes: int | None = Field(default=None, ge=1)

    name = "ivf"
    config: Config

    def _build(self, vectors_SD: Tensor) -> Cells:
        centroids_CD = k_means(vectors_SD, cells(self.config.cells, len(vectors_SD)))
        cell_S = nearest(vectors_SD, centroids_CD)
        order_S = cell_S.argsort(stable=True)
        counts_C = torch.bincount(cell_S, minlength=len(centroids_CD))
        return Cells(centroids_CD, [0, *counts_C.cumsum(0).tolist()], order_S, vectors_SD[order_S])

    def _write(self, library: Cells, directory: Path) -> bool:
        save_file(library._asdict() | {"begins": torch.tensor(library.begins)}, directory / _FILE)
        return True

    def _map(self, directory: Path) -> Cells:
        tensors = load_file(directory / _FILE)
        return Cells(tensors["centroids_CD"], tensors["begins"].tolist(), tensors["order_S"], tensors["vectors_SD"])

    def _find(self, library: Cells, queries_BD: Tensor, count: int, effort: int) -> Tensor:
        probed_BP = (queries_BD @ library.centroids_CD.T).topk(min(effort, len(library.centroids_CD)), dim=1).indices
        found = torch.full((len(queries_BD), count), -1)
        for row, probed in enumerate(probed_BP.sort(1).values.tolist()):
            slices = [(library.begins[cell], library.begins[cell + 1]) for cell in probed]
            scores = [torch.mv(library.vectors_SD[begin:end], queries_BD[row]) for begin, end in slices]
            places = [torch.arange(begin, end) for begin, end in slices]
            best_N = top_k(torch.cat(scores)[None], count)[1][0]
            found[row, : len(best_N)] = library.order_S[torch.cat(places)[best_N]]
        return found

    def _efforts(self, size: int) -> Sequence[int]:
        last = cells(self.config.cells, size)
        return ladder(min(last, 4), last) if self.config.probes is None else [min(last, self.config.probes)]

    def _scored(self, size: int, effort: int) -> int:
        number = cells(self.config.cells, size)
        return number + size * min(effort, number) // number


def cells(given: int | None, size: int) -> int:
    """The number of cells for so many items."""
    return min(size, 2 ** round(math.log2(max(1, size)) / 2) if given is None else given)


def k_means(vectors_SD: Tensor, number: int, *, seed: int = 0) -> Tensor:
    """Centroids of a sample after a few rounds of Lloyd; an empty cell goes on with an item drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    sample_RD = vectors_SD[torch.randperm(len(vectors_SD), generator=generator)[: TRAINING_ROWS * number]]
    centroids_CD = sample_RD[:number].clone()
    for _ in range(ROUNDS):
        cell_R = nearest(sample_RD, centroids_CD)
        counts_C = torch.bincount(cell_R, minlength=number)
        sums_CD = torch.zeros_like(centroids_CD).index_add_(0, cell_R, sample_RD)
        drawn_C = torch.randint(len(sample_RD), (number,), generator=generator)
        centroids_CD = torch.where(counts_C[:, None] > 0, sums_CD / counts_C[:, None].clamp_min(1), sample_RD[drawn_C])
    return centroids_CD


def nearest(vectors_SD: Tensor, centroids_CD: Tensor) -> Tensor:
    """The centroid at the smallest Euclidean distance of each vector."""
    half_C = centroids_CD.square().sum(1) / 2
    blocks = [vectors_SD[begin : begin + ROWS_AT_ONCE] for begin in range(0, len(vectors_SD), ROWS_AT_ONCE)]
    return torch.cat([(rows_RD @ centroids_CD.T).sub_(half_C).argmax(1) for rows_RD in blocks])
