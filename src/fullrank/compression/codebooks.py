"""Codes that point into a codebook of free values: one for each row, or one for each group of rows."""

# Shapes: R rows, D width, C codes, K groups, V values of all rows.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.embeddings.packed import Bits, Packing

ROUNDS = 20
CHUNK_NUMBERS = 1 << 18
GROUP_ROUNDS = 10


@dataclass(frozen=True)
class CodebookTable:
    """Rows whose codes are places in a codebook.

    Attributes:
        codes: uint8 (R, code_bytes), as `Packing` joins them.
        codebooks: fp16, (R, C), or (K, C) if rows share them.
        group_R: which codebook a row has; None if each has its own.
    """

    codes: Tensor
    codebooks: Tensor
    packing: Packing
    group_R: Tensor | None = None

    @property
    def nbytes(self) -> int:
        groups = 0 if self.group_R is None else self.group_R.nbytes
        return self.codes.nbytes + self.codebooks.nbytes + groups

    def dequantize(self, ids_N: Tensor | None = None) -> Tensor:
        """Float32 rows (N, D) of some ids, or of all."""
        ids_N = torch.arange(len(self.codes)) if ids_N is None else ids_N
        code_ND = self.packing.split_codes(self.codes.index_select(0, ids_N))
        places_N = ids_N if self.group_R is None else self.group_R.index_select(0, ids_N).long()
        return self.codebooks.index_select(0, places_N).float().gather(1, code_ND.long())

    def normalized_l2(self, weight_RD: Tensor) -> float:
        """Norm of the error over the norm of the weights; 0 where both are 0."""
        error = float(torch.linalg.vector_norm(self.dequantize() - weight_RD))
        return error / float(torch.linalg.vector_norm(weight_RD)) if error else 0.0


