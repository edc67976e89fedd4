"""The largest inner products among all rows of a matrix, without holding all scores and, where it pays, in bfloat16."""

# Shapes: B queries, I rows, D width, K results, G groups of rows, C groups chosen, M rows of the chosen groups.

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Scores held at once: 4M floats are 16 MB, about what a laptop's last-level cache takes.
SCORES_AT_ONCE = 4_000_000

# Rows of a product by groups, and rows of a group: 0.9 ms of CPU a query for 1M x 64 in bfloat16 in batches of 64,
# within a tenth for halves and doubles of either; whole rows of scores and their selection took 4.8.
BLOCK, GROUP = 16_384, 16

_HALVES, _NAMES = "halves.safetensors", ("half", "norm", "lost")

# Below so many rows, whole rows of scores are cheaper than groups.
GROUPS_FROM = 20_000


def fast_bfloat16() -> bool:
    """Whether this processor multiplies matrices in bfloat16 by itself; others imitate it, slowly."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Scan:
    """Rows that are searched by scoring all of them.

    Batches of queries go by groups: the largest score of every 16 rows is kept, the groups whose largest score may be
    among the k best are scored again in float32, and a bound on the error of the first product says whether any other
    group could have held one of them. Queries for which the bound leaves that open are done without a bound, so that
    bfloat16 costs nothing but its copy of the vectors, made at the first batch.

    Args:
        vectors_ID: float32.
        bfloat16: whether the first product may be in bfloat16; default whether the processor is good at it.
    """

    def __init__(self, vectors_ID: Tensor, *, bfloat16: bool | None = None) -> None:
        self.vectors_ID = vectors_ID
        self.bfloat16 = bfloat16
        self._halves: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, queries_BD: Tensor, k: int, allowed_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k largest scores of each query and their places, largest first, ties by smaller place.

        Args:
            allowed_I: rows that may be returned; others score -inf, and come last if there are fewer than k.
        """
        rows, count = queries_BD.shape[0], self.vectors_ID.shape[0]
        if rows < 2 or count < max(GROUPS_FROM, 8 * GROUP * k):
            return self._whole(queries_BD, k, allowed_I)
        return self._grouped(queries_BD, k, allowed_I)

    def _whole(self, queries_BD: Tensor, k: int, allowed_I: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, count = queries_BD.shape[0], self.vectors_ID.shape[0]
        block = max(k, SCORES_AT_ONCE // max(rows, 1))
        places_BK = torch.zeros((rows, 0), dtype=torch.int64)
        scores_BK = torch.zeros((rows, 0))
        for begin in range(0, count, block):
            scores_BI = queries_BD @ self.vectors_ID[begin : begin + block].T
            if allowed_I is not None:
                scores_BI = scores_BI.masked_fill(~allowed_I[begin : begin + block], -torch.inf)
            best_BK, place_BK = top_k(scores_BI, k)
            if begin:
                # Earlier blocks stand first, so that a stable choice keeps their smaller places.
                best_BK, place_BK = torch.cat([scores_BK, best_BK], 1), torch.cat([places_BK, place_BK + begin], 1)
                scores_BK, order_BK = top_k(best_BK, k)
                places_BK = place_BK.gather(1, order_BK)
            else:
                scores_BK, places_BK = best_BK, place_BK
        return scores_BK, places_BK

    def _grouped(self, queries_BD: Tensor, k: int, allowed_I: Tensor | None) -> tuple[Tensor, Tensor]:
        halves = self.halves()
        largest_BG = self._largest(queries_BD, allowed_I, None if halves is None else halves[0])
        unit_B1 = queries_BD.norm(dim=1, keepdim=True)
        if halves is None:
            # Two products of the same float32 numbers, summed in different orders.
            chosen, norm, lost = k + 16, self.vectors_ID.norm(dim=1).max(), torch.zeros(())
            largest_BG = largest_BG + 2 * queries_BD.shape[1] * 2**-24 * norm * unit_B1
        else:
            chosen = 2 * k + 16
            half_BD = queries_BD.bfloat16().float()
            error_B1 = (queries_BD - half_BD).norm(dim=1, keepdim=True) + queries_BD.shape[1] * 2**-23 * unit_B1
            _, norm, lost = halves
            # |u·v - u'·v'| <= |u-u'||v| + |u'||v-v'|, and the product itself is rounded to 8 bits.
            largest_BG = torch.maximum(largest_BG * (1 + 2**-8), largest_BG * (1 - 2**-8))
            largest_BG = largest_BG.addcmul_(error_B1, norm).addcmul_(half_BD.norm(dim=1, keepdim=True), lost)
        bound_BC, group_BC = largest_BG.topk(chosen + 1, dim=1)
        place_BM = self._members(group_BC[:, :-1])
        scores_BK, places_BK = self.score(queries_BD, place_BM, k, allowed_I)
        # Equal scores outside of the chosen groups may have smaller places: open as well.
        open_B = ~(scores_BK[:, -1] > bound_BC[:, -1])
        if bool(open_B.any()):
            scores_BK[open_B], places_BK[open_B] = self._whole(queries_BD[open_B], k, allowed_I)
        return scores_BK, places_BK

    def _largest(self, queries_BD: Tensor, allowed_I: Tensor | None, half_ID: Tensor | None) -> Tensor:
        """The largest score of each group, float32; -inf where a group has no row."""
        parts = []
        queries_BD = queries_BD if half_ID is None else queries_BD.bfloat16()
        vectors_ID = self.vectors_ID if half_ID is None else half_ID
        for begin in range(0, vectors_ID.shape[0], BLOCK):
            scores_BI = (queries_BD @ vectors_ID[begin : begin + BLOCK].T).float()
            if allowed_I is not None:
                scores_BI = scores_BI.masked_fill(~allowed_I[begin : begin + BLOCK], -torch.inf)
            parts.append(_by_group(scores_BI).amax(1))
        return torch.cat(parts, 1)

    def _members(self, group_BC: Tensor) -> Tensor:
        """Rows of groups, -1 where a group has fewer; group g of a block has its rows g, g + groups, ..."""
        count, groups = self.vectors_ID.shape[0], BLOCK // GROUP
        last = count // BLOCK * BLOCK
        block_BC = group_BC // groups * BLOCK
        step_BC = torch.where(block_BC == last, -(-(count - last) // GROUP), groups)
        place_BCM = (block_BC + group_BC % groups)[:, :, None] + step_BC[:, :, None] * torch.arange(GROUP)
        return place_BCM.flatten(1).masked_fill(place_BCM.flatten(1) >= count, -1)

    def score(
        self, queries_BD: Tensor, place_BM: Tensor, k: int, allowed_I: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`__call__` among some rows of each query, in any order and any number of times; none where -1.

        What is not there, or not allowed, scores -inf.
        """
        if not self.vectors_ID.shape[0]:
            place_BM = place_BM[:, :0]
        place_BM = torch.from_numpy(np.sort(place_BM.numpy(), axis=1))
        none_BM = place_BM < 0
        none_BM[:, 1:] |= place_BM[:, 1:] == place_BM[:, :-1]
        place_BM = place_BM.clamp_min(0)
        if allowed_I is not None:
            none_BM |= ~allowed_I[place_BM]
        pairs = zip(queries_BD, place_BM, strict=True)
        scores = [self.vectors_ID.index_select(0, place_M) @ query_D for query_D, place_M in pairs]
        scores_BM = torch.stack(scores) if scores else torch.zeros(place_BM.shape)
        scores_BK, best_BK = top_k(scores_BM.masked_fill(none_BM, -torch.inf), k)
        return scores_BK, place_BM.gather(1, best_BK)

    def halves(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Vectors in bfloat16, and by group the largest norm and the largest norm of what rounding took away."""
        if not (fast_bfloat16() if self.bfloat16 is None else self.bfloat16):
            return None
        if self._halves is None:
            half_ID = self.vectors_ID.bfloat16()
            norm_G, lost_G = [], []
            for begin in range(0, half_ID.shape[0], BLOCK):
                rows_ID = self.vectors_ID[begin : begin + BLOCK]
                lost_ID = rows_ID - half_ID[begin : begin + BLOCK].float()
                norm_G.append(_by_group(rows_ID.norm(dim=1)[None])[0].amax(0))
                lost_G.append(_by_group(lost_ID.norm(dim=1)[None])[0].amax(0))
            self._halves = half_ID, torch.cat(norm_G)[None], torch.cat(lost_G)[None]
        return self._halves

    def write_halves(self, directory: Path) -> None:
        """Write what `map_halves` maps, if bfloat16 is used."""
        halves = self.halves()
        if halves is not None:
            save_file(dict(zip(_NAMES, halves, strict=True)), directory / _HALVES)

    def map_halves(self, directory: Path) -> None:
        """Have `halves` mapped from where another process wrote them, instead of made."""
        if (directory / _HALVES).is_file():
            tensors = load_file(directory / _HALVES)
            self._halves = tensors["half"], tensors["norm"], tensors["lost"]


def _by_group(scores_BI: Tensor) -> Tensor:
    """Scores of a block as (B, rows of a group, groups): the maximum over the middle runs along memory."""
    rows, count = scores_BI.shape
    groups = -(-count // GROUP)
    if groups * GROUP > count:
        scores_BI = torch.nn.functional.pad(scores_BI, (0, groups * GROUP - count), value=-torch.inf)
    return scores_BI.view(rows, GROUP, groups)


def top_k(scores_BI: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row and their places, largest first, ties by smaller place; all if k is larger."""
    rows, count = scores_BI.shape
    k = min(k, count)
    if rows == 1 and count > SORT_ALL_BELOW and k * SAMPLE_EVERY <= count:
        found = _top_k_of_one(scores_BI[0], k)
        if found is not None:
            return found
    if count <= SORT_ALL_BELOW:
        large = rows * count > FEW and scores_BI.dtype == torch.float32 and scores_BI.device.type == "cpu"
        if large and not bool(scores_BI.isnan().any()):
            place_BK = _first_places(scores_BI, k)
            return scores_BI.gather(1, place_BK), place_BK
        sorted_BI, place_BI = scores_BI.sort(dim=1, descending=True, stable=True)
        return sorted_BI[:, :k], place_BI[:, :k]
    scores_BK, place_BK = scores_BI.topk(k, dim=1)
    # topk leaves open which of several equal scores it takes. Rows that tie at the k-th score choose again.
    if 0 < k < count:
        tied_B = (scores_BI >= scores_BK[:, -1:]).sum(1) > k
        for row in tied_B.nonzero().squeeze(1).tolist():
            place_BK[row] = torch.sort(scores_BI[row], descending=True, stable=True).indices[:k]
    place_BK = place_BK.sort(dim=1).values
    scores_BK, order_BK = scores_BI.gather(1, place_BK).sort(dim=1, descending=True, stable=True)
    return scores_BK, place_BK.gather(1, order_BK)


# Up to here one stable sort is cheaper than a selection and the check for ties that it needs.
SORT_ALL_BELOW = 4096
# Scores up to which PyTorch's sort is not slower.
FEW = 1500
SAMPLE_EVERY = 16


def _first_places(scores_BI: Tensor, k: int) -> Tensor:
    """Places of the k largest, largest first, ties by smaller place.

    A float32's bits, those below the sign turned over where it is set, are an integer of the same order. With the place
    in the lower half of 64 bits no two are equal, and NumPy sorts integers with vector instructions, ten times faster
    than a stable sort of floats.
    """
    last = scores_BI.shape[1] - 1
    bits_BI = (scores_BI + 0.0).numpy().view(np.int32)  # -0.0 is 0.0
    keys_BI = (bits_BI ^ ((bits_BI >> 31) & 0x7FFFFFFF)).astype(np.int64) << 32
    keys_BI |= np.arange(last, -1, -1)
    keys_BI.sort(axis=1)
    return torch.from_numpy(last - (keys_BI[:, : -k - 1 : -1] & 0xFFFFFFFF))


def _top_k_of_one(scores_I: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """`top_k` of one long row: a bar read off every 16th score leaves few to sort, three times faster than a selection
    among all. None if the bar was too high (fewer than k reach it) or so low that nothing is gained."""
    sample = scores_I[::SAMPLE_EVERY]
    # Four standard deviations above the expected rank of the k-th score in the sample.
    rank = min(sample.numel(), math.ceil(k / SAMPLE_EVERY + 4 * math.sqrt(k / SAMPLE_EVERY) + 4))
    bar = sample.topk(rank).values[-1]
    place = (scores_I >= bar).nonzero().squeeze(1)
    if not k <= place.numel() <= scores_I.numel() // 4:
        return None
    scores, order = scores_I[place].sort(descending=True, stable=True)
    return scores[None, :k], place[order[:k]][None]
