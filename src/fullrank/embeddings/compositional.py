"""Compositional tables: an id's vector is made from a row of each of several small tables."""

# Shapes: N ids, D width of the table's vectors, k partitions, P parts of one partition, H hidden units.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from fullrank.embeddings.table import Ask, Part, Table, TableConfig
from fullrank.schema import OUT_OF_VOCABULARY_ID


class CompositionalConfig(TableConfig):
    """Attributes:
    operation: how the rows W_j[p_j] of an id's parts become its vector: entry-wise product, sum, one beside the other,
        or `path`, in which every part of the later partitions is an MLP and the row of the first one goes through
        those of the id. With `features` each row is a feature of its own: the id has a vector for each partition, and
        the model combines them as it combines features.
    dims: widths of the parts with `concat`, whose sum is the table's width; equal ones by default.
    path_hidden: units of the hidden layer of each MLP with `path`.
    threshold: a table of no more ids stays plain.
    """

    operation: Literal["mult", "add", "concat", "path", "features"] = "mult"
    dims: tuple[PositiveInt, ...] | None = None
    path_hidden: int = Field(default=64, ge=1)
    threshold: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _dims_are_used(self) -> Self:
        if self.dims is not None and self.operation != "concat":
            raise ValueError(f"dims are for operation concat, got {self.operation}")
        return self


