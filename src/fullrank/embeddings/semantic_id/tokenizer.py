"""From a tuple of codes, coarse to fine, to the rows of one table that it asks for."""

# Shapes: N tuples, L levels, G tokens of a tuple.

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Scheme = Literal["prefix_ngram", "flat", "all_bigrams", "per_level"]
Hash = Literal["mix", "mod"]

MISSING_CODE = -1
_LARGEST, _ALL = 1 << 63, (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Token(NamedTuple):
    """Codes `begin` to `end` - 1 of a tuple, read together; `size` different values, numbered from `raw`."""

    begin: int
    end: int
    size: int
    raw: int


@dataclass(frozen=True)
class TokenRows:
    """Where the rows of a token lie.

    Attributes:
        levels: which codes it is made of, from 1.
        values: how many different ones there are.
        rows: those that they may have.
        exact: whether each value has one of its own.
    """

    levels: tuple[int, ...]
    values: int
    rows: range
    exact: bool


class SemanticIDTokenizer:
    """Rows of a table for tuples of codes c_1 .. c_L, one for each token.

    | scheme | tokens | their number, before hashing |
    | --- | --- | --- |
    | `prefix_ngram` | every prefix, up to n codes | p_1 = c_1, p_i = K (p_{i-1} + 1) + c_i |
    | `flat` | all n codes as one: the paper's trigram, fourgram | K (.. (K c_1 + c_2) ..) + c_n |
    | `all_bigrams` | each two neighbours | K² (i - 1) + K c_i + c_{i+1} |
    | `per_level` | each code | K (i - 1) + c_i |

    While all values of all tokens fit into the table each has a row of its own. Else tokens keep exact rows, from the
    first on, as long as these fill no more than half of the table, and the values of the others are hashed into the
    rest.

    Args:
        codebook_sizes: K_1 .. K_L.
        n: codes that are used, from the first; default all.
        num_embeddings: H, rows of the table; default as many as there are values.
        hash: `mix` is the above; `mod` takes the number modulo H, as the paper does, where it does not fit. With H and
            K that have a common divisor that forgets coarse codes: if H = K², p_3 mod H says nothing of c_1.
        reserve_exact: keep the rows of the first tokens exact; without it all are hashed where not all fit.
        seed: of the hash.

    Raises:
        ValueError: if n is not among 1 .. L (2 .. L for bigrams), a codebook is empty, or the table has fewer rows than
            there are first codes and these are to be exact.

    Source: Enhancing Embedding Representation Stability in Recommendation Systems with Semantic ID, RecSys 2025,
    arXiv 2504.02137, section 4.
    """

    # Deviation: the paper hashes p_i modulo H; here coarse levels stay exact and deep ones are mixed, see `hash`.

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        scheme: Scheme = "prefix_ngram",
        n: int | None = None,
        num_embeddings: int | None = None,
        *,
        hash: Hash = "mix",
        reserve_exact: bool = True,
        seed: int = 0,
    ) -> None:
        self.codebook_sizes, self.scheme, self.hash, self.seed = tuple(codebook_sizes), scheme, hash, seed
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes: expected sizes of at least 1, got {list(codebook_sizes)}")
        for name, value, choices in (("scheme", scheme, get_args(Scheme)), ("hash", hash, get_args(Hash))):
            if value not in choices:
                raise ValueError(f'{name}: expected one of {", ".join(choices)}, got "{value}"')
        levels, least = len(self.codebook_sizes), 2 if scheme == "all_bigrams" else 1
        self.n = levels if n is None else n
        if not least <= self.n <= levels:
            raise ValueError(f"n is {self.n}, expected {least} to {levels}: the codes have {levels} levels")
        self.tokens = tuple(self._tokens())
        self.values = sum(token.size for token in self.tokens)
        self.num_embeddings = self.values if num_embeddings is None else num_embeddings
        if self.num_embeddings < 1 or self.num_embeddings * max(self.codebook_sizes) >= _LARGEST:
            raise ValueError(f"num_embeddings is {self.num_embeddings:,}, expected 1 to 2^63 over the codebook size")
        first = self.codebook_sizes[0]
        if reserve_exact and hash == "mix" and self.num_embeddings < first:
            raise ValueError(
                f"num_embeddings is {self.num_embeddings}, and there are {first} first codes to be exact: give it more "
                "rows, or take a smaller codebook"
            )
        self.exact = self._exact(reserve_exact)

    def _tokens(self) -> list[Token]:
        spans = {
            "prefix_ngram": [(0, end) for end in range(1, self.n + 1)],
            "flat": [(0, self.n)],
            "all_bigrams": [(begin, begin + 2) for begin in range(self.n - 1)],
            "per_level": [(level, level + 1) for level in range(self.n)],
        }[self.scheme]
        sizes = [math.prod(self.codebook_sizes[begin:end]) for begin, end in spans]
        raw = [0, *itertools.accumulate(sizes)]
        return [Token(*span, size, first) for span, size, first in zip(spans, sizes, raw, strict=False)]

    def _exact(self, reserve: bool) -> int:
        """How many tokens have exact rows."""
        if self.values <= self.num_embeddings:
            return len(self.tokens)
        if not reserve or self.hash == "mod":
            return 0
        return sum(token.raw + token.size <= self.num_embeddings // 2 for token in self.tokens)

    @property
    def reserved(self) -> int:
        """Rows of the tokens that are exact; hashed ones lie behind them."""
        return sum(token.size for token in self.tokens[: self.exact])

    def __len__(self) -> int:
        """G, tokens of a tuple."""
        return len(self.tokens)

    def __call__(self, codes_NL: Tensor) -> Tensor:
        """Rows, int64 of shape (N, G); -1 in all of them for a tuple whose codes are missing.

        Raises:
            ValueError: if a code is outside -1 to K - 1, or some codes of a tuple are missing and others are not.
        """
        missing_N = self.check(codes_NL)
        codes_NL = codes_NL.long().clamp_min(0)
        rows = [self._rows(place, token, codes_NL) for place, token in enumerate(self.tokens)]
        return torch.stack(rows, 1).masked_fill(missing_N[:, None], MISSING_CODE)

    def check(self, codes_NL: Tensor) -> Tensor:
        """Which tuples are missing; raises as `__call__` does."""
        if codes_NL.ndim != 2 or codes_NL.shape[1] != len(self.codebook_sizes) or codes_NL.is_floating_point():
            raise ValueError(
                f"codes have shape {tuple(codes_NL.shape)} and type {codes_NL.dtype}, expected integers of shape "
                f"(n, {len(self.codebook_sizes)})"
            )
        if codes_NL.device.type == "meta":
            return codes_NL[:, 0] < 0
        for level, (size, code_N) in enumerate(zip(self.codebook_sizes, codes_NL.unbind(1), strict=True), 1):
            wrong_N = (code_N < MISSING_CODE) | (code_N >= size)
            if bool(wrong_N.any()):
                row = int(wrong_N.nonzero()[0])
                raise ValueError(
                    f"codes: row {row} has {int(code_N[row])} at level {level}, expected 0 to {size - 1}, or "
                    f"{MISSING_CODE} where there are none"
                )
        missing_NL = codes_NL < 0
        if bool((missing_NL.any(1) != missing_NL.all(1)).any()):
            row = int((missing_NL.any(1) != missing_NL.all(1)).nonzero()[0])
            raise ValueError(f"codes: row {row} has some codes and lacks others: {codes_NL[row].tolist()}")
        return missing_NL[:, 0]

    def _rows(self, place: int, token: Token, codes_NL: Tensor) -> Tensor:
        sizes = self.codebook_sizes[token.begin : token.end]
        read = list(zip(sizes, codes_NL[:, token.begin : token.end].unbind(1), strict=True))
        if self.hash == "mix" and place >= self.exact:
            return self._mixed(place, [code_N for _, code_N in read])
        # By Horner's rule modulo the rows, the number of a long prefix does not overflow; one that is exact is below.
        rows = self.num_embeddings
        number_N = torch.zeros_like(codes_NL[:, 0])
        for size, code_N in read:
            number_N = (number_N * size + code_N) % rows
        return (number_N + token.raw % rows) % rows

    def _mixed(self, place: int, codes: list[Tensor]) -> Tensor:
        """Rows behind the exact ones, by a hash of the token and its codes, one after the other."""
        state_N = torch.full_like(codes[0], _splitmix(self.seed * len(self.tokens) + place))
        for code_N in codes:
            state_N = _splitmixes(state_N + code_N)
        room = self.num_embeddings - self.reserved
        return self.reserved + (state_N & (_LARGEST - 1)) % room

    def layout(self) -> list[TokenRows]:
        """Where the rows of each token lie."""
        found = []
        for place, (begin, end, size, raw) in enumerate(self.tokens):
            exact = place < self.exact
            if exact:
                rows = range(raw, raw + size)
            else:
                rows = range(self.reserved if self.hash == "mix" else 0, self.num_embeddings)
            found.append(TokenRows(tuple(range(begin + 1, end + 1)), size, rows, exact))
        return found

    def collision_factor(self, codes_NL: Tensor) -> list[float]:
        """Of each token, its different values among these tuples over the rows that they have: 1 if none share.

        Rows of one token that another token's values are hashed to as well are not counted: see `layout`.
        """
        rows_NG = self(codes_NL)
        known_N = rows_NG[:, 0] >= 0
        factors = []
        for token, rows_N in zip(self.tokens, rows_NG[known_N].unbind(1), strict=True):
            values = torch.unique(codes_NL[known_N, token.begin : token.end], dim=0)
            factors.append(len(values) / max(1, len(torch.unique(rows_N))))
        return factors


def _splitmix(number: int) -> int:
    """SplitMix64 of one number, as a signed one."""
    state = (number + _GOLDEN) & _ALL
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        state = ((state ^ (state >> shift)) * factor) & _ALL
    return _signed(state ^ (state >> 31))


def _splitmixes(state_N: Tensor) -> Tensor:
    """SplitMix64 of int64 numbers, whose sums and products wrap around."""
    state_N = state_N + _signed(_GOLDEN)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        state_N = (state_N ^ _shifted(state_N, shift)) * _signed(factor)
    return state_N ^ _shifted(state_N, 31)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _shifted(state_N: Tensor, bits: int) -> Tensor:
    """To the right, with zeros."""
    return (state_N >> bits) & ((1 << (64 - bits)) - 1)
