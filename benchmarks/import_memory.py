"""Memory of an import against the size of the log: Criteo-shaped files of several gigabytes.

    python -m benchmarks.import_memory --scratch DIR [--gigabytes 1 3 6 11]

Each file is generated, imported by `fullrank data import criteo` in a process of its own, and deleted. It has the
columns of the Criteo log (a label, 13 counts, 26 categories of 8 hexadecimal digits), about its shares of missing
values and, per category, the published number of distinct values of its 46 million rows; the values follow Zipf's law
(the value of rank r comes up with probability proportional to 1/r), so new ones keep coming in large files. Generating
holds one chunk of rows at a time.

Memory is the largest resident size of the import's process, shared and file-backed pages included. The scratch folder
needs about three times the size of the largest file: the file, the spooled rows, the dataset.

A run replaces the results of its sizes in the JSON and keeps those of others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from benchmarks import process_tree
from benchmarks.machine import RESULTS, machine, table, write

# Of the counts: share of missing values, mean and deviation of the logarithm.
COUNTS = (
    (0.45, 0.8, 1.0), (0.0, 2.0, 2.0), (0.21, 2.0, 1.5), (0.22, 1.6, 1.0), (0.03, 7.0, 2.5), (0.22, 3.8, 1.6),
    (0.04, 1.7, 1.5), (0.001, 2.0, 1.2), (0.04, 4.0, 1.4), (0.45, 0.3, 0.5), (0.04, 0.9, 0.9), (0.76, 0.2, 0.7),
    (0.22, 1.6, 1.1),
)  # fmt: skip
# Of the categories: distinct values in the whole log, share of missing values.
CATEGORIES = (
    (1460, 0), (583, 0), (10_131_227, 0.03), (2_202_608, 0.03), (305, 0), (24, 0.12), (12_517, 0), (633, 0), (3, 0),
    (93_145, 0), (5683, 0), (8_351_593, 0.03), (3194, 0), (27, 0), (14_992, 0), (5_461_306, 0.03), (10, 0), (5652, 0),
    (2173, 0.44), (4, 0.44), (7_046_547, 0.03), (18, 0.76), (15, 0), (286_181, 0.03), (105, 0.44), (142_572, 0.44),
)  # fmt: skip
POSITIVE_SHARE = 0.256
CHUNK_ROWS = 100_000
LIMIT_MIB = 2048


def _hex_pairs() -> npt.NDArray[np.uint32]:
    """The four hexadecimal digits of each 16-bit number, as the bytes of one 32-bit number."""
    text = "".join(f"{number:04x}" for number in range(1 << 16))
    return np.frombuffer(text.encode(), dtype="<u4")


HEX = _hex_pairs()


def scramble(numbers: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Another 32-bit number for each, one to one (MurmurHash3's finaliser)."""
    with np.errstate(over="ignore"):
        numbers = (numbers ^ (numbers >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        numbers = (numbers ^ (numbers >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return numbers ^ (numbers >> np.uint32(16))


def category(random: np.random.Generator, rows: int, column: int, distinct: int, missing: float) -> pl.Series:
    """Texts of 8 hexadecimal digits whose ranks follow Zipf's law, some null."""
    # The logarithm of a rank under Zipf's law is uniform.
    rank = np.exp(random.random(rows) * np.log(distinct + 1)).astype(np.uint32)
    value = scramble(rank + np.uint32(column * 0x9E3779B1 & 0xFFFFFFFF))
    digits = np.empty((rows, 2), dtype="<u4")
    digits[:, 0], digits[:, 1] = HEX[value >> np.uint32(16)], HEX[value & np.uint32(0xFFFF)]
    offsets = np.arange(0, 8 * rows + 1, 8, dtype=np.int64)
    valid = np.packbits(random.random(rows) >= missing, bitorder="little")
    buffers = [pa.py_buffer(valid), pa.py_buffer(offsets), pa.py_buffer(digits)]
    series = pl.from_arrow(pa.LargeStringArray.from_buffers(rows, *buffers[1:], buffers[0]))
    assert isinstance(series, pl.Series)
    return series.alias(f"C{column + 1}")


def count(
    random: np.random.Generator, rows: int, column: int, missing: float, mean: float, deviation: float
) -> pl.Series:
    """Log-normal counts, some null."""
    values = np.exp(mean + deviation * random.standard_normal(rows)).astype(np.int32)
    return pl.Series(f"I{column + 1}", values).to_frame().select(
        pl.when(pl.Series(random.random(rows) >= missing)).then(pl.first())
    ).to_series()  # fmt: skip


def generate(path: Path, size: int, seed: int) -> int:
    """Write about `size` bytes of a Criteo-shaped log; returns the number of rows."""
    random = np.random.default_rng(seed)
    rows = 0
    with path.open("wb") as file:
        while file.tell() < size:
            label = pl.Series("label", (random.random(CHUNK_ROWS) < POSITIVE_SHARE).astype(np.int8))
            counts = [count(random, CHUNK_ROWS, column, *facts) for column, facts in enumerate(COUNTS)]
            categories = [category(random, CHUNK_ROWS, column, *facts) for column, facts in enumerate(CATEGORIES)]
            pl.DataFrame([label, *counts, *categories]).write_csv(file, separator="\t", include_header=False)
            rows += CHUNK_ROWS
    return rows


def measure(scratch: Path, gigabytes: float, seed: int) -> dict[str, Any]:
    source, out = scratch / "criteo-shaped.tsv", scratch / "criteo-shaped"
    began = time.monotonic()
    rows = generate(source, int(gigabytes * 1e9), seed)
    generated_s = time.monotonic() - began
    size = source.stat().st_size
    command = [sys.executable, "-c", "from fullrank.cli.main import main; main()", "data", "import", "criteo"]
    usage = process_tree.run([*command, str(source), str(out), "--overwrite", "--json"])
    report = json.loads(usage.output)
    assert sum(report["rows"].values()) == rows, "every generated row is good"
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {
        "gigabytes": size / 1e9,
        "rows": rows,
        "seconds": usage.wall_s,
        "rows_per_s": rows / usage.wall_s,
        "cpu_s": usage.cpu_s,
        "rows_per_cpu_s": rows / usage.cpu_s,
        "peak_mib": usage.peak_mib_largest,
        "output_gigabytes": written / 1e9,
        "vocabulary_rows": sum(report["tables"].values()),
        "largest_vocabulary": max(report["tables"].values()),
        "generated_s": generated_s,
        "load_before": os.getloadavg()[0],
        "date": machine()["date"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder with room; what is made there is deleted")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 3, 6])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scratch = args.scratch / f"import-memory-{os.getpid()}"
    results = {}
    try:
        scratch.mkdir(parents=True)
        for gigabytes in args.gigabytes:
            results[gigabytes] = measure(scratch, gigabytes, args.seed)
            table([results[gigabytes]], ["gigabytes", "rows", "seconds", "rows_per_s", "rows_per_cpu_s", "peak_mib"])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    earlier = RESULTS / "import_memory.json"
    kept = json.loads(earlier.read_text())["results"] if earlier.exists() else []
    kept = [row for row in kept if round(row["gigabytes"], 1) not in {round(size, 1) for size in results}]
    rows = sorted([*kept, *results.values()], key=lambda row: row["gigabytes"])
    print()
    table(rows, ["gigabytes", "rows", "seconds", "rows_per_s", "rows_per_cpu_s", "peak_mib", "output_gigabytes"])
    write("import_memory", {"seed": args.seed, "limit_mib": LIMIT_MIB, "results": rows})
    over = [row for row in rows if row["peak_mib"] > LIMIT_MIB]
    if over:
        sys.exit(f"{len(over)} of {len(rows)} imports needed more than {LIMIT_MIB} MiB")


if __name__ == "__main__":
    main()
