"""The paper's quantiser: residual codebooks between an encoder and a decoder that learn with them."""

# Shapes: B vectors of a batch, N all vectors, D their width, E width of the latent, K codes of a level.

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fullrank.embeddings.semantic_id.quantizer import (
    Quantizer,
    assigned,
    expanded,
    fitting_vectors,
    squared_distances,
)
from fullrank.embeddings.semantic_id.rq_kmeans import k_means

# Vectors for each code that a codebook is started from, at most.
_START_VECTORS = 40
# A code in use less often than this share of an even use is put elsewhere.
_RARE = 0.1
_USE_DECAY = 0.99
_SINKHORN_ROUNDS, _SINKHORN_TEMPERATURE = 5, 0.05


class RQLosses(NamedTuple):
    """Losses of a batch: sums over the numbers of a vector and over levels, means over vectors."""

    total: Tensor
    reconstruction: Tensor
    codebook: Tensor
    commitment: Tensor


class RQVAE(Quantizer, nn.Module):
    """z = enc(x); c_l the centroid nearest to r_l, r_{l+1} = r_l - sg(v_l); x̂ = dec(z + sg(Σ v_l - z)).

    The loss is ‖x - x̂‖² + Σ_l β ‖r_l - sg(v_l)‖² + ‖sg(r_l) - v_l‖². Vectors are standardised first.

    What keeps codes from dying out: codebooks start as k-means of what is to be quantised, and codes that are hardly
    used move to vectors of the batch.

    Args:
        input_dim: D.
        n_levels, codebook_size: L and K, or a K for each level.
        latent_dim: E.
        hidden: widths between D and E; the decoder has them in reverse.
        beta: β, 0.5 in the paper and 0.25 in most code.
        kmeans_init: start codebooks from the data; else at random.
        reseed: steps after which unused codes move; 0 for never.
        ema: decay of the mean of a code's vectors that the codebook follows instead of its loss; None for the loss.
        sinkhorn: balance assignments to codes while training.

    Raises:
        ValueError: if a size is below 1.

    Source: Lee et al., Autoregressive Image Generation using Residual Quantization, CVPR 2022, as used by
    arXiv 2504.02137, section 3.
    """

    # Deviation: the paper gives neither widths nor optimiser nor what it does against collapse; these are ours. With
    # residuals of straight-through outputs, r - (r + sg(v - r)), no commitment of a level behind the first would reach
    # the encoder: hence the detached centroid.

    kind = "rq_vae"

    def __init__(
        self,
        input_dim: int,
        n_levels: int = 3,
        codebook_size: int | Sequence[int] = 256,
        latent_dim: int = 32,
        hidden: Sequence[int] = (512, 256, 128),
        *,
        beta: float = 0.5,
        kmeans_init: bool = True,
        reseed: int = 100,
        ema: float | None = None,
        sinkhorn: bool = False,
        seed: int = 0,
        codebook_sizes: Sequence[int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if input_dim < 1 or latent_dim < 1 or beta < 0 or (ema is not None and not 0 < ema < 1):
            raise ValueError(
                f"expected input_dim and latent_dim of at least 1, beta of at least 0 and ema between 0 and 1, got "
                f"{input_dim}, {latent_dim}, {beta} and {ema}"
            )
        size = codebook_size if isinstance(codebook_size, int) else tuple(codebook_size)
        sizes = list(codebook_sizes) if codebook_sizes is not None else expanded(size, n_levels)
        self.config = {
            "input_dim": input_dim,
            "codebook_sizes": sizes,
            "latent_dim": latent_dim,
            "hidden": list(hidden),
            "beta": beta,
            "kmeans_init": kmeans_init,
            "reseed": reseed,
            "ema": ema,
            "sinkhorn": sinkhorn,
            "seed": seed,
        }
        self.input_dim = input_dim
        self.fitted = False
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = _mlp([input_dim, *hidden, latent_dim])
            self.decoder = _mlp([latent_dim, *reversed(list(hidden)), input_dim])
            self.books = nn.ParameterList(nn.Parameter(torch.randn(size, latent_dim)) for size in sizes)
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("std", torch.ones(input_dim))
        for level, size in enumerate(sizes):
            self.register_buffer(f"use_{level}", torch.full((size,), 1 / size), persistent=False)

    mean: Tensor
    std: Tensor

    @property
    def codebooks(self) -> list[Tensor]:  # type: ignore[override]
        return [book.detach() for book in self.books] if self.fitted else []

    def latent(self, x_ND: Tensor) -> Tensor:
        z_NE: Tensor = self.encoder((x_ND - self.mean) / self.std)
        return z_NE

    def output(self, z_NE: Tensor) -> Tensor:
        x_ND: Tensor = self.decoder(z_NE) * self.std + self.mean
        return x_ND

    def tensors(self) -> dict[str, Tensor]:
        names = {f"books.{level}": f"codebooks.{level}" for level in range(len(self.books))}
        return {names.get(name, name): tensor.detach() for name, tensor in self.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict({name.replace("codebooks.", "books."): tensor for name, tensor in tensors.items()})
        self.fitted = True

    def training_step(self, x_BD: Tensor) -> RQLosses:
        """Losses of a batch of standardised vectors; moves codes that are not used, where that is asked for."""
        z_BE: Tensor = self.encoder(x_BD)
        rest_BE, sum_BE = z_BE, torch.zeros_like(z_BE)
        codebook, commitment = z_BE.new_zeros(()), z_BE.new_zeros(())
        for level, book in enumerate(self.books):
            code_B = self._assign(rest_BE.detach(), book.detach())
            if self.training:
                self._follow(level, rest_BE.detach(), code_B)
            chosen_BE = book[code_B]
            commitment = commitment + (rest_BE - chosen_BE.detach()).square().sum(1).mean()
            if self.config["ema"] is None:
                codebook = codebook + (rest_BE.detach() - chosen_BE).square().sum(1).mean()
            sum_BE = sum_BE + chosen_BE.detach()
            rest_BE = rest_BE - chosen_BE.detach()
        found_BD = self.decoder(z_BE + (sum_BE - z_BE).detach())
        reconstruction = (x_BD - found_BD).square().sum(1).mean()
        commitment = self.config["beta"] * commitment
        return RQLosses(reconstruction + codebook + commitment, reconstruction, codebook, commitment)

    def fit(
        self,
        x: Tensor | np.ndarray,
        steps: int = 20_000,
        batch_size: int = 2048,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        progress: Callable[[int, int, RQLosses], None] | None = None,
    ) -> RQVAE:
        """Learn from content vectors (N, D).

        Args:
            progress: called after each step with its number, the number of steps and the losses.

        Raises:
            ValueError: if there are fewer vectors than codes of a level, the width is not `input_dim`, or a number is
                not finite; names the row.
            TypeError: if the vectors are integers.
        """
        x_ND = fitting_vectors(x, self.codebook_sizes)
        if x_ND.shape[1] != self.input_dim:
            raise ValueError(f"content vectors have width {x_ND.shape[1]}, expected input_dim {self.input_dim}")
        self.mean.copy_(x_ND.mean(0))
        spread_D = x_ND.std(0, correction=0)
        self.std.copy_(torch.where(spread_D > 1e-6 * spread_D.max().clamp_min(1e-12), spread_D, 1.0))
        x_ND = (x_ND - self.mean) / self.std
        self.train()
        if self.config["kmeans_init"]:
            self._start(x_ND)
        descent = torch.optim.AdamW(self.parameters(), learning_rate, weight_decay=weight_decay)
        order_N = torch.empty(0, dtype=torch.int64)
        for step in range(1, steps + 1):
            if len(order_N) < min(batch_size, len(x_ND)):
                order_N = torch.randperm(len(x_ND), generator=self.generator)
            rows_B, order_N = order_N[:batch_size], order_N[batch_size:]
            losses = self.training_step(x_ND[rows_B])
            descent.zero_grad()
            losses.total.backward()  # type: ignore[no-untyped-call]
            descent.step()
            if self.config["reseed"] and step % self.config["reseed"] == 0 and step < steps:
                self._reseed(x_ND[rows_B])
            if progress is not None:
                progress(step, steps, RQLosses(*(loss.detach() for loss in losses)))
        self.eval()
        self.fitted = True
        self.continues = ()
        return self

    @torch.no_grad()
    def _start(self, x_ND: Tensor) -> None:
        most = _START_VECTORS * max(self.codebook_sizes)
        rows = torch.randperm(len(x_ND), generator=self.generator)[:most]
        rest_NE = self.encoder(x_ND[rows])
        for book in self.books:
            book.copy_(k_means(rest_NE, len(book), self.generator)[0])
            rest_NE = rest_NE - book[assigned(rest_NE, book)[1]]

    def _assign(self, rest_BE: Tensor, book_KE: Tensor) -> Tensor:
        if not (self.training and self.config["sinkhorn"]):
            return assigned(rest_BE, book_KE)[1]
        distance_BK = squared_distances(rest_BE, book_KE)
        distance_BK = distance_BK - distance_BK.min(1, keepdim=True).values
        share_BK = torch.log_softmax(-distance_BK / (_SINKHORN_TEMPERATURE * distance_BK.mean().clamp_min(1e-12)), 1)
        for _ in range(_SINKHORN_ROUNDS):
            share_BK = share_BK - share_BK.logsumexp(0, keepdim=True)
            share_BK = share_BK - share_BK.logsumexp(1, keepdim=True)
        return share_BK.argmax(1)

    @torch.no_grad()
    def _follow(self, level: int, rest_BE: Tensor, code_B: Tensor) -> None:
        """Count how often codes are used, and move the codebook if it follows a running mean."""
        book = self.books[level]
        count_K = torch.bincount(code_B, minlength=len(book))
        use_K = self.get_buffer(f"use_{level}")
        use_K.mul_(_USE_DECAY).add_(count_K / len(code_B), alpha=1 - _USE_DECAY)
        if self.config["ema"] is not None:
            sum_KE = torch.zeros_like(book).index_add_(0, code_B, rest_BE)
            seen = count_K > 0
            mean_KE = sum_KE[seen] / count_K[seen, None]
            book[seen] = torch.lerp(mean_KE, book[seen], self.config["ema"])

    @torch.no_grad()
    def _reseed(self, x_BD: Tensor) -> None:
        """Move codes that are hardly used to vectors of a batch, as they arrive at that level."""
        rest_BE = self.encoder(x_BD)
        for level, book in enumerate(self.books):
            use_K = self.get_buffer(f"use_{level}")
            rare = (use_K < _RARE / len(book)).nonzero().squeeze(1)[: len(x_BD)]
            if len(rare):
                book[rare] = rest_BE[torch.randperm(len(rest_BE), generator=self.generator)[: len(rare)]]
                use_K[rare] = 1 / len(book)
            rest_BE = rest_BE - book[assigned(rest_BE, book)[1]]


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
