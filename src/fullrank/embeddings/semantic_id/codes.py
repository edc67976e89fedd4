"""The codes of items in a file, by the items' own names."""

# Shapes: I items, R rows of a table, L levels.

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from fullrank.data import atomic
from fullrank.data.encoders import Encoders
from fullrank.data.spelling import as_text
from fullrank.embeddings.semantic_id.quantizer import Quantizer

CODES = "codes.parquet"
_HEADER = "fullrank.codes"


@dataclass(frozen=True)
class CodesHeader:
    """What a file of codes says of itself.

    Attributes:
        codebook_sizes: K_1 .. K_L.
        version: of the quantiser.
        continues: versions whose codes mean the same.
    """

    codebook_sizes: tuple[int, ...]
    version: str
    continues: tuple[str, ...] = ()


@dataclass(frozen=True)
class ItemCodes:
    """Items and their codes.

    Attributes:
        values: text of each item, spelled as in vocabularies; each once.
        codes_IL: int64; -1 for an item without content.
        header: where they come from.
    """

    values: pl.Series
    codes_IL: Tensor
    header: CodesHeader

    @classmethod
    def of(cls, values: pl.Series, codes_IL: Tensor, quantizer: Quantizer) -> ItemCodes:
        """Codes that a quantiser found.

        Raises:
            ValueError: if an item has no value, or two have the same.
        """
        text = as_text(values)
        if text.null_count():
            raise ValueError(f'column "{values.name}" has no value in row {int(text.is_null().arg_true()[0]) + 1}')
        twice = text.is_duplicated()
        if twice.any():
            raise ValueError(
                f'column "{values.name}" has "{text.filter(twice)[0]}" more than once, expected each item once'
            )
        header = CodesHeader(quantizer.codebook_sizes, quantizer.version, quantizer.continues)
        return cls(text.alias("value"), codes_IL, header)

    def write(self, path: Path) -> None:
        """A Parquet file of the columns `value` and `codes`, with the header in its metadata."""
        frame = pl.DataFrame({"value": self.values, "codes": self.codes_IL.int().numpy()})
        frame = frame.with_columns(pl.col("codes").arr.to_list())
        header = {
            "codebook_sizes": list(self.header.codebook_sizes),
            "version": self.header.version,
            "continues": list(self.header.continues),
        }
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd", metadata={_HEADER: json.dumps(header)})
        atomic.write_bytes(Path(path), buffer.getvalue())

    @classmethod
    def read(cls, path: Path | str) -> ItemCodes:
        """Read what `write` wrote: the file, or its directory.

        Raises:
            ValueError: if it is missing or damaged.
        """
        header, place = read_header(path), codes_file(path)
        try:
            frame = pl.read_parquet(place, columns=["value", "codes"])
            codes = frame["codes"].list.to_array(len(header.codebook_sizes)).to_numpy()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ValueError(f"{place} is damaged: {str(error).splitlines()[0]}") from None
        return cls(frame["value"].cast(pl.String), torch.from_numpy(np.array(codes, dtype=np.int64)), header)

    def of_values(self, values: pl.Series) -> Tensor:
        """Codes (n, L) of these texts; -1 for one that is not here."""
        place = pl.DataFrame({"value": self.values}).with_row_index("place")
        found = pl.DataFrame({"value": values}).join(place, on="value", how="left", maintain_order="left")["place"]
        known = torch.from_numpy(found.is_not_null().to_numpy().copy())
        codes = self.codes_IL[torch.from_numpy(found.fill_null(0).to_numpy().astype(np.int64))]
        return codes.masked_fill(~known[:, None], -1)

    def of_rows(self, encoders: Encoders, table: str) -> Tensor:
        """Codes (R, L) of all ids of a table; -1 for ids that are no item here, the reserved ones among them.

        Raises:
            ValueError: if ids of the table stand for no single value, because it is hashed or its values are ranges.
        """
        rows = encoders.schema.tables()[table]
        encodings = {each.encoding for each in encoders.schema.embedded().values() if each.table_name == table}
        if table in encoders.vocabularies:
            values = encoders.vocabularies[table].values
        elif encodings == {"identity"}:
            values = pl.Series([str(number) for number in range(rows)])
        else:
            raise ValueError(f'table "{table}" has no vocabulary, so that no id has a value to look up codes of')
        codes_IL = self.of_values(values)
        reserved = codes_IL.new_full((rows - len(codes_IL), codes_IL.shape[1]), -1)
        return torch.cat([reserved, codes_IL])

    def only(self, keep: Sequence[bool] | pl.Series) -> ItemCodes:
        """Some of the items."""
        mask = pl.Series(keep)
        return replace(self, values=self.values.filter(mask), codes_IL=self.codes_IL[torch.from_numpy(mask.to_numpy())])


def codes_file(path: Path | str) -> Path:
    """The file itself, where its directory is named."""
    place = Path(path)
    return place / CODES if place.is_dir() else place


def read_header(path: Path | str) -> CodesHeader:
    """What a file of codes says of itself, without reading the codes.

    Raises:
        ValueError: if it is missing or is no such file.
    """
    place = codes_file(path)
    try:
        said = json.loads(pl.read_parquet_metadata(place)[_HEADER])
        return CodesHeader(tuple(said["codebook_sizes"]), said["version"], tuple(said["continues"]))
    except FileNotFoundError:
        raise ValueError(f"{place} does not exist: expected codes that `fullrank codes make` wrote") from None
    except (pl.exceptions.PolarsError, OSError, KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{place} holds no codes: expected what `fullrank codes make` wrote") from None
