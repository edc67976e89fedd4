"""Residual k-means: codes of content vectors without training a network."""

# Shapes: N vectors of width D, K centroids.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fullrank.embeddings.semantic_id.quantizer import Quantizer, assigned, expanded, fitting_vectors

ITERATIONS = 20


class RQKMeans(Quantizer):
    """k-means, then k-means of what it left over, and so on, L times.

    The quantiser to begin with: nothing to tune, deterministic by its seed, minutes where an RQ-VAE needs hours.

    Args:
        n_levels: L.
        codebook_size: K, or one for each level.
        n_init: k-means runs of a level, of which the best is kept.
        max_points_per_centroid: K times as many vectors, chosen at random, are enough to fit a level to.

    Raises:
        ValueError: if a size is below 1.
    """

    kind = "rq_kmeans"

    def __init__(
        self,
        n_levels: int = 3,
        codebook_size: int | Sequence[int] = 256,
        *,
        n_init: int = 1,
        max_points_per_centroid: int = 256,
        seed: int = 0,
        codebook_sizes: Sequence[int] | None = None,
    ) -> None:
        if n_init < 1 or max_points_per_centroid < 1:
            raise ValueError(
                f"n_init is {n_init} and max_points_per_centroid {max_points_per_centroid}, expected at least 1"
            )
        size = codebook_size if isinstance(codebook_size, int) else tuple(codebook_size)
        self.config = {
            "codebook_sizes": list(codebook_sizes) if codebook_sizes is not None else expanded(size, n_levels),
            "n_init": n_init,
            "max_points_per_centroid": max_points_per_centroid,
            "seed": seed,
        }
        self.codebooks = []

    @torch.no_grad()
    def fit(self, x: Tensor | np.ndarray) -> RQKMeans:
        """Find the codebooks of content vectors (N, D).

        Raises:
            ValueError: if there are fewer vectors than codes of a level, or a number is not finite; names the row.
            TypeError: if the vectors are integers.
        """
        x_ND = fitting_vectors(x, self.codebook_sizes)
        generator = torch.Generator().manual_seed(self.config["seed"])
        most = self.config["max_points_per_centroid"] * max(self.codebook_sizes)
        if len(x_ND) > most:
            x_ND = x_ND[torch.randperm(len(x_ND), generator=generator)[:most].to(x_ND.device)]
        rest_ND, books = x_ND.clone(), []
        for size in self.codebook_sizes:
            runs = [k_means(rest_ND, size, generator) for _ in range(self.config["n_init"])]
            book, _ = min(runs, key=lambda run: run[1])
            books.append(book)
            rest_ND -= book[assigned(rest_ND, book)[1]]
        self.codebooks = [book.cpu() for book in books]
        self.input_dim = x_ND.shape[1]
        self.continues = ()
        return self


def k_means(x_ND: Tensor, size: int, generator: torch.Generator, iterations: int = ITERATIONS) -> tuple[Tensor, float]:
    """Lloyd's algorithm from different vectors chosen at random; centroids (K, D) and the sum of squared distances.

    A centroid that loses all its vectors moves to the one that lies farthest from its own. Where there are no more
    different vectors than centroids they are the centroids, and the rest are copies of the first, which nothing is
    assigned to.
    """
    order = torch.randperm(len(x_ND), generator=generator).to(x_ND.device)
    book = _different(x_ND, order, size)
    if len(book) < size:
        return torch.cat([book, book[:1].expand(size - len(book), -1)]), 0.0
    norm_N = x_ND.square().sum(1)
    inertia = 0.0
    for _ in range(iterations):
        distance_N, of_N = assigned(x_ND, book)
        distance_N += norm_N
        inertia = float(distance_N.double().sum())
        count_K = torch.bincount(of_N, minlength=size)
        book = torch.zeros_like(book).index_add_(0, of_N, x_ND) / count_K.clamp_min(1)[:, None]
        empty = (count_K == 0).nonzero().squeeze(1)
        if len(empty):
            book[empty] = x_ND[distance_N.topk(len(empty)).indices]
    return book, inertia


def _different(x_ND: Tensor, order_N: Tensor, size: int) -> Tensor:
    """The first `size` different vectors in an order, or all if there are fewer."""
    tried = 2 * size
    while True:
        rows_M = order_N[:tried]
        _, of_M = torch.unique(x_ND[rows_M], dim=0, return_inverse=True)
        first_U = torch.full((int(of_M.max()) + 1,), len(of_M), device=of_M.device)
        first_U.scatter_reduce_(0, of_M, torch.arange(len(of_M), device=of_M.device), "amin")
        if len(first_U) >= size or tried >= len(order_N):
            return x_ND[rows_M[first_U.sort().values[:size]]]
        tried *= 4
