"""Numbers as vectors: what models read of each under its encoding, and learned linear maps of that.

A batch carries one float per number. For `piecewise_linear` it is the number's place among its bins: 2.25 has filled
two bins and a quarter of the third, -1 is missing; so a model needs no edges of bins.
"""

# Shapes: B rows, N numeric columns, S of them scalar, P piecewise linear, Q periodic, T components of a piecewise
# linear code, K frequencies, C components of all codes, D width.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fullrank.batch import Batch
from fullrank.embeddings import Tables
from fullrank.schema import Schema

# Standard deviations that learned vectors of numbers start from, whatever tables start from: a vector as small as that
# of a rare id takes an epoch to grow. Chosen on validation rows of census incomes and of forest cover (DCN-V2, AUC):
# scalars .948 and .951 from 1e-4, .949 and .952 from .1, .949 on the latter from .3; codes .963 on the latter from
# .003, .964 from .03, .959 from .1. One seed each, and seeds differ by up to .003 there: only the far ends are ruled
# out.
SCALAR_START = 0.1
CODE_START = 0.03
# Of a periodic code: how many frequencies, and the standard deviation that they start from; on the same rows .962 from
# .1, .964 from .3, .945 from 1.
FREQUENCIES = 16
FREQUENCY_START = 0.3


class NumberCodes(nn.Module):
    """The codes of all numbers side by side: scalar columns, piecewise linear ones, periodic ones.

    A scalar is its own code. A piecewise linear code says how far the number fills each bin, from 0 to 1, after a
    component that is 1 where the number is missing. A periodic one is [sin 2πc_k x, cos 2πc_k x] with learned c_k.

    Attributes:
        columns_C: the column of `Batch.numeric_BN` that each component is of.

    Source: Gorishniy, Rubachev and Babenko, On Embeddings for Numerical Features in Tabular Deep Learning, NeurIPS
    2022, sections 3.2 and 3.3.
    """

    columns_S: Tensor
    columns_P: Tensor
    columns_Q: Tensor
    sign_T: Tensor
    shift_T: Tensor

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        places: dict[str, list[int]] = {"scalar": [], "piecewise_linear": [], "periodic": []}
        bins = 0
        for feature in schema.numeric:
            place = sum(map(len, places.values()))
            places[feature.encoding].append(place)
            if feature.missing_column is not None:
                places["scalar"].append(place + 1)
            if feature.encoding == "piecewise_linear":
                bins = max(bins, feature.bins)
        self.num_scalar, self.num_piecewise, self.num_periodic = map(len, places.values())
        # The columns in the order of their codes: scalar, piecewise linear, periodic.
        self.order = [column for columns in places.values() for column in columns]
        for letter, columns in zip("SPQ", places.values(), strict=True):
            self.register_buffer(f"columns_{letter}", torch.tensor(columns, dtype=torch.int64), persistent=False)
        # Component 0 is min(max(-x, 0), 1), component t is min(max(x - (t - 1), 0), 1).
        self.num_components = bins + 1
        sign_T = torch.tensor([-1.0] + [1.0] * bins)
        self.register_buffer("sign_T", sign_T, persistent=False)
        self.register_buffer("shift_T", torch.tensor([0.0] + [-float(t) for t in range(bins)]), persistent=False)
        if self.num_periodic:
            self.frequencies_QK = nn.Parameter(torch.randn(self.num_periodic, FREQUENCIES) * FREQUENCY_START)
        self.columns_C = [
            *places["scalar"],
            *(column for column in places["piecewise_linear"] for _ in range(self.num_components)),
            *(column for column in places["periodic"] for _ in range(2 * FREQUENCIES)),
        ]
        self.width = len(self.columns_C)

    def forward(self, batch: Batch) -> Tensor:
        """codes_BC."""
        if not self.num_piecewise and not self.num_periodic:
            return batch.numeric_BN
        parts = [self.scalars(batch)] if self.num_scalar else []
        if self.num_piecewise:
            parts.append(self.piecewise_linear(batch).flatten(1))
        if self.num_periodic:
            parts.append(self.periodic(batch).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def scalars(self, batch: Batch) -> Tensor:
        """Shape (B, S)."""
        return self._of(batch, self.columns_S)

    def piecewise_linear(self, batch: Batch) -> Tensor:
        """Shape (B, P, T)."""
        return torch.addcmul(self.shift_T, self._of(batch, self.columns_P)[:, :, None], self.sign_T).clamp_(0.0, 1.0)

    def periodic(self, batch: Batch) -> Tensor:
        """Shape (B, Q, 2K)."""
        angles_BQK = 2 * math.pi * self._of(batch, self.columns_Q)[:, :, None] * self.frequencies_QK
        return torch.cat([angles_BQK.sin(), angles_BQK.cos()], 2)

    def _of(self, batch: Batch, columns: Tensor) -> Tensor:
        whole = columns.numel() == batch.numeric_BN.shape[1]
        return batch.numeric_BN if whole else batch.numeric_BN.index_select(1, columns)


class NumberVectors(nn.Module):
    """A vector per number: a learned linear map of its code, with a ReLU after a periodic one.

    A scalar x gives x·v.
    """

    columns_N: Tensor

    def __init__(self, schema: Schema, tables: Tables) -> None:
        super().__init__()
        self.codes = codes = NumberCodes(schema)
        width = tables.embedding_dim
        # A number whose scale nobody knows starts as small as an embedding row does.
        raw = [
            feature.transform == "none" and column == feature.name
            for feature in schema.numeric
            for column in feature.columns
        ]
        start = [tables.init_std if raw[column] else SCALAR_START for column in codes.order[: codes.num_scalar]]
        self.weight_ND = nn.Parameter(torch.randn(codes.num_scalar, width) * torch.tensor(start)[:, None])
        if codes.num_piecewise:
            self.piecewise_PTD = nn.Parameter(
                torch.randn(codes.num_piecewise, codes.num_components, width) * CODE_START
            )
            self.piecewise_bias_PD = nn.Parameter(torch.zeros(codes.num_piecewise, width))
        if codes.num_periodic:
            scale = (2 * FREQUENCIES) ** -0.5
            self.periodic_QKD = nn.Parameter(torch.randn(codes.num_periodic, 2 * FREQUENCIES, width) * scale)
            self.periodic_bias_QD = nn.Parameter(torch.zeros(codes.num_periodic, width))
        places = sorted(range(len(codes.order)), key=codes.order.__getitem__)
        self.register_buffer("columns_N", torch.tensor(places, dtype=torch.int64), persistent=False)
        self.in_order = places == codes.order == sorted(places)

    def forward(self, batch: Batch) -> Tensor:
        """Shape (B, N, D)."""
        codes = self.codes
        parts = []
        if codes.num_scalar:
            parts.append(codes.scalars(batch)[:, :, None] * self.weight_ND)
        if codes.num_piecewise:
            tokens_PBD = torch.bmm(codes.piecewise_linear(batch).transpose(0, 1), self.piecewise_PTD)
            parts.append(tokens_PBD.transpose(0, 1) + self.piecewise_bias_PD)
        if codes.num_periodic:
            tokens_QBD = torch.bmm(codes.periodic(batch).transpose(0, 1), self.periodic_QKD)
            parts.append((tokens_QBD.transpose(0, 1) + self.periodic_bias_QD).relu())
        tokens_BND = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return tokens_BND if self.in_order else tokens_BND.index_select(1, self.columns_N)
