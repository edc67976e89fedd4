"""Random matrices S with few rows, applied to a table block by block: S A is a sum over blocks of rows.

Column i of S, what row i of the table is multiplied by, is a function of (seed, stream, i) only, through a
counter-based generator. So S A does not depend on blocks, fragments or workers, and a task that is run again gives the
same numbers.

    SA = sketch(A, 400, random_state=0)              # in memory, Parquet, Dask
    S = Sketch("sparse_sign", 400, seed=0)
    S.apply(A[:1000]) + S.apply(A[1000:], start=1000)  # the same

| kind | column of S | preserves | cost of S A |
| --- | --- | --- | --- |
| sparse_sign | nnz signs / sqrt(nnz), one in each of nnz stripes | l2 | nnz * nnz(A) |
| countsketch | one sign | l2 | nnz(A) |
| gaussian, rademacher | all entries N(0, 1/size), or +-1/sqrt(size) | l2 | size * nnz(A) |
| srht | rows of a randomly signed Hartley transform | l2 | n d log n in memory, else size * n d |
| sparse_cauchy | one Cauchy variable | l1 (up to distortion) | nnz(A) |
| exponential | one sign * Exp(1) ** (-1/p) | lp (up to distortion) | nnz(A) |
| cauchy | all entries Cauchy | l1 (up to distortion) | size * nnz(A) |

Sources: Clarkson and Woodruff 2013 (countsketch), Nelson and Nguyen 2013 (sparse_sign), Meng and Mahoney 2013
(sparse_cauchy), Woodruff and Zhang 2013 (exponential), Yang, Meng and Mahoney, arXiv 1305.0087 and 1502.03032.

Deviation: arXiv 1502.03032 uses countsketch throughout. Here sparse_sign with four entries is the default: two rows of
leverage one that fall into one bucket of a countsketch of 20 d rows ruin the conditioner, and on the paper's own NB
matrix they did so for one seed in three.
"""

# Shapes: n rows, d columns, m rows of the sketch, k rows of a block.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.fft
import scipy.sparse as sp
from numpy.typing import NDArray

from fullrank.randomized.blocks import Array, Block
from fullrank.randomized.engine import Executor, map_reduce
from fullrank.randomized.parameters import check, one_of, random_seed
from fullrank.randomized.sources import ArraySource, as_source

KINDS = (
    "sparse_sign",
    "countsketch",
    "gaussian",
    "rademacher",
    "srht",
    "sparse_cauchy",
    "exponential",
    "cauchy",
)
_SPARSE = ("sparse_sign", "countsketch", "sparse_cauchy", "exponential")
_CHUNK = 1024  # rows for which the dense kinds draw together


