"""Learning To Index: nodes of an index that a network learns by attention, level by level on what is left over."""

# Shapes: B items of a batch, D width of an item, N levels, K nodes of a level, R batches that are remembered.

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from fullrank.embeddings.semantic_id.quantizer import assigned
from fullrank.embeddings.semantic_id.rq_kmeans import k_means

Mode = Literal["joint", "em", "separate"]


class IndexOutput(NamedTuple):
    """What the index says of a batch of items.

    Attributes:
        soft: of each level, attention a_BK of every item over the nodes; one-hot unless the mode is `joint`.
        codes_BN: int64, number of the nearest node of each level.
        nodes: of each level, q_BD: the sum of the codewords down to it, as networks see the item there.
        residuals: of each level, r_BD: what the levels above left of the item; then what all have left.
        losses: scalars by name, already weighted.
    """

    soft: tuple[Tensor, ...]
    codes_BN: Tensor
    nodes: tuple[Tensor, ...]
    residuals: tuple[Tensor, ...]
    losses: dict[str, Tensor]


class LearningToIndex(nn.Module):
    """Nodes as codewords that items attend to: a = softmax(-α ‖r - c‖² / scale), c̄ = a C, next r = r - c̄.

    A node of level n is a prefix of n codes; its vector is q_n = c̄_1 + .. + c̄_n. Attention hardens as training goes
    on: α rises from where an item's attention has the perplexity `perplexity[0]` to where it has `perplexity[1]`.
    Serving takes the nearest codeword.

    Modes, by who learns from the loss of the networks above:
        joint: codewords and items, through c̄.
        em: items, through q + v - sg(v); codewords are k-means of the items, found anew from the last ones by `fit`.
        separate: nobody; codewords are such k-means.

    Left to itself the attention of `joint` collapses: while it is wide all codewords get one gradient, and nearest ones
    are soon few. Hence, beside the source's balance term and schedule: k-means to begin with, an attention that is
    never wide, a term that pulls the nearest codeword to the item, and new places for codewords that few are nearest
    to. `occupancy` tells of the nearest, as the balance term cannot.

    Raises:
        ValueError: if there is no level, or the perplexities are not in order.

    Source: Hierarchical Structured Neural Network (arXiv 2408.06653); Efficient Retrieval Scaling with Hierarchical
    Indexing (arXiv 2604.12965) for levels on residuals and `em`. Deviation: the terms and schedules named above.
    """

    class Config(BaseModel):
        """The index and how it learns.

        Attributes:
            num_nodes: codewords of each level; a level has as many nodes for each node above it.
            distance: `sqeuclidean` or `euclidean`, either over its running mean.
            perplexity: of an item's attention over the nodes, in the beginning and in the end.
            power: α rises with this power of the progress.
            reconstruction: weight of ‖sg(v) - q‖² + commitment ‖v - sg(q)‖² per number, q of the last level.
            commitment: see there.
            quantization: weight of ‖sg(r) - c‖² per number, c the nearest codeword.
            balance: weight of K Σ_k (mean attention of k)², 1 where all nodes are used alike.
            history_batches: batches that this mean is over; only the last has a gradient.
            usage_decay: of the running share of items that a node is nearest to.
            reseed_below: a node whose share falls below this part of 1/K moves to an item.
        """

        model_config = ConfigDict(extra="forbid", frozen=True)

        num_nodes: tuple[PositiveInt, ...] = Field(default=(64,), min_length=1)
        distance: Literal["sqeuclidean", "euclidean"] = "sqeuclidean"
        perplexity: tuple[float, float] = (8.0, 1.05)
        power: float = Field(default=2.0, gt=0)
        reconstruction: float = Field(default=1.0, ge=0)
        commitment: float = Field(default=0.25, ge=0)
        quantization: float = Field(default=1.0, ge=0)
        balance: float = Field(default=0.01, ge=0)
        history_batches: int = Field(default=8, ge=1)
        usage_decay: float = Field(default=0.95, ge=0, lt=1)
        reseed_below: float = Field(default=0.1, ge=0, lt=1)

    alpha_2N: Tensor
    scale_N: Tensor

    def __init__(self, dim: int, config: Config | None = None, *, mode: Mode = "joint") -> None:
        super().__init__()
        self.config = config = config or self.Config()
        if not 1 < config.perplexity[1] <= config.perplexity[0]:
            raise ValueError(f"perplexity is {config.perplexity}, expected two falling numbers above 1")
        self.dim, self.mode = dim, mode
        self.codebooks = nn.ParameterList(torch.randn(size, dim) for size in config.num_nodes)
        if mode != "joint":
            self.codebooks.requires_grad_(False)
        levels = len(config.num_nodes)
        self.register_buffer("alpha_2N", torch.tensor([[1.0] * levels, [10.0] * levels]))
        self.register_buffer("scale_N", torch.ones(levels))
        # Of each level: shares of batches that are remembered for the balance, and how often a node was the nearest.
        self._shares: list[list[Tensor]] = [[] for _ in config.num_nodes]
        self.usage = [torch.full((size,), 1.0 / size) for size in config.num_nodes]
        self.progress = 0.0

    @property
    def num_levels(self) -> int:
        return len(self.config.num_nodes)

    def alpha(self, level: int) -> float:
        """Sharpness of the attention of a level at this point of the training."""
        first, last = self.alpha_2N[:, level].tolist()
        return float(first + (last - first) * self.progress**self.config.power)

    def set_progress(self, share: float) -> None:
        """Hear how much of the index's training is over, from 0 to 1."""
        self.progress = min(1.0, max(0.0, share))

    def forward(self, items_BD: Tensor) -> IndexOutput:
        """Where items belong, softly while `joint` training; see the class for who gets a gradient."""
        joint, config = self.mode == "joint", self.config
        rest_BD, node_BD = items_BD, torch.zeros_like(items_BD)
        soft, codes, nodes, residuals = [], [], [], [rest_BD]
        balance = quantization = items_BD.new_zeros(())
        for level, book_KD in enumerate(self.codebooks):
            distance_BK = self._distances(rest_BD, book_KD, level)
            code_B = distance_BK.argmin(1)
            if self.training:
                self._count(level, code_B)
            if joint:
                soft_BK = torch.softmax(-self.alpha(level) * distance_BK, 1)
                word_BD = soft_BK @ book_KD
                balance = balance + len(book_KD) * self._flops(level, soft_BK)
                quantization = quantization + F.mse_loss(book_KD[code_B], rest_BD.detach())
            else:
                soft_BK = F.one_hot(code_B, len(book_KD)).to(items_BD.dtype)
                word_BD = book_KD[code_B]
            node_BD, rest_BD = node_BD + word_BD, rest_BD - word_BD
            soft.append(soft_BK)
            codes.append(code_B)
            nodes.append(node_BD)
            residuals.append(rest_BD)
        losses = {"commitment": config.reconstruction * config.commitment * F.mse_loss(items_BD, node_BD.detach())}
        if joint:
            losses["reconstruction"] = config.reconstruction * F.mse_loss(node_BD, items_BD.detach())
            losses["balance"] = config.balance * balance
            losses["quantization"] = config.quantization * quantization
        elif self.mode == "em":
            nodes = [items_BD + (node - items_BD).detach() for node in nodes]
        else:
            losses, nodes = {}, [node.detach() for node in nodes]
        return IndexOutput(tuple(soft), torch.stack(codes, 1), tuple(nodes), tuple(residuals), losses)

    @torch.no_grad()
    def assign(self, items_ID: Tensor) -> Tensor:
        """Codes of items as served, int64 of shape (I, N): of each level the nearest codeword to what is left.

        Raises:
            ValueError: if the width differs or a number is not finite; names the row.
        """
        if items_ID.ndim != 2 or items_ID.shape[1] != self.dim:
            raise ValueError(f"items have shape {tuple(items_ID.shape)}, expected (items, {self.dim})")
        finite_I = items_ID.isfinite().all(1)
        if not bool(finite_I.all()):
            raise ValueError(f"row {int((~finite_I).nonzero()[0])} of the items has a NaN or infinite number")
        rest, codes = items_ID, []
        for book_KD in self.codebooks:
            codes.append(assigned(rest, book_KD)[1])
            rest = rest - book_KD[codes[-1]]
        return torch.stack(codes, 1)

    @torch.no_grad()
    def node_vectors(self, codes_IN: Tensor) -> Tensor:
        """q of the nodes that codes (or prefixes of fewer levels) name, (I, D)."""
        parts = [self.codebooks[level][codes_IN[:, level]] for level in range(codes_IN.shape[1])]
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def quantization_error(self, items_ID: Tensor) -> float:
        """Mean of ‖v - q‖² over items, q the node of the last level."""
        return float((items_ID - self.node_vectors(self.assign(items_ID))).square().sum(1).mean())

    @torch.no_grad()
    def fit(self, items_ID: Tensor, *, iterations: int = 10, seed: int | None = None) -> None:
        """Codewords by k-means of items, level by level on what is left, and α for them.

        Args:
            seed: begin with items chosen at random; else with the codewords as they are, so that nodes keep what they
                stand for, and the error of quantisation never rises.

        Raises:
            ValueError: if a level has more nodes than there are items.
        """
        if max(self.config.num_nodes) > len(items_ID):
            raise ValueError(f"num_nodes {self.config.num_nodes}: more nodes than the {len(items_ID)} items")
        before = None if seed is not None else self.quantization_error(items_ID)
        old = [book.clone() for book in self.codebooks]
        rest = items_ID
        for level, book in enumerate(self.codebooks):
            if seed is not None:
                found, _ = k_means(rest, len(book), torch.Generator().manual_seed(seed + level), iterations)
            else:
                found = _refined(rest, book.detach(), iterations)
            book.copy_(found)
            rest = rest - found[assigned(rest, found)[1]]
        if before is not None and self.quantization_error(items_ID) > before:
            for book, kept in zip(self.codebooks, old, strict=True):
                book.copy_(kept)
        if seed is not None:
            self.calibrate(items_ID)
            self.usage = [torch.full((len(book),), 1.0 / len(book)) for book in self.codebooks]
            self._shares = [[] for _ in self.codebooks]

    @torch.no_grad()
    def calibrate(self, items_ID: Tensor) -> None:
        """Scales of distances, and α between which the mean perplexity of attention goes as configured."""
        rest = items_ID[:4096]
        for level, book in enumerate(self.codebooks):
            self.scale_N[level] = self._raw_distances(rest, book).mean().clamp_min(1e-12)
            distance = self._distances(rest, book, level)
            for place, wanted in enumerate(self.config.perplexity):
                # Of few nodes, 8 may be all: attention that is even over them teaches every codeword the same.
                self.alpha_2N[place, level] = _alpha_for(distance, min(wanted, max(1.05, len(book) / 4)))
            rest = rest - book[assigned(rest, book)[1]]

    @torch.no_grad()
    def reseed(self, items_BD: Tensor, generator: torch.Generator) -> int:
        """Move the codewords that few items are nearest to onto what is left of items drawn at random; how many."""
        moved, rest = 0, items_BD
        for level, book in enumerate(self.codebooks):
            rare = (self.usage[level] < self.config.reseed_below / len(book)).nonzero().squeeze(1)
            if len(rare):
                drawn = torch.randint(0, len(rest), (len(rare),), generator=generator)
                book[rare] = rest[drawn]
                self.usage[level][rare] = 1.0 / len(book)
                moved += len(rare)
            rest = rest - book[assigned(rest, book)[1]]
        return moved

    @torch.no_grad()
    def occupancy(self, codes_IN: Tensor) -> list[dict[str, float]]:
        """Of each level: perplexity of the shares of items of its nodes (as many as are in even use), and how many
        codewords no item has."""
        levels = []
        for level, size in enumerate(self.config.num_nodes):
            count_K = torch.bincount(codes_IN[:, level], minlength=size)
            perplexity = math.exp(torch.special.entr(count_K / max(1, len(codes_IN))).sum())
            levels.append({"effective": perplexity, "empty": float((count_K == 0).sum())})
        return levels

    def _raw_distances(self, rest_BD: Tensor, book_KD: Tensor) -> Tensor:
        square_BK = rest_BD.square().sum(1, keepdim=True) - 2 * rest_BD @ book_KD.T + book_KD.square().sum(1)
        square_BK = square_BK.clamp_min(0)
        return square_BK if self.config.distance == "sqeuclidean" else (square_BK + 1e-12).sqrt()

    def _distances(self, rest_BD: Tensor, book_KD: Tensor, level: int) -> Tensor:
        distance_BK = self._raw_distances(rest_BD, book_KD)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.scale_N[level].lerp_(distance_BK.mean().clamp_min(1e-12).to(self.scale_N.dtype), 0.05)
        return distance_BK / float(self.scale_N[level])

    def _flops(self, level: int, soft_BK: Tensor) -> Tensor:
        """Σ_k (mean attention of k over the last batches)²: from 1/K, all alike, to 1, one node for all."""
        share_K, past = soft_BK.mean(0), self._shares[level]
        mean_K = torch.stack([*past, share_K]).mean(0)
        if self.training:
            past.append(share_K.detach())
            del past[: max(0, len(past) - self.config.history_batches + 1)]
        return mean_K.square().sum()

    @torch.no_grad()
    def _count(self, level: int, code_B: Tensor) -> None:
        share_K = torch.bincount(code_B, minlength=len(self.usage[level])) / len(code_B)
        self.usage[level].lerp_(share_K, 1 - self.config.usage_decay)


def _refined(x_ID: Tensor, book_KD: Tensor, iterations: int) -> Tensor:
    """Lloyd's steps from given codewords; one that loses all items stays where it is."""
    for _ in range(iterations):
        code_I = assigned(x_ID, book_KD)[1]
        count_K = torch.bincount(code_I, minlength=len(book_KD))
        mean_KD = torch.zeros_like(book_KD).index_add_(0, code_I, x_ID) / count_K.clamp_min(1)[:, None]
        book_KD = torch.where(count_K[:, None] > 0, mean_KD, book_KD)
    return book_KD


def _alpha_for(distance_BK: Tensor, perplexity: float) -> float:
    """α at which softmax(-α distance) has this mean perplexity, or the end of the range of search."""
    low, high = 1e-3, 1e6
    for _ in range(60):
        alpha = math.sqrt(low * high)
        soft_BK = torch.softmax(-alpha * distance_BK, 1)
        if float(torch.special.entr(soft_BK).sum(1).exp().mean()) > perplexity:
            low = alpha
        else:
            high = alpha
    return math.sqrt(low * high)
