"""Tables of partitions that the user knows, such as make, model and year of a car."""

# Shapes: N ids, R rows of the table at first, k partitions.

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from fullrank.embeddings.compositional import CompositionalConfig, CompositionalTable
from fullrank.embeddings.partitions import colliding, read_buckets


class CustomPartitionsTable(CompositionalTable):
    """p_j(i) = buckets_RK[i, j]. The buckets are part of the model's state, so a saved model needs their file no more.

    Without a file they are set by `set_buckets` before the first lookup.
    """

    class Config(CompositionalConfig):
        """Attributes:
        buckets: a Parquet file with a column of integers for each partition, whose row i is the part of id i. No two
            rows may be equal. A saved model has the buckets themselves instead.
        sizes: parts of each partition; those of the file by default.
        """

        kind: Literal["custom_partitions"] = "custom_partitions"
        buckets: Path | None = Field(default=None, exclude=True)
        sizes: tuple[PositiveInt, ...] = Field(min_length=1)

        @model_validator(mode="before")
        @classmethod
        def _sizes_of_file(cls, value: Any) -> Any:
            if not isinstance(value, dict) or value.get("buckets") is None or value.get("sizes") is not None:
                return value
            buckets_RK = read_buckets(Path(value["buckets"]))
            return {**value, "sizes": tuple(max(0, int(top)) + 1 for top in buckets_RK.max(0).values)}

    config: Config
    buckets_RK: Tensor

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        unknown_RK = torch.full((self.first_rows, len(self.config.sizes)), -1)
        self.register_buffer("buckets_RK", unknown_RK)
        if config.buckets is not None:
            self.set_buckets(read_buckets(config.buckets))

    def partition_sizes(self) -> tuple[int, ...]:
        return self.config.sizes

    @torch.no_grad()
    def set_buckets(self, buckets_RK: Tensor) -> None:
        """Say which parts every id lies in, as integers of shape (R, k).

        Raises:
            ValueError: if the shape is another, a part is outside its partition, or two ids have the same parts.
        """
        if buckets_RK.shape != self.buckets_RK.shape:
            raise ValueError(f"buckets have shape {tuple(buckets_RK.shape)}, expected {tuple(self.buckets_RK.shape)}")
        if buckets_RK.is_floating_point():
            raise ValueError(f"buckets are {buckets_RK.dtype}, expected int64")
        for partition, (part_R, size) in enumerate(zip(buckets_RK.unbind(1), self.config.sizes, strict=True)):
            if int(part_R.min()) < 0 or int(part_R.max()) >= size:
                raise ValueError(
                    f"buckets of partition {partition} are {int(part_R.min())} to {int(part_R.max())}, expected 0 to "
                    f"{size - 1}"
                )
        pair = colliding(buckets_RK)
        if pair is not None:
            raise ValueError(f"ids {pair[0]} and {pair[1]} have the same buckets, {buckets_RK[pair[0]].tolist()}")
        self.buckets_RK.copy_(buckets_RK)

    def partition(self, ids_N: Tensor) -> list[Tensor]:
        found_NK = self.buckets_RK.index_select(0, ids_N)
        if found_NK.numel() and int(found_NK[0, 0]) < 0:
            raise ValueError("a table of custom_partitions has no buckets yet: name their file or call set_buckets")
        return list(found_NK.unbind(1))
