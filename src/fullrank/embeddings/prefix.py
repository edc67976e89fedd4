"""Prefix tables: an id is a path of codes from coarse to fine, and every prefix of the path has a row."""

# Shapes: N ids, L levels, D width.

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fullrank.embeddings.table import Ask, Part, Table, TableConfig
from fullrank.schema import OUT_OF_VOCABULARY_ID


class PrefixTable(Table):
    """e(i) = Σ_l E[slot(c_1 .. c_l)], the sum of the rows of all prefixes of the codes of id i.

    Ids with a common prefix share its row, so what is learnt of one holds for all that are like it. Prefix l has the
    number p_l = K (p_{l-1} + 1) + c_l, p_1 = c_1, which no two prefixes share; where there are more of them than rows,
    the number is taken modulo the rows.

    The codes of an id are `codes_RL`, part of the model's state: set by `set_codes` to what a quantiser of content
    vectors found. Until then they are the digits of the id in base K, most significant first: blocks of similarly
    popular ids, where the vocabulary orders them so. An id that came later has the codes of the out-of-vocabulary id.

    Source: Enhancing Embedding Representation Stability in Recommendation Systems with Semantic ID, RecSys 2025,
    arXiv 2504.02137, prefix n-gram.
    """

    class Config(TableConfig):
        """Attributes:
        levels: L, codes of an id.
        codebook_size: K, different codes of a level.
        stored_rows: rows to store; default as many as the table has ids when it is made, and never more than there are
            prefixes, K + K² + .. + K^L.
        """

        kind: Literal["prefix"] = "prefix"
        levels: int = Field(default=3, ge=1)
        codebook_size: int = Field(default=32, ge=2, le=1 << 20)
        stored_rows: int | None = Field(default=None, ge=1)

    grows = True
    config: Config
    codes_RL: Tensor

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        size, levels = config.codebook_size, config.levels
        prefixes = sum(size**level for level in range(1, levels + 1))
        self.stored = min(prefixes, config.stored_rows or self.first_rows)
        self.parts = (Part("prefixes", self.stored, width, init_std * levels**-0.5),)
        rest_R, digits = torch.arange(rows), []
        rest_R[self.first_rows :] = OUT_OF_VOCABULARY_ID
        for _ in range(levels):
            digits.append(rest_R % size)
            rest_R = rest_R.div(size, rounding_mode="floor")
        self.register_buffer("codes_RL", torch.stack(digits[::-1], 1))

    @torch.no_grad()
    def set_codes(self, codes_RL: Tensor) -> None:
        """Give every id its codes, int64 of shape (rows, L).

        Raises:
            ValueError: if the shape is another, or a code is outside 0 to K - 1.
        """
        if codes_RL.shape != self.codes_RL.shape:
            raise ValueError(f"codes have shape {tuple(codes_RL.shape)}, expected {tuple(self.codes_RL.shape)}")
        low, high = int(codes_RL.min()), int(codes_RL.max())
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(f"codes are {low} to {high}, expected 0 to {self.config.codebook_size - 1}")
        self.codes_RL.copy_(codes_RL)

    def asks(self, ids_N: Tensor) -> list[Ask]:
        codes_NL = self.codes_RL.index_select(0, ids_N)
        prefix_N = codes_NL[:, 0]
        found = [prefix_N]
        for level in range(1, self.config.levels):
            # By Horner's rule modulo the rows, the number of a long prefix does not overflow.
            prefix_N = (self.config.codebook_size * (prefix_N % self.stored + 1) + codes_NL[:, level]) % self.stored
            found.append(prefix_N)
        return [Ask(0, rows_N % self.stored) for rows_N in found]

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(vectors)).sum(0)
