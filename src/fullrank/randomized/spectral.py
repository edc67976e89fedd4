"""Shift-invariant kernels and their spectral distributions: k(u) = E cos(u'w)."""

# Shapes: P differences, s frequencies, d dimensions.

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.special import gammaincinv, gammaln, kve, ndtri

from fullrank.randomized.blocks import Array, squared
from fullrank.randomized.sequences import uniform_points

KERNELS = ("rbf", "laplacian", "matern")
# Pairs at once: their phases stay in a core's cache between the product and the cosines.
PAIR_BLOCK = 512


def kernel_values(U: Array | sparse.csr_array, kernel: str, gamma: Array | float, nu: float) -> Array:
    """k(u) of each difference u = x - x'.

    Args:
        U: shape (P, d), dense or CSR.
        kernel: "rbf", exp(-sum_j gamma_j u_j^2); "laplacian", exp(-sum_j gamma_j |u_j|); "matern", of smoothness `nu`
            and length scale 1/sqrt(2 gamma_j), whose limit for large `nu` is "rbf".
        gamma: scalar or shape (d,), positive.
        nu: positive; of "matern" only.

    Returns:
        Shape (P,).
    """
    gamma_d = np.broadcast_to(np.asarray(gamma, dtype=np.float64), (U.shape[1],))
    if kernel == "laplacian":
        return np.asarray(np.exp(-np.asarray(abs(U) @ gamma_d)))
    distance = np.asarray(squared(U) @ gamma_d)
    if kernel == "rbf":
        return np.asarray(np.exp(-distance))
    z = 2 * np.sqrt(nu * distance)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_k = (1 - nu) * np.log(2) - gammaln(nu) + nu * np.log(z) + np.log(kve(nu, z)) - z
    # Below this argument the Bessel function overflows and the kernel is 1 to rounding.
    return np.where(z > 1e-12, np.exp(np.where(z > 1e-12, log_k, 0.0)), 1.0)


def spectral_frequencies(
    kernel: str,
    gamma: Array | float,
    nu: float,
    sequence: str,
    s: int,
    d: int,
    rng: np.random.Generator,
    *,
    scramble: bool = True,
) -> Array:
    """Frequencies that represent the kernel's spectral distribution: points of a sequence through its inverse.

    Args:
        kernel, gamma, nu: see `kernel_values`.
        sequence: one of `uniform_points`, or "orthogonal": directions orthogonal within blocks of d.
        s: number of frequencies.

    Returns:
        Shape (d, s), float64.

    Raises:
        ValueError: as `uniform_points`, and for "orthogonal" with the Laplacian kernel, which is not isotropic.

    Sources: arXiv 1412.8293, section 2; "orthogonal": Yu et al., Orthogonal Random Features, NIPS 2016.
    Deviation: the Matern kernel, which the paper does not have, is a multivariate t distribution: one more coordinate
    of the sequence is its chi-square radius.
    """
    if sequence == "orthogonal":
        if kernel == "laplacian":
            raise ValueError('sequence "orthogonal" needs an isotropic kernel, "laplacian" is a product of coordinates')
        normal, radius = _orthogonal(s, d, rng), rng.random((s, 1))
    else:
        points = uniform_points(sequence, s, d + (kernel == "matern"), rng, scramble=scramble)
        if kernel == "laplacian":
            return (np.tan(np.pi * (points - 0.5)) * gamma).T
        normal, radius = ndtri(points[:, :d]), points[:, d:]
    if kernel == "matern":
        normal = normal / np.sqrt(gammaincinv(nu, radius) / nu)
    return np.asarray(normal * np.sqrt(2 * np.asarray(gamma))).T


def mean_cosines(U: Array | sparse.csr_array, W: Array) -> Array:
    """mean_l cos(u'w_l), shape (P,): the kernel that frequencies (d, s) give to differences (P, d)."""
    starts = range(0, U.shape[0], PAIR_BLOCK)
    return np.concatenate([np.cos(U[start : start + PAIR_BLOCK] @ W).mean(axis=1) for start in starts])


def _orthogonal(s: int, d: int, rng: np.random.Generator) -> Array:
    """s standard normal vectors, those of each block of d orthogonal, shape (s, d)."""
    blocks = []
    for _ in range(-(-s // d)):
        Q, R = np.linalg.qr(rng.standard_normal((d, d)))
        blocks.append((Q * np.sign(np.diag(R))).T)
    return np.concatenate(blocks)[:s] * np.sqrt(rng.chisquare(d, (s, 1)))
