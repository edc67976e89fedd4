"""The greedy search of a range for each row."""

# Shapes: R rows, D width. Rows lie in columns, (D, R): what belongs to one row is then spread over long vectors.

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.compression.errors import WORTH_NUMBA, Loss, compiled_loss, compiled_sums, exact_loss
from fullrank.embeddings.packed import Packing

# Rows searched together: their numbers and two buffers stay in a core's cache.
CHUNK_NUMBERS = 1 << 18


def greedy(weight_RD: Tensor, packing: Packing, nbins: int = 200, ratio: float = 0.16) -> tuple[Tensor, Tensor]:
    """From the whole range of a row, step after step of a bin from whichever end costs less, until a share `ratio` of
    the bins is gone; the best of the ranges on the way from which both steps cost more, or the whole range if it is
    better.

    Rows are judged in float32, as PyTorch's `embedding_bag_4bit_prepack(..., optimized_qparams=True)` judges them, so
    the bytes are the same, but for one in a thousand of rows that are symmetric to the last bit. Most decisions do not
    hang on the last bits: a fast pass sums in any order and notes the rows where one did, and these are searched again
    with PyTorch's operations in PyTorch's order. With Numba a large table needs no such pass: the operations in
    PyTorch's order, compiled, are faster still.

    Returns:
        low_R, high_R.

    Source: Guan et al., Post-Training 4-bit Quantization on Embedding Tables, 2019, arXiv 1911.02079; details that its
    abstract does not have are PyTorch's.
    """
    low_R, high_R = weight_RD.new_empty(len(weight_RD)), weight_RD.new_empty(len(weight_RD))
    unsure_R = torch.zeros(len(weight_RD), dtype=torch.bool)
    size = max(64, CHUNK_NUMBERS // packing.width)
    compiled = weight_RD.numel() >= WORTH_NUMBA and compiled_sums() is not None
    for begin in range(0, len(weight_RD), size):
        part = slice(begin, begin + size)
        x_DR = weight_RD[part].T.contiguous()
        if compiled:
            low_R[part], high_R[part] = _search(x_DR, nbins, ratio, compiled_loss(x_DR, packing))
        else:
            loss = _fast_loss(x_DR, packing)
            low_R[part], high_R[part] = _search(x_DR, nbins, ratio, loss, unsure_R[part])
    for again in torch.split(unsure_R.nonzero().squeeze(1), size):
        x_DR = weight_RD.index_select(0, again).T.contiguous()
        low_R[again], high_R[again] = _search(x_DR, nbins, ratio, exact_loss(x_DR, packing))
    return low_R, high_R


def _fast_loss(x_DR: Tensor, packing: Packing) -> Loss:
    """The same up to rounding in half the time: errors in units of the scale, sums by a product with ones."""
    begin_R = x_DR.amin(0)
    from_begin_DR = x_DR - begin_R
    place_DR, code_DR = torch.empty_like(x_DR), torch.empty_like(x_DR)
    ones_D = x_DR.new_ones(len(x_DR))

    def loss(low_R: Tensor, high_R: Tensor) -> Tensor:
        scale_R, bias_R = packing.scale_and_bias(low_R, high_R)
        inverse_R = scale_R.reciprocal()
        torch.addcmul((begin_R - bias_R).mul_(inverse_R), from_begin_DR, inverse_R, out=place_DR)
        torch.clamp(place_DR, 0, packing.levels, out=code_DR)
        place_DR.sub_(code_DR.round_()).square_()
        return (ones_D @ place_DR).sqrt_().mul_(scale_R)

    return loss


def _search(
    x_DR: Tensor, nbins: int, ratio: float, loss: Loss, unsure_R: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """low_R, high_R; into `unsure_R` for which rows a fast loss cannot tell which of two was the smaller.

    A place among the levels is off by a part in 2**24 of their number, which moves the norm of the errors by as large a
    part of the range; its sum adds rounding of its own.
    """
    low_R, high_R = x_DR.amin(0), x_DR.amax(0)
    step_R = (high_R - low_R) / nbins
    off, off_R = 2.0**-23 * len(x_DR) ** 0.5, 2.0**-23 * (high_R - low_R)
    narrowest_R = int(nbins * (1.0 - float(torch.tensor(ratio)))) * step_R
    best_low_R, best_high_R = low_R, high_R
    now_R = loss(low_R, high_R)
    best_R = now_R
    for _ in range(nbins):  # a step that is lost in rounding changes nothing: PyTorch's search never ends on such rows
        goes_on_R = low_R + narrowest_R < high_R
        if not bool(goes_on_R.any()):
            break
        all_go_on = bool(goes_on_R.all())
        left_R, right_R = loss(low_R + step_R, high_R), loss(low_R, high_R - step_R)
        least_R = torch.minimum(left_R, right_R)
        is_best_R = now_R < torch.minimum(least_R, best_R)
        if unsure_R is not None:
            closest_R = torch.minimum((left_R - right_R).abs_(), (least_R - now_R).abs_())
            if best_R is not now_R:  # at the first step they are the same
                closest_R = torch.minimum(closest_R, (best_R - now_R).abs_())
            unsure_R |= closest_R <= torch.add(off_R, now_R, alpha=off)
        if not all_go_on:
            is_best_R &= goes_on_R
        best_R = torch.where(is_best_R, now_R, best_R)
        best_low_R, best_high_R = torch.where(is_best_R, low_R, best_low_R), torch.where(is_best_R, high_R, best_high_R)
        # 1 where the lower end moves, 0 where the upper one does; products with it are exact.
        to_left_R = (left_R < right_R).float()
        to_right_R = 1 - to_left_R
        if not all_go_on:
            least_R = torch.where(goes_on_R, least_R, now_R)
            to_left_R, to_right_R = to_left_R * goes_on_R, to_right_R * goes_on_R
        low_R, high_R = low_R.addcmul(step_R, to_left_R), high_R.addcmul(step_R, to_right_R, value=-1)
        now_R = least_R
    return best_low_R, best_high_R