@dataclass(frozen=True)
class Sketch:
    """A random matrix of shape (size, n), drawn column by column when it is applied.

    Args:
        kind: one of `KINDS`.
        size: rows of S.
        seed: of the generator.
        nnz: non-zeros in a column of sparse_sign.
        n_rows: rows of the table; only srht needs it.
        p: of the exponential embedding, in [1, 2].
        stream: sketches with one seed and different streams are independent.

    Raises:
        ValueError: unknown kind, size < 1, nnz outside [1, size], p outside [1, 2], srht without n_rows.
    """

    kind: str
    size: int
    seed: int = 0
    nnz: int = 4
    n_rows: int | None = None
    p: float = 1.0
    stream: int = 0

    def __post_init__(self) -> None:
        check("sketch", self.kind, one_of(*KINDS))
        if self.size < 1:
            raise ValueError(f"size of the sketch is {self.size}, expected at least 1")
        if self.kind == "sparse_sign" and not 1 <= self.nnz <= self.size:
            raise ValueError(f"nnz is {self.nnz}, expected 1 to size = {self.size}")
        if not 1 <= self.p <= 2:
            raise ValueError(f"p is {self.p}, expected 1 to 2")
        if self.kind == "srht" and self.n_rows is None:
            raise ValueError("srht needs n_rows, the number of rows of the table")

    def matrix(self, start: int, stop: int) -> Any:
        """Columns start to stop of S, shape (size, stop - start): CSC for the sparse kinds, else dense."""
        if self.kind in _SPARSE:
            targets, values = self._sparse_columns(start, stop)
            indptr = np.arange(0, targets.size + 1, targets.shape[1], dtype=np.int32)
            return sp.csc_array((values.ravel(), targets.ravel(), indptr), shape=(self.size, stop - start))
        if self.kind == "srht":
            return self._hartley_columns(start, stop)
        chunks = range(start // _CHUNK, -(-stop // _CHUNK))
        drawn = np.hstack([self._dense_chunk(chunk) for chunk in chunks])
        return drawn[:, start - chunks.start * _CHUNK :][:, : stop - start]

    def apply(self, X: Any, start: int = 0) -> Array:
        """S[:, start : start + k] @ X for rows X, (k, d) dense or sparse, or (k,); shape (size, d) or (size,)."""
        if self.kind == "srht" and X.shape[0] == self.n_rows and not sp.issparse(X):
            return self._fast_hartley(X)
        return _multiply(self.matrix(start, start + X.shape[0]), X)

    def _sparse_columns(self, start: int, stop: int) -> tuple[NDArray[np.int32], Array]:
        """Row indices and values of the non-zeros, both (k, entries of a column)."""
        if self.kind in ("sparse_sign", "countsketch"):
            entries = self.nnz if self.kind == "sparse_sign" else 1
            # 32 random bits an entry: 31 choose the row, one the sign.
            halves = row_words(self.seed, start, stop, -(-entries // 2), self.stream).view(np.uint32)[:, :entries]
            bounds = np.arange(entries + 1) * self.size // entries
            signs = 1 - 2 * (halves & np.uint32(1)).astype(np.float64)
            return _within(halves >> np.uint32(1), bounds), signs / np.sqrt(entries)
        words = row_words(self.seed, start, stop, 2, self.stream)
        halves = (words[:, :1] >> np.uint64(32)).astype(np.uint32)
        targets = _within(halves >> np.uint32(1), np.array([0, self.size]))
        uniform = as_uniform(words[:, 1:])
        if self.kind == "sparse_cauchy":
            return targets, np.tan(np.pi * (uniform - 0.5))
        signs = 1 - 2 * (halves & np.uint32(1)).astype(np.float64)
        return targets, signs * (-np.log(uniform)) ** (-1 / self.p)

    def _dense_chunk(self, chunk: int) -> Array:
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.stream, chunk])))
        if self.kind == "gaussian":
            return np.asarray(draws.standard_normal((_CHUNK, self.size)).T / np.sqrt(self.size))
        if self.kind == "rademacher":
            signs = 2.0 * draws.integers(0, 2, (_CHUNK, self.size), dtype=np.int8).T - 1
            return np.asarray(signs / np.sqrt(self.size))
        return draws.standard_cauchy((_CHUNK, self.size)).T

    @property
    def _table_rows(self) -> int:
        assert self.n_rows is not None, "checked when it was made"
        return self.n_rows

    def _hartley_rows(self) -> NDArray[np.int64]:
        """The rows of the transform that are kept, drawn with replacement."""
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.stream, 1])))
        return draws.integers(0, self._table_rows, self.size)

    def _row_signs(self, start: int, stop: int) -> Array:
        bits = row_words(self.seed, start, stop, 1, self.stream)[:, 0] >> np.uint64(63)
        return np.asarray(1 - 2.0 * bits, dtype=np.float64)

    def _hartley_columns(self, start: int, stop: int) -> Array:
        # Products of integers are reduced modulo n first: the cosine of a large angle would lose digits.
        turns = np.outer(self._hartley_rows(), np.arange(start, stop)) % self._table_rows / self._table_rows
        scale: float = np.sqrt(2 / self.size)
        return np.asarray(scale * np.cos(2 * np.pi * turns - np.pi / 4) * self._row_signs(start, stop))

    def _fast_hartley(self, X: Array) -> Array:
        signs = self._row_signs(0, X.shape[0])
        spectrum = scipy.fft.fft((X.T * signs).T, axis=0)[self._hartley_rows()]
        return np.asarray((spectrum.real - spectrum.imag) / np.sqrt(self.size))


