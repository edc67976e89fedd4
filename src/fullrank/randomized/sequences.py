"""Points that fill the unit cube evenly: scrambled nets, Halton points, rank-1 lattices, digitally shifted nets."""

# Shapes: s points, d dimensions.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from fullrank.randomized.blocks import Array

UNIFORM = ("sobol", "halton", "lattice", "digital_net", "mc")
BASE_2 = ("sobol", "lattice", "digital_net")
SOBOL_DIMENSIONS = qmc.Sobol.MAXDIM
# The inverse distribution function of a point on the cube's face is infinite.
EDGE = 1e-12


def uniform_points(sequence: str, s: int, d: int, rng: np.random.Generator, *, scramble: bool = True) -> Array:
    """`s` points of the open unit cube.

    Args:
        sequence: "sobol" (matrix scramble and digital shift), "halton" (permuted digits), "lattice" (rank 1, generating
            vector by component-by-component search, random shift), "digital_net" (Sobol's matrices, digital shift
            only) or "mc" (independent points).
        scramble: randomise; each point is then uniform in the cube, so that means over the points are unbiased. "mc" is
            always random.

    Returns:
        Shape (s, d), float64, within [1e-12, 1 - 1e-12].

    Raises:
        ValueError: for an unknown sequence, a base-2 sequence whose `s` is no power of two, or more than 21,201
            dimensions of a Sobol sequence or digital net.

    Source: Avron et al., Quasi-Monte Carlo Feature Maps for Shift-Invariant Kernels, arXiv 1412.8293, section 3.
    Deviation: the authors skip and leap through Halton and Sobol sequences; a leap destroys the balance of a net, so
    the points here are the first s.
    """
    if sequence not in UNIFORM:
        raise ValueError(f'sequence is "{sequence}", expected one of {", ".join(UNIFORM)}')
    if sequence in BASE_2 and s & (s - 1):
        raise ValueError(f'sequence "{sequence}" needs a power of two as number of points, got {s}')
    if sequence in ("sobol", "digital_net") and d > SOBOL_DIMENSIONS:
        raise ValueError(f'sequence "{sequence}" has at most {SOBOL_DIMENSIONS} dimensions, got {d}')
    if sequence == "mc":
        points = rng.random((s, d))
    elif sequence == "halton":
        points = qmc.Halton(d, scramble=scramble, rng=rng).random(s + (not scramble))[int(not scramble) :]
    elif sequence == "lattice":
        points = np.outer(np.arange(s), lattice_generator(s, d)) % s / s
        # Unshifted coordinates are multiples of 1/s: the middle of their cells keeps them off the face.
        points = (points + (rng.random(d) if scramble else 0.5 / s)) % 1
    else:
        net = qmc.Sobol(d, scramble=scramble and sequence == "sobol", rng=rng)
        points = net.random_base2(s.bit_length() - 1)
        if sequence == "digital_net" and scramble:
            bits = 52
            shift = rng.integers(1 << bits, size=d)
            points = ((points * 2.0**bits).astype(np.int64) ^ shift) * 2.0**-bits
        elif not scramble:
            points = points + 0.5 / s
    return np.clip(points, EDGE, 1 - EDGE)


def lattice_generator(s: int, d: int) -> NDArray[np.int64]:
    """Generating vector of a rank-1 lattice of `s` (a power of two) points in `d` dimensions, shape (d,), odd integers.

    Each component minimises the worst-case error P2 of the lattice so far, with product weights 1/j^2. Modulo sign,
    the odd residues of 2^m are the powers of 5: over them the error of all candidates is a sum of cyclic correlations,
    one for each power of two dividing the point's index, so a component costs O(s log s).

    Source: Nuyens and Cools, Fast component-by-component construction of rank-1 lattice rules with a non-prime number
    of points, Journal of Complexity 2006.
    Deviation: a component is not chosen twice, nor its negative, while others are left. Small weights would otherwise
    make late coordinates equal, which integrates well and approximates kernels badly.
    """
    if s < 8:
        return np.ones(d, dtype=np.int64)
    powers = np.ones(s // 4, dtype=np.int64)
    for k in range(1, len(powers)):
        powers[k] = powers[k - 1] * 5 % s
    levels = []
    modulus = s
    while modulus >= 4:
        residues = powers[: modulus // 4] % modulus
        stride = s // modulus
        spectrum = np.fft.rfft(_bernoulli(residues / modulus))
        levels.append((stride * residues, stride * (modulus - residues), spectrum))
        modulus //= 2
    index = np.arange(s)
    product = np.ones(s)
    used = np.zeros(len(powers), dtype=bool)
    generator = np.empty(d, dtype=np.int64)
    for j in range(d):
        error = np.zeros(len(powers))
        for positive, negative, spectrum in levels:
            folded = product[positive] + product[negative]
            period = len(folded)
            error.reshape(-1, period)[:] += np.fft.irfft(np.conj(np.fft.rfft(folded)) * spectrum, period)
        if used.all():
            used[:] = False
        error[used] = np.inf
        best = int(np.argmin(error))
        used[best] = True
        generator[j] = powers[best]
        product *= 1 + _bernoulli(index * generator[j] % s / s) / (j + 1) ** 2
        product /= np.abs(product).max()
    return generator


def _bernoulli(x: Array) -> Array:
    """2 pi^2 B_2(x), the kernel of the worst-case error of smoothness 1."""
    value: Array = 2 * np.pi**2 * (x * (x - 1) + 1 / 6)
    return value
