"""An index of vectors in a directory, with the ids of its items."""

# Shapes: I items, Q queries, D width, K results.

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fullrank.data import atomic
from fullrank.retrieval.base import NO_ITEM, item_keys
from fullrank.retrieval.filters import ItemFilter
from fullrank.retrieval.vectors import VectorIndex, VectorIndexSpec
from fullrank.schema import describe_errors

FORMAT_VERSION = 1
_ABOUT, _ITEMS, _VECTORS = "index.json", "items.parquet", "vectors.safetensors"


class SavedIndex:
    """Items by the ids of their source, whole numbers or texts, and an index of their vectors.

    Attributes:
        spec: the kind of index and its hyper-parameters.
        index: by `item_keys` of the ids.
        items: the column `item_id`, and what else is known of the items, in the order of their keys.
    """

    def __init__(self, spec: VectorIndexSpec, width: int) -> None:
        self.spec = spec
        self.index: VectorIndex = spec.build(width)
        self.items = pl.DataFrame({"item_id": []}, schema={"item_id": pl.Null})

    @classmethod
    def build(cls, items: pl.DataFrame, vectors_ID: Tensor, spec: VectorIndexSpec) -> Self:
        """An index of items.

        Raises:
            ValueError: as `add`.
        """
        saved = cls(spec, vectors_ID.shape[1])
        saved.add(items, vectors_ID)
        return saved

    def __len__(self) -> int:
        return len(self.index)

    def add(self, items: pl.DataFrame, vectors_ID: Tensor, *, update: bool = False) -> int:
        """Make more items searchable.

        Args:
            items: a row for each vector: `item_id`, and columns to filter by.
            update: give items that are there already their new vectors.

        Returns:
            How many were there already.

        Raises:
            ValueError: if an id is missing, occurs twice, is of another kind than those there, or is there already; or
                a vector has another width or a number that is not finite.
        """
        ids = items["item_id"]
        if ids.null_count():
            raise ValueError(f"row {ids.is_null().arg_max()}: the id of an item is missing")
        ids = ids.cast(pl.Int64) if ids.dtype.is_integer() else ids.cast(pl.String)
        if len(self) and ids.dtype != self._ids.dtype:
            raise ValueError(f"ids are {ids.dtype}, those of the index {self._ids.dtype}")
        for name in set(items.columns) & set(self.items.columns) - {"item_id"}:
            if items[name].dtype != self.items[name].dtype:
                raise ValueError(f'column "{name}" is {items[name].dtype}, in the index {self.items[name].dtype}')
        if ids.is_duplicated().any():
            raise ValueError(f"item {ids.filter(ids.is_duplicated())[0]} is given twice")
        keys_I = item_keys(ids)
        known = torch.isin(keys_I, self.index.contents()[0])
        if bool(known.any()) and not update:
            raise ValueError(f"item {ids[int(known.nonzero()[0])]} is in the index already")
        if bool(known.any()):
            self.remove(ids.filter(pl.Series(known.numpy())))
        self.index.add(keys_I, vectors_ID)
        items = items.with_columns(ids)
        both = items if not self.items.height else pl.concat([self.items, items], how="diagonal")
        self.items = both[torch.argsort(item_keys(both["item_id"])).numpy()]
        return int(known.sum())

    @property
    def _ids(self) -> pl.Series:
        return self.items["item_id"]

    def remove(self, ids: pl.Series) -> None:
        """Forget items.

        Raises:
            KeyError: if one is not there.
        """
        if not len(self):
            raise KeyError(f"item {ids[0]} is not in the index")
        ids = ids.cast(self._ids.dtype, strict=False)
        missing = ~ids.is_in(self._ids.implode())
        if missing.any():
            raise KeyError(f"item {ids.filter(missing)[0]} is not in the index")
        self.index.remove(item_keys(ids))
        self.items = self.items.filter(~self._ids.is_in(ids.implode()))

    def search(self, queries_QD: Tensor, k: int, where: ItemFilter | None = None) -> pl.DataFrame:
        """The k best items of each query: columns `query` (its row), `rank`, `item_id`, `score`.

        Args:
            where: the items that may be returned, by what is known of them; k of these are, wherever there are k.

        Raises:
            ValueError: if queries have another width or a number that is not finite, k is below 1, or the filter names
                a column that is not there.
        """
        check_queries(queries_QD, self.index.width)
        allowed = None if where is None else where.keys(self.items)
        found = self.index.search(queries_QD, k, allowed=allowed)
        there_QK = found.item_keys_BK != NO_ITEM
        query, rank = there_QK.nonzero(as_tuple=True)
        keys = item_keys(self._ids)
        place = torch.searchsorted(keys, found.item_keys_BK[there_QK])
        return pl.DataFrame(
            {
                "query": query.numpy(),
                "rank": rank.numpy() + 1,
                "item_id": self._ids.gather(place.numpy()),
                "score": found.scores_BK[there_QK].numpy(),
            }
        )

    def save(self, directory: Path, *, overwrite: bool = False) -> None:
        """Write the directory, whole or not at all.

        Raises:
            FileExistsError: if there is one already, unless it may be overwritten.
        """
        _, vectors_ID = self.index.contents()
        with atomic.new_directory(directory, overwrite=overwrite) as place:
            self.items.write_parquet(place / _ITEMS)
            save_file({"vectors": vectors_ID.contiguous()}, place / _VECTORS)
            about = {"version": FORMAT_VERSION, "index": self.spec.model_dump(mode="json"), "items": len(self)}
            (place / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read what `save` wrote, and build the index again.

        Raises:
            ValueError: if a file is missing or damaged, or they contradict one another.
        """
        path = directory / _ABOUT
        if not path.is_file():
            raise ValueError(f"{directory} is not an index: it has no {_ABOUT} (make one with `fullrank index build`)")
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            if about["version"] != FORMAT_VERSION:
                raise ValueError(f"version is {about['version']!r}, this release reads {FORMAT_VERSION}")
            spec = VectorIndexSpec.of(about["index"])
            items = pl.read_parquet(directory / _ITEMS, glob=False)
            if "item_id" not in items.columns:
                raise ValueError(f'{_ITEMS} has no column "item_id"')
            vectors_ID = load_file(directory / _VECTORS)["vectors"]
        except ValidationError as error:
            raise ValueError(describe_errors(error, str(path)).splitlines()[0]) from None
        except (OSError, KeyError, TypeError, ValueError, SafetensorError, pl.exceptions.PolarsError) as error:
            raise ValueError(f"{directory} is damaged: {str(error).splitlines()[0]}") from None
        if vectors_ID.ndim != 2 or len(vectors_ID) != len(items):
            raise ValueError(f"{directory} is damaged: {len(items)} ids, vectors of shape {tuple(vectors_ID.shape)}")
        return cls.build(items, vectors_ID, spec)


def check_queries(queries_QD: Tensor, width: int) -> None:
    """Raises:
    ValueError: if queries have another width, or a number that is not finite.
    """
    if queries_QD.shape[1] != width:
        raise ValueError(f"queries have {queries_QD.shape[1]} numbers, the vectors of the index {width}")
    finite_Q = torch.isfinite(queries_QD).all(1)
    if not bool(finite_Q.all()):
        raise ValueError(f"query {int((~finite_Q).nonzero()[0])} has a NaN or infinite number")


def read_vectors(path: Path, item_id: str = "item_id", vector: str = "vector") -> tuple[pl.DataFrame, Tensor]:
    """Items and float32 vectors (I, D) of a Parquet file, or of a `.npy` matrix, whose ids are the numbers of its rows.

    Items are the column of ids, as `item_id`, and all others but that of vectors.

    Raises:
        ValueError: if the file cannot be read, a column is missing, or vectors are no equally many numbers.
    """
    try:
        if path.suffix == ".npy":
            matrix = np.load(path, allow_pickle=False)
            items = pl.DataFrame({"item_id": np.arange(len(matrix))})
        else:
            frame = pl.read_parquet(path, glob=False)
            for column in (item_id, vector):
                if column not in frame.columns:
                    raise ValueError(f'there is no column "{column}"; there are {", ".join(frame.columns)}')
            items, column_of = frame.drop(vector), frame[vector]
            if item_id != "item_id":
                items = items.drop("item_id", strict=False).rename({item_id: "item_id"})
            if not isinstance(column_of.dtype, pl.List | pl.Array):
                raise ValueError(f'column "{vector}" is {column_of.dtype}, expected lists of numbers')
            if isinstance(column_of.dtype, pl.Array):
                column_of = column_of.arr.to_list()
            lengths = column_of.list.len()
            if column_of.null_count() or lengths.n_unique() > 1:
                raise ValueError(f'column "{vector}" has lists of unequal length, or none')
            matrix = column_of.explode().cast(pl.Float32).to_numpy().reshape(len(frame), -1)
        if matrix.ndim != 2 or not matrix.shape[1] or matrix.dtype.kind not in "fiu":
            raise ValueError(f"vectors are {matrix.dtype} of shape {matrix.shape}, expected a matrix of numbers")
    except (OSError, ValueError, EOFError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
    return items, torch.from_numpy(np.array(matrix, dtype=np.float32))
