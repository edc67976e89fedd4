"""Box discrepancy: how far the characteristic function of a set of frequencies is from a normal one."""

# Shapes: s frequencies, d dimensions.

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import erf, wofz

from fullrank.randomized.blocks import Array
from fullrank.randomized.parameters import per_column

# Rows of frequency pairs are taken in blocks whose (d, rows, s) arrays fit into a core's cache.
BLOCK = 1 << 17


def box_discrepancy(W: ArrayLike, box: ArrayLike, scale: ArrayLike) -> float:
    """Mean over u uniform in the box of |E exp(-iu'w) - (1/s) sum_l exp(-iu'w_l)|^2, in closed form.

    The expectation is over w_j normal with deviation 1/scale_j, so its value is the Gaussian kernel
    exp(-sum_j u_j^2 / (2 scale_j^2)): this is the mean square error of the kernel that the frequencies give, over
    differences in the box.

    Args:
        W: frequencies, shape (d, s).
        box: half-widths |u_j| <= box_j, scalar or shape (d,), positive.
        scale: of the kernel, scalar or shape (d,), positive; 1/sqrt(2 gamma).

    Raises:
        ValueError: if a shape differs, or a half-width or scale is not positive and finite.

    Source: Avron et al., arXiv 1412.8293, theorem on the box discrepancy of the Gaussian kernel.
    Deviation: the paper's D^2 is this times prod_j box_j / pi^d, which underflows in a few dozen dimensions.
    """
    return _value(*_standardised(W, box, scale), gradient=False)[0]


def box_discrepancy_gradient(W: ArrayLike, box: ArrayLike, scale: ArrayLike) -> tuple[float, Array]:
    """`box_discrepancy` and its gradient, shape (d, s)."""
    scale_d = np.asarray(scale, dtype=np.float64)
    value, gradient = _value(*_standardised(W, box, scale), gradient=True)
    return value, gradient * (scale_d[:, None] if scale_d.ndim else scale_d)


def target_products(W: Array, box: Array, *, gradient: bool) -> tuple[Array, Array]:
    """What the box discrepancy credits each frequency with, for unit scale.

    c_l = prod_j c_lj, the mean over the box of exp(-|u|^2/2) cos(u'w_l), shape (s,), and its derivatives by w_lj, shape
    (d, s) (empty unless asked for). exp(-y^2) Re erf(x + iy) is written by the Faddeeva function, which does not
    overflow for large frequencies.
    """
    b = box[:, None]
    x, y = b / np.sqrt(2), W / np.sqrt(2)
    damped = np.exp(-(y**2)) - (np.exp(-(x**2) - 2j * x * y) * wofz(1j * x - y)).real
    c = np.sqrt(np.pi / 2) / b * damped
    if not gradient:
        return np.prod(c, axis=0), np.empty((0, 0))
    slope = -W * c + np.exp(-(b**2) / 2) * np.sin(b * W) / b
    others, product = _leave_one_out(c)
    return product, slope * others


def pair_products(left: Array, right: Array, box: Array) -> tuple[Array, Array]:
    """h = prod_j sin(b_j (w_j - w'_j)) / (b_j (w_j - w'_j)) of frequencies (d, k) and (d, s), shape (k, s), and the sum
    over the s frequencies of its derivatives by the left one, shape (d, k)."""
    b = box[:, None, None]
    x = b * (left[:, :, None] - right[:, None, :])
    close = np.abs(x) < 1e-4
    safe = np.where(close, 1.0, x)
    sinc = np.sin(safe)
    sinc /= safe
    slope = np.cos(safe)
    slope -= sinc
    slope /= safe
    # The derivative is the difference of two numbers near 1: near zero its series is exact to rounding.
    sinc[close] = 1 - x[close] ** 2 / 6
    slope[close] = -x[close] / 3
    others, product = _leave_one_out(sinc)
    return product, box[:, None] * np.einsum("dks,dks->dk", slope, others)


def _standardised(W: ArrayLike, box: ArrayLike, scale: ArrayLike) -> tuple[Array, Array]:
    """Frequencies and half-widths in units of the kernel's scale."""
    W = np.asarray(W, dtype=np.float64)
    if W.ndim != 2 or W.size == 0:
        raise ValueError(f"frequencies have shape {W.shape}, expected (d, s)")
    columns = []
    for name, values in (("box", box), ("scale", scale)):
        columns.append(np.broadcast_to(per_column(name, values, len(W)), (len(W),)))
    return W * columns[1][:, None], columns[0] / columns[1]


def _value(W: Array, box: Array, *, gradient: bool) -> tuple[float, Array]:
    """For unit scale."""
    d, s = W.shape
    target, target_slope = target_products(W, box, gradient=gradient)
    total = float(np.prod(np.sqrt(np.pi) / (2 * box) * erf(box))) - 2 * float(target.mean())
    pairs = 0.0
    slope = np.empty((d, s) if gradient else (0, 0))
    rows = max(1, BLOCK // (d * s))
    for start in range(0, s, rows):
        block = W[:, start : start + rows]
        if gradient:
            product, slope[:, start : start + rows] = pair_products(block, W, box)
            pairs += float(product.sum())
        else:
            scaled = box[:, None, None] / np.pi * (block[:, :, None] - W[:, None, :])
            pairs += float(np.prod(np.sinc(scaled), axis=0).sum())
    value = total + pairs / s**2
    return value, 2 / s**2 * slope - 2 / s * target_slope if gradient else slope


def _leave_one_out(factors: Array) -> tuple[Array, Array]:
    """Products over all but each entry of the first axis, exact where factors are zero, and over all of them."""
    d = len(factors)
    others = np.empty_like(factors)
    others[0] = 1
    np.multiply.accumulate(factors[:-1], axis=0, out=others[1:])
    after = factors[-1].copy()
    product = others[-1] * after
    for j in range(d - 2, -1, -1):
        others[j] *= after
        after *= factors[j]
    return others, product