class CompositionalTable(Table):
    """e(i) = ω(W_1[p_1(i)], .., W_k[p_k(i)]) for k partitions p_j of the ids. A subclass says which.

    Deviation: of a bag of ids the `features` are pooled like its vectors, so a pool may be of rows that no single id
    has; the paper leaves bags open.

    No two ids lie in the same part of all partitions, so no two have the same rows. Rows start so that an entry of
    e(i) has the standard deviation of a plain table, σ: each of k factors σ^(1/k), each of k summands σ/√k.

    An id that came later shares the parts of the out-of-vocabulary id but for one: it has a row of its own behind
    those of the last partition, with `path` of the first.

    Source: Shi et al., Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation
    Systems, KDD 2020, arXiv 1909.02107.

    Attributes:
        sizes: parts of each partition of the first ids; one alone where the table stays plain.
    """

    grows = True
    config: CompositionalConfig

    def __init__(self, rows: int, width: int, init_std: float, config: CompositionalConfig) -> None:
        super().__init__(rows, width, init_std, config)
        is_plain = self.first_rows <= config.threshold
        self.sizes = (self.first_rows,) if is_plain else self.partition_sizes()
        count, is_path = len(self.sizes), config.operation == "path"
        std = {
            "mult": init_std ** (1 / count),
            "add": init_std * count**-0.5,
            "concat": init_std,
            "features": init_std,
            "path": init_std / PathBank.gain(width, config.path_hidden) ** (count - 1),
        }[config.operation]
        self.grown = 0 if is_path else count - 1
        self.tokens = count if config.operation == "features" else 1
        stored = list(self.sizes[: 1 if is_path else count])
        stored[self.grown] += rows - self.first_rows
        self.parts = tuple(
            Part(name, size, dim, std)
            for name, size, dim in zip(self.part_names(), stored, self._dims(count), strict=False)
        )
        hidden = config.path_hidden
        self.paths = nn.ModuleList(PathBank(size, width, hidden) for size in self.sizes[1:] if is_path)

    def partition_sizes(self) -> tuple[int, ...]:
        """Number of parts of each partition of the first ids."""
        raise NotImplementedError

    def partition(self, ids_N: Tensor) -> list[Tensor]:
        """The part of each partition that ids below `first_rows` lie in."""
        raise NotImplementedError

    def part_names(self) -> Sequence[str]:
        return ["rows"] if len(self.sizes) == 1 else [f"partition{j}" for j in range(len(self.sizes))]

    def _dims(self, count: int) -> tuple[int, ...]:
        if self.config.operation != "concat" or count == 1:
            return (self.width,) * count
        dims = self.config.dims
        if dims is None:
            if self.width % count:
                raise ValueError(f"width {self.width} is not divisible by {count} parts side by side: give their dims")
            return (self.width // count,) * count
        if len(dims) != count or sum(dims) != self.width:
            raise ValueError(f"dims are {list(dims)}, expected {count} whose sum is the width {self.width}")
        return dims

    def bytes_of(self, sizes: Sequence[int]) -> int:
        """Bytes of rows for partitions of some sizes, not counting MLPs."""
        return 4 * sum(size * dim for size, dim in zip(sizes, self._dims(len(sizes)), strict=True))

    def places(self, ids_N: Tensor) -> list[Tensor]:
        """The part of each partition that ids lie in, with the rows that later ids have for themselves."""
        if self.first_rows == self.rows:
            return self._partition(ids_N)
        is_later_N = ids_N >= self.first_rows
        found = self._partition(ids_N.masked_fill(is_later_N, OUT_OF_VOCABULARY_ID))
        own_N = self.sizes[self.grown] + ids_N - self.first_rows
        found[self.grown] = torch.where(is_later_N, own_N, found[self.grown])
        return found

    def _partition(self, ids_N: Tensor) -> list[Tensor]:
        return [ids_N] if len(self.sizes) == 1 else self.partition(ids_N)

    def asks(self, ids_N: Tensor) -> list[Ask]:
        return [Ask(part, rows_N) for part, rows_N in enumerate(self.places(ids_N)[: len(self.parts)])]

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        match self.config.operation:
            case "concat" | "features":
                return torch.cat(list(vectors), 1)
            case "path":
                vector_ND = vectors[0]
                for path, part_N in zip(self.paths, self.places(ids_N)[1:], strict=True):
                    vector_ND = path(vector_ND, part_N)
                return vector_ND
        combined_ND = vectors[0]
        for vector_ND in vectors[1:]:
            combined_ND = combined_ND * vector_ND if self.config.operation == "mult" else combined_ND + vector_ND
        return combined_ND


class PathBank(nn.Module):
    """An MLP of one hidden layer for each part of a partition."""

    def __init__(self, parts: int, width: int, hidden: int) -> None:
        super().__init__()
        # Xavier, of each MLP.
        bound = math.sqrt(6 / (width + hidden))
        self.hidden_weight_PDH = nn.Parameter(torch.empty(parts, width, hidden).uniform_(-bound, bound))
        self.hidden_bias_PH = nn.Parameter(torch.zeros(parts, hidden))
        self.weight_PHD = nn.Parameter(torch.empty(parts, hidden, width).uniform_(-bound, bound))
        self.bias_PD = nn.Parameter(torch.zeros(parts, width))

    @staticmethod
    def gain(width: int, hidden: int) -> float:
        """Standard deviation of an output at the start over that of an input."""
        return math.sqrt(2 * width * hidden) / (width + hidden)

    def forward(self, vectors_ND: Tensor, part_N: Tensor) -> Tensor:
        """Each vector through the MLP of its part. Vectors are sorted by part, so no weights are copied for each."""
        if not part_N.numel():
            return vectors_ND
        sorted_N, order_N = torch.sort(part_N, stable=True)
        present, counts = torch.unique_consecutive(sorted_N, return_counts=True)
        groups = torch.split(vectors_ND.index_select(0, order_N), counts.tolist())
        weights = [weight.unbind() for weight in self.parameters()]  # once: a gradient of all parts, not one for each
        done = []
        for part, group in zip(present.tolist(), groups, strict=True):
            hidden_weight, hidden_bias, weight, bias = (of_part[part] for of_part in weights)
            hidden = torch.addmm(hidden_bias, group, hidden_weight).relu()
            done.append(torch.addmm(bias, hidden, weight).to(vectors_ND.dtype))
        return torch.empty_like(vectors_ND).index_copy(0, order_N, torch.cat(done))
