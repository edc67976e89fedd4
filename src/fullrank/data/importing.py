"""The one door for logs: any format in, a dataset directory out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from fullrank.data.building import Earlier
from fullrank.data.dataset import Dataset
from fullrank.data.formats import open_format
from fullrank.data.formats.options import ReadOptions
from fullrank.data.inference import schema_for, with_reading
from fullrank.data.reading import read_log
from fullrank.data.splits import SplitSpec
from fullrank.schema import Schema, TimeUnit


def import_dataset(
    format: str,
    path: Path,
    out: Path,
    *,
    schema: Schema | None = None,
    split: SplitSpec | None = None,
    like: Path | str | None = None,
    extend: bool = False,
    options: ReadOptions | None = None,
    missing: Collection[str] | None = None,
    time_unit: TimeUnit | None = None,
    time_format: str | None = None,
    keep: Collection[str] = (),
    max_bad: float = 0.001,
    overwrite: bool = False,
    forgotten: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read a log, set its bad rows aside, split it, fit encoders on the training part, and write a dataset.

    Memory does not grow with the log, but for a byte per row (its part), 8 more when request ids must be unique, the
    vocabularies, and the distinct seconds of a split by time.

    Args:
        format: a key of `FORMATS`.
        path: the log.
        out: the directory to make; it appears only when complete.
        schema: what to read; the format's own when omitted.
        like: a bundle or a dataset whose schema and encoders to take as they are: a later log then means what the
            earlier one meant, and values that are new are out of vocabulary.
        extend: give the new values of the training part ids of their own, behind those that `like` has.
        split: when the source comes already split into files, only the share of validation rows (where it has no file
            of them) and the protocol.
        options: how a text file is laid out, where that is not to be guessed.
        missing, time_unit, time_format: in place of those of the schema, or to guess it by; see `Schema`.
        keep: further columns of the log to have in the dataset, and not as features: numbers (int64 if all are whole
            and none is missing, else float32), or lists of equally many numbers. What is not such a number is a bad
            row.
        max_bad: share of bad rows above which the import fails.
        overwrite: replace an existing dataset.
        forgotten: digests of users whose rows are left out; see `data.forgotten.forgotten_users`.
        progress: called with the number of good and bad rows read so far.

    Raises:
        ValueError: if the source is not in the format or lacks a column, or has too many bad rows; these are then
            listed in `<out>.rejected.tsv`.
    """
    path, out = Path(path), Path(out)
    source = open_format(format, options)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    earlier = Earlier.of(like, extend, schema=schema, missing=missing, time_unit=time_unit, time_format=time_format)
    if earlier is not None:
        schema = earlier.encoders.schema
    elif schema is None:
        schema = schema_for(source, path, missing=missing, time_unit=time_unit, time_format=time_format, keep=keep)
    else:
        schema = with_reading(schema, missing, time_unit, time_format)
    if not schema.labels:
        raise ValueError(
            f"{path}: no label found (a column of 0 and 1 called label, click or the like); "
            "write a schema with `fullrank data inspect FILE --out schema.json`, name the label in it, and pass it"
        )
    report = out.with_name(f"{out.name}.rejected.tsv")
    read_log(
        source,
        path,
        schema,
        out,
        split=split,
        keep=keep,
        max_bad=max_bad,
        overwrite=overwrite,
        progress=progress,
        earlier=earlier,
        report=report,
        forgotten=forgotten,
    )
    report.unlink(missing_ok=True)
    return Dataset.open(out)
