"""The ids that lost their rows while a model learnt, in the run's directory."""

from __future__ import annotations

import io
import re
from pathlib import Path

import polars as pl

from fullrank.data import atomic
from fullrank.embeddings import EmbeddingCollection
from fullrank.embeddings.admitted import AdmittedTable
from fullrank.models import Ranker
from fullrank.schema import FIRST_VOCABULARY_ID
from fullrank.training.run_directory import EVICTED

_FILE = re.compile(r"step-(\d+)\.parquet")


def admitted_tables(model: Ranker) -> dict[str, AdmittedTable]:
    """The tables of a model whose ids come and go; of several of one name, which see the same ids, the first."""
    found: dict[str, AdmittedTable] = {}
    for module in model.modules():
        if isinstance(module, EmbeddingCollection):
            for name, kind in module.kinds.items():
                if isinstance(kind, AdmittedTable):
                    found.setdefault(name, kind)
    return found


def id_counts(model: Ranker) -> dict[str, dict[str, int]]:
    """By table: how many ids have a row, ever got one, and lost it."""
    return {
        name: dict(zip(("live", "admitted", "evicted"), kind.totals[1:4].tolist(), strict=True))
        for name, kind in admitted_tables(model).items()
    }


class EvictedIds:
    """Writes the evicted ids of a run as `evicted/step-<step>.parquet`: columns `table`, `step`, `value`.

    A value is the number that the log has, or 62 bits of the hash of a text. A file is written with each checkpoint, so
    that a run that is resumed goes on where its files end.

    Args:
        directory: of the run; None to write nothing.
    """

    def __init__(self, model: Ranker, directory: Path | None) -> None:
        self.tables = admitted_tables(model)
        self.directory = None if directory is None else directory / EVICTED

    def write(self, step: int) -> None:
        """Write down who was evicted since the last call, up to this step."""
        frames = [
            pl.DataFrame({"value": ids.numpy() - FIRST_VOCABULARY_ID}).select(
                pl.lit(name).alias("table"), pl.lit(at, pl.Int64).alias("step"), "value"
            )
            for name, table in self.tables.items()
            for at, ids in table.take_evicted()
        ]
        if frames and self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            written = io.BytesIO()
            pl.concat(frames).write_parquet(written)
            atomic.write_bytes(self.directory / f"step-{step:010d}.parquet", written.getvalue())

    def resume(self, step: int) -> None:
        """Forget what was written after this step."""
        if self.directory is not None and self.directory.is_dir():
            for path in self.directory.iterdir():
                found = _FILE.fullmatch(path.name)
                if found is not None and int(found[1]) > step:
                    path.unlink()