def row_codebooks(weight_RD: Tensor, bits: Bits = 4) -> CodebookTable:
    """k-means with 2**bits centroids on the numbers of each row, D bits / 8 + 2 * 2**bits bytes.

    Lloyd's algorithm from two starts: equally spaced over the range, and equally spaced among the distinct numbers in
    order, which is exact where there are no more of these than centroids. The better end is kept.

    Raises:
        ValueError: for 8 bits, whose codebook is larger than a row.
    """
    size = _codebook_size(bits)
    packing = Packing(weight_RD.shape[1], bits)
    codes, codebooks = [], []
    for rows_RD in torch.split(weight_RD, max(64, CHUNK_NUMBERS // packing.width)):
        sorted_RD = rows_RD.sort(1).values
        low_R, high_R = sorted_RD[:, :1], sorted_RD[:, -1:]
        spread_C = torch.linspace(0, 1, size)
        starts = (low_R + (high_R - low_R) * spread_C, _distinct(sorted_RD, size))
        best_RC = starts[0].half()
        best_R = torch.full((len(rows_RD),), torch.inf)
        for start_RC in starts:
            found_RC = _lloyd(sorted_RD, start_RC).half()
            error_RD = found_RC.float().gather(1, _nearest(sorted_RD, found_RC.float())) - sorted_RD
            loss_R = error_RD.square_().sum(1)
            best_RC = torch.where((loss_R < best_R)[:, None], found_RC, best_RC)
            best_R = torch.minimum(best_R, loss_R)
        codes.append(packing.join_codes(_nearest(rows_RD, best_RC.float()).to(torch.uint8)))
        codebooks.append(best_RC)
    return CodebookTable(torch.cat(codes), torch.cat(codebooks), packing)


def two_tier_codebooks(weight_RD: Tensor, bits: Bits = 4, groups: int | None = None) -> CodebookTable:
    """Rows in groups of similar mean, deviation, minimum and maximum; k-means on all numbers of a group.

    Deviation: the paper groups rows by their numbers; rows of equal range and deviation want the same codebook
    wherever their numbers lie.

    Args:
        groups: default a sixteenth of the rows, at which the codebooks cost two bytes a row and the numbers of the
            groups as much: the size of 4-bit codes with a scale and a bias.

    Raises:
        ValueError: for 8 bits.
    """
    size = _codebook_size(bits)
    packing = Packing(weight_RD.shape[1], bits)
    rows = len(weight_RD)
    groups = min(rows, groups or max(1, rows // 16))
    low_R, high_R = weight_RD.aminmax(dim=1)
    about_R4 = torch.stack([weight_RD.mean(1), weight_RD.std(1, correction=0), low_R, high_R], 1)
    about_R4 = (about_R4 - about_R4.mean(0)) / about_R4.std(0, correction=0).clamp_min(1e-12)
    group_R = _cluster(about_R4, groups)
    least_K = torch.full((groups,), torch.inf).scatter_reduce_(0, group_R, low_R, "amin").nan_to_num(posinf=0.0)
    most_K = torch.full((groups,), -torch.inf).scatter_reduce_(0, group_R, high_R, "amax").nan_to_num(neginf=0.0)
    codebook_KC = least_K[:, None] + (most_K - least_K)[:, None] * torch.linspace(0, 1, size)
    code_RD = torch.zeros_like(weight_RD, dtype=torch.int64)
    chunk = max(64, CHUNK_NUMBERS // packing.width)
    for last in [False] * ROUNDS + [True]:
        if last:
            codebook_KC = codebook_KC.half().float()
        sums_KC, counts_KC = torch.zeros_like(codebook_KC), torch.zeros_like(codebook_KC)
        for begin in range(0, rows, chunk):
            part = slice(begin, begin + chunk)
            code_RD[part] = _nearest(weight_RD[part], codebook_KC[group_R[part]])
            place = (group_R[part, None] * size + code_RD[part]).flatten()
            sums_KC.view(-1).index_add_(0, place, weight_RD[part].flatten())
            counts_KC.view(-1).index_add_(0, place, torch.ones(len(place)))
        if not last:
            mean_KC = sums_KC / counts_KC.clamp_min(1)
            codebook_KC = torch.where(counts_KC > 0, mean_KC, codebook_KC).sort(1).values
    small = torch.int16 if groups <= 1 << 15 else torch.int32
    joined = packing.join_codes(code_RD.to(torch.uint8))
    return CodebookTable(joined, codebook_KC.half(), packing, group_R.to(small))


def _codebook_size(bits: Bits) -> int:
    if bits == 8:
        raise ValueError("a codebook of 8 bits is larger than the rows it serves: use 2 or 4 bits, or another method")
    return 1 << bits


def _nearest(weight_RD: Tensor, codebook_RC: Tensor) -> Tensor:
    """Place of the nearest centroid, the codebooks being in order."""
    between_RC = (codebook_RC[:, 1:] + codebook_RC[:, :-1]) / 2
    return torch.searchsorted(between_RC.contiguous(), weight_RD.contiguous())


def _distinct(sorted_RD: Tensor, size: int) -> Tensor:
    """As many of the distinct numbers of sorted rows, equally spaced in their order; some twice if there are fewer."""
    number_RD = torch.nn.functional.pad((sorted_RD[:, 1:] != sorted_RD[:, :-1]).long(), (1, 0)).cumsum(1)
    wanted_RC = (torch.linspace(0, 1, size) * number_RD[:, -1:]).round_().long()
    return sorted_RD.gather(1, torch.searchsorted(number_RD, wanted_RC))


def _lloyd(sorted_RD: Tensor, centroid_RC: Tensor) -> Tensor:
    for _ in range(ROUNDS):
        code_RD = _nearest(sorted_RD, centroid_RC)
        sums_RC = torch.zeros_like(centroid_RC).scatter_add_(1, code_RD, sorted_RD)
        counts_RC = torch.zeros_like(centroid_RC).scatter_add_(1, code_RD, torch.ones_like(sorted_RD))
        moved_RC = torch.where(counts_RC > 0, sums_RC / counts_RC.clamp_min(1), centroid_RC).sort(1).values
        if bool((moved_RC == centroid_RC).all()):
            break
        centroid_RC = moved_RC
    return centroid_RC


def _cluster(about_RF: Tensor, groups: int) -> Tensor:
    """k-means of rows from rows drawn with a fixed seed; the group of each."""
    generator = torch.Generator().manual_seed(0)
    center_KF = about_RF[torch.randperm(len(about_RF), generator=generator)[:groups]]
    size = max(1, (CHUNK_NUMBERS << 4) // groups)
    group_R = torch.zeros(len(about_RF), dtype=torch.int64)
    for _ in range(GROUP_ROUNDS):
        half_K = center_KF.square().sum(1) / 2
        group_R = torch.cat([(part_RF @ center_KF.T - half_K).argmax(1) for part_RF in torch.split(about_RF, size)])
        sums_KF = torch.zeros_like(center_KF).index_add_(0, group_R, about_RF)
        counts_K = torch.bincount(group_R, minlength=groups)
        center_KF = torch.where(counts_K[:, None] > 0, sums_KF / counts_K.clamp_min(1)[:, None], center_KF)
    return group_R
