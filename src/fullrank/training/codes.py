"""Codes of items on their way from files to the tables of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from fullrank.data.encoders import Encoders
from fullrank.embeddings import EmbeddingCollection
from fullrank.embeddings.prefix import PrefixTable
from fullrank.embeddings.semantic_id.codes import ItemCodes
from fullrank.models import Ranker
from fullrank.training.growing import grown, with_tables


def give_codes(model: Ranker, encoders: Encoders, files: Mapping[str, str | ItemCodes] | None = None) -> None:
    """Set the codes of every prefix table of a model, and of the rankers within it.

    Args:
        encoders: what ids stand for.
        files: codes by table, or the files that have them; default those that the tables' configs name.

    Raises:
        ValueError: if a file is missing, or its codes do not fit the table.
        VersionMismatchError: if the table has learnt codes of another quantiser.
    """
    read: dict[str, ItemCodes] = {}
    for module in model.modules():
        if not isinstance(module, EmbeddingCollection):
            continue
        for name, table in module.kinds.items():
            if not isinstance(table, PrefixTable):
                continue
            file = table.config.codes if files is None else files.get(name)
            if file is None:
                continue
            codes = file if isinstance(file, ItemCodes) else read.get(file)
            if codes is None:
                codes = read[str(file)] = ItemCodes.read(str(file))
            header = codes.header
            if header.codebook_sizes != table.config.codebook_sizes:
                raise ValueError(
                    f'table "{name}" is made for codes of sizes {list(table.config.codebook_sizes)}, and those of '
                    f"version {header.version} have {list(header.codebook_sizes)}: set levels and codebook_size"
                )
            table.set_codes(codes.of_rows(encoders, name), header.version, header.continues)


def named_codes(config: Any) -> dict[str, str]:
    """The files of codes that a ranker's config, or one within it, names; by table."""
    found: dict[str, str] = {}

    def look(name: str, table: dict[str, Any]) -> dict[str, Any]:
        if table.get("codes") is not None:
            found[name] = table["codes"]
        return table

    with_tables(config, look)
    return found


def without_files(config: dict[str, Any]) -> dict[str, Any]:
    """A ranker's config for a bundle, which carries the codes themselves."""
    written: dict[str, Any] = with_tables(
        config, lambda _, table: {**table, "codes": None} if "codes" in table else table
    )
    return written


def admitted(model: Ranker, encoders: Encoders, table: str, codes: ItemCodes) -> tuple[Ranker, Encoders]:
    """The same ranker with the items of a file of codes that it does not know yet: each has an id of its own, and is
    scored by what those like it have taught.

    Raises:
        ValueError: if the table is no prefix table with a vocabulary, or the codes do not fit.
        VersionMismatchError: if the table has learnt codes of another quantiser.
    """
    if table not in encoders.vocabularies:
        raise ValueError(
            f'there is no table "{table}" with a vocabulary; expected one of {", ".join(encoders.vocabularies)}'
        )
    kinds = [module.kinds.get(table) for module in model.modules() if isinstance(module, EmbeddingCollection)]
    if not any(isinstance(kind, PrefixTable) for kind in kinds):
        raise ValueError(f'table "{table}" is no prefix table: it has no use for codes')
    known = encoders.vocabularies[table].values
    new = codes.only(~codes.values.is_in(known.implode()) & pl.Series((codes.codes_IL[:, 0] >= 0).numpy()))
    longer = encoders.with_values(table, new.values)
    larger = grown(model, longer.schema) if len(new.values) else model
    give_codes(larger, longer, {table: codes})
    return larger, longer
