"""Prefix tables: an id is a path of codes from coarse to fine, and every prefix of the path has a row."""

# Shapes: N ids, R ids of the table, L levels, G tokens, D width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fullrank.embeddings.semantic_id.codes import read_header
from fullrank.embeddings.semantic_id.quantizer import VersionMismatchError, expanded
from fullrank.embeddings.semantic_id.tokenizer import Hash, Scheme, SemanticIDTokenizer
from fullrank.embeddings.table import Ask, Part, Table, TableConfig
from fullrank.schema import OUT_OF_VOCABULARY_ID

# More than any table has: tokenisers of six levels of 2048 codes have more values than there are numbers.
MOST_ROWS = 1 << 40
CodebookSize = Annotated[int, Field(ge=2, le=1 << 20)]


class PrefixTable(Table):
    """e(i) = Σ_l E[slot(c_1 .. c_l)], the sum of the rows of all prefixes of the codes of id i.

    Ids with a common prefix share its row, so what is learnt of one holds for all that are like it. Where there are
    more prefixes than rows, short ones keep a row of their own and long ones are hashed: see `SemanticIDTokenizer`.

    The codes of an id are `codes_RL`, part of the model's state: set by `set_codes` to what a quantiser of content
    vectors found. Until then they are the digits of the id, most significant first: blocks of similarly popular ids,
    where the vocabulary orders them so. An id without content, whose codes are -1, has one row that all such ids share.
    An id that came later has the codes of the out-of-vocabulary id.

    Source: Enhancing Embedding Representation Stability in Recommendation Systems with Semantic ID, RecSys 2025,
    arXiv 2504.02137, prefix n-gram.
    """

    class Config(TableConfig):
        """Attributes:
        levels: L, codes of an id.
        codebook_size: K, different codes of a level, or a number for each level.
        scheme: what has a row: every prefix, the whole tuple (flat), each two neighbours, or each code.
        n: codes that are used, from the first; default all.
        stored_rows: rows to store; default as many as the table has ids when it is made, or first codes, and never more
            than there are prefixes, K + K² + .. + K^L.
        hash: of prefixes that have no row of their own: mixed, or their number modulo the rows as in the paper.
        codes: file or directory that `fullrank codes make` wrote; says levels and codebook_size where they are not
            given. Read when training begins; a bundle carries the codes themselves.
        """

        kind: Literal["prefix"] = "prefix"
        levels: int = Field(default=3, ge=1)
        codebook_size: CodebookSize | tuple[CodebookSize, ...] = 32
        scheme: Scheme = "prefix_ngram"
        n: int | None = Field(default=None, ge=1)
        stored_rows: int | None = Field(default=None, ge=1)
        hash: Hash = "mix"
        codes: str | None = None

        @model_validator(mode="before")
        @classmethod
        def _sizes_of_codes(cls, values: Any) -> Any:
            if not isinstance(values, Mapping) or not isinstance(values.get("codes"), str):
                return values
            if "levels" in values or "codebook_size" in values:
                return values
            sizes = read_header(values["codes"]).codebook_sizes
            return {**values, "levels": len(sizes), "codebook_size": sizes[0] if len(set(sizes)) == 1 else sizes}

        @model_validator(mode="after")
        def _fitting(self) -> Self:
            self.tokenizer(MOST_ROWS)
            return self

        @property
        def codebook_sizes(self) -> tuple[int, ...]:
            """K_1 .. K_L."""
            return tuple(expanded(self.codebook_size, self.levels))

        def tokenizer(self, rows: int) -> SemanticIDTokenizer:
            """Rows of tuples in a table of that many rows."""
            return SemanticIDTokenizer(self.codebook_sizes, self.scheme, self.n, rows, hash=self.hash)

    grows = True
    config: Config
    codes_RL: Tensor
    codes_version: Tensor
    _rows_RG: Tensor

    def __init__(self, rows: int, width: int, init_std: float, config: Config) -> None:
        super().__init__(rows, width, init_std, config)
        prefixes = config.tokenizer(MOST_ROWS).values
        wanted = config.stored_rows or max(self.first_rows, config.codebook_sizes[0])
        self.stored = min(prefixes, wanted)
        self.tokenizer = config.tokenizer(self.stored)
        spread = init_std * len(self.tokenizer) ** -0.5
        self.parts = (Part("prefixes", self.stored, width, spread), Part("missing", 1, width, init_std))
        rest_R, digits = torch.arange(rows), []
        rest_R[self.first_rows :] = OUT_OF_VOCABULARY_ID
        for size in config.codebook_sizes[::-1]:
            digits.append(rest_R % size)
            rest_R = rest_R.div(size, rounding_mode="floor")
        self.register_buffer("codes_RL", torch.stack(digits[::-1], 1).int())
        self.register_buffer("codes_version", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_rows_RG", self.tokenizer(self.codes_RL), persistent=False)
        self.some_missing = False
        self.register_load_state_dict_post_hook(lambda table, _: table.place())  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def set_codes(self, codes_RL: Tensor, version: str | None = None, continues: Sequence[str] = ()) -> None:
        """Give every id its codes, integers of shape (rows, L); -1 for an id without content.

        Args:
            version: of the quantiser that made them, hexadecimal; nothing is checked without it.
            continues: versions whose codes mean the same.

        Raises:
            ValueError: if the shape is another, or a code is outside -1 to K - 1.
            VersionMismatchError: if the codes that the table has are of another version.
        """
        if codes_RL.shape != self.codes_RL.shape:
            raise ValueError(f"codes have shape {tuple(codes_RL.shape)}, expected {tuple(self.codes_RL.shape)}")
        self.tokenizer.check(codes_RL)
        if version is not None:
            known = int(self.codes_version)
            if known and known not in [_number(each) for each in (version, *continues)]:
                raise VersionMismatchError(
                    f"the table has learnt codes of version {_text(known)}, and these are of {version}: codes of "
                    "another quantiser mean other things; encode items with the old one, or align the new one to it"
                )
            self.codes_version.fill_(_number(version))
        self.codes_RL.copy_(codes_RL)
        self.place()

    @torch.no_grad()
    def place(self) -> None:
        """Find the rows of all ids again, after a change of the codes."""
        self._rows_RG = self.tokenizer(self.codes_RL)
        self.some_missing = bool((self._rows_RG[:, 0] < 0).any())

    def asks(self, ids_N: Tensor) -> list[Ask]:
        rows_NG = self._rows_RG.index_select(0, ids_N)
        if not self.some_missing:
            return [Ask(0, rows_N) for rows_N in rows_NG.unbind(1)]
        missing_N = rows_NG[:, 0] < 0
        of_M, without_M = (~missing_N).nonzero().squeeze(1), missing_N.nonzero().squeeze(1)
        found = [Ask(0, rows_M, of_M) for rows_M in rows_NG[of_M].unbind(1)]
        return [*found, Ask(1, torch.zeros_like(without_M), without_M)]

    def combine(self, ids_N: Tensor, asks: Sequence[Ask], vectors: Sequence[Tensor]) -> Tensor:
        if asks[0].of is None:
            return torch.stack(list(vectors)).sum(0)
        of_M, without_M = asks[0].of, asks[-1].of
        assert without_M is not None
        found_ND = torch.cat([torch.stack(list(vectors[:-1])).sum(0), vectors[-1]])
        return found_ND.new_empty(ids_N.numel(), self.width).index_copy(0, torch.cat([of_M, without_M]), found_ND)


def _number(version: str) -> int:
    """The version as a signed 64-bit number, never 0, which says that there is none."""
    return (int(version, 16) - (1 << 63)) or 1


def _text(number: int) -> str:
    return f"{number + (1 << 63):016x}"