def row_words(seed: int, start: int, stop: int, per_row: int, stream: int = 0) -> NDArray[np.uint64]:
    """Random 64-bit words of rows start to stop, (stop - start, per_row); a function of seed, stream and row only."""
    key = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint64)
    first = start * per_row
    # One step of Philox's counter gives four words.
    generator = np.random.Philox(key=key, counter=first // 4)
    words = generator.random_raw(first % 4 + (stop - start) * per_row)
    return words[first % 4 :].reshape(stop - start, per_row)


def as_uniform(words: NDArray[np.uint64]) -> Array:
    """64-bit words as float64 in the open interval (0, 1)."""
    return np.asarray(((words >> np.uint64(11)) + 0.5) * 2.0**-53, dtype=np.float64)


def row_uniforms(seed: int, start: int, stop: int, stream: int = 0) -> Array:
    """Uniform variables of rows start to stop, shape (stop - start,), in (0, 1)."""
    return as_uniform(row_words(seed, start, stop, 1, stream)[:, 0])


def poisson_sample(probabilities: Array, seed: int, start: int = 0, stream: int = 0) -> tuple[NDArray[np.intp], Array]:
    """Keep each row by a coin of its own.

    Args:
        probabilities: shape (k,), of rows start to start + k; values above 1 mean 1.

    Returns:
        Indices into `probabilities` of the rows that are kept, and the weight 1 / probability of each: multiply rows by
        it for an l1 loss, by its square root for an l2 loss.
    """
    kept = np.flatnonzero(row_uniforms(seed, start, start + len(probabilities), stream) < probabilities)
    return kept, 1 / np.minimum(probabilities[kept], 1.0)


def _within(bits: NDArray[np.uint32], bounds: NDArray[np.intp]) -> NDArray[np.int32]:
    """31-bit numbers (k, stripes) spread evenly over bounds[j] <= index < bounds[j + 1]."""
    spread = bits.astype(np.uint64) * np.diff(bounds).astype(np.uint64) >> np.uint64(31)
    return (spread + bounds[:-1].astype(np.uint64)).astype(np.int32)


def _multiply(S: Any, X: Any) -> Array:
    if not sp.issparse(X):
        return np.asarray(S @ X)
    return np.asarray((sp.csr_array(S) @ X).toarray()) if sp.issparse(S) else np.ascontiguousarray((X.T @ S.T).T)


def sketch_blocks(
    blocks: Iterator[Block], S: Sketch, *, intercept: bool = False, target: bool = False, weight_power: float = 0.5
) -> Array:
    """Sum over blocks of S [1 | X | y], with rows times weight ** weight_power; for `map_reduce`."""
    total: Array | None = None
    for block in blocks:
        columns = S.matrix(block.start, block.stop)
        if block.weight is not None:
            # Weighting the columns of S is cheaper than the rows of X, which stays as it is.
            scale = block.weight**weight_power
            columns = columns @ sp.diags_array(scale) if sp.issparse(columns) else columns * scale
        parts = [_multiply(columns, block.X)]
        if intercept:
            parts.insert(0, np.asarray(columns.sum(axis=1)).reshape(-1, 1))
        if target:
            parts.append(columns @ block.targets())
        part = parts[0] if len(parts) == 1 else np.hstack(parts)
        total = part if total is None else total + part
    assert total is not None, "a fragment has rows"
    return total


def sketch(
    A: Any,
    size: int | None = None,
    kind: str = "sparse_sign",
    *,
    nnz: int = 4,
    p: float = 1.0,
    random_state: Any = None,
    executor: Executor = "serial",
) -> Array:
    """S A for a random S with few rows.

    Args:
        A: shape (n, d), array or CSR, a `RowSource` (its X), or a Dask collection.
        size: rows of the sketch; 20 d when omitted.
        kind: one of `KINDS`; the module's table says what each preserves and costs.
        nnz: non-zeros in a column of sparse_sign.
        p: of the exponential embedding.
        random_state: seed.
        executor: as in `map_reduce`.

    Returns:
        shape (size, d), float64.

    Raises:
        ValueError: as `Sketch`, or a table with NaN or infinity.
    """
    source = as_source(A) or ArraySource(A)
    seed = random_seed(random_state)
    S = Sketch(kind, 20 * source.n_cols if size is None else size, seed, nnz, source.n_rows, p)
    if kind == "srht" and isinstance(source, ArraySource) and not sp.issparse(source.X):
        source.n_passes += 1
        return S.apply(source.X.astype(np.float64, copy=False))
    sketched: Array = map_reduce(source, partial(sketch_blocks, S=S), executor=executor)
    return sketched
