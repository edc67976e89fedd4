"""Mutated files of every format through `inspect` and `import`: tracebacks, hangs and memory.

    python -m benchmarks.import_fuzz [--files 10000] [--seed 0] [--format csv ...]

A small good log of each format is written once. File number n takes one of them and changes one of its files: bits
flipped, bytes removed or repeated, cut short, separators and line ends exchanged, another encoding, huge numbers,
control characters, quotes, lines of other length. It is then inspected and imported (all bad rows allowed) in a worker
process that is used again and again. What is counted:

- tracebacks: anything but success, or a refusal in one line that is the importer's own and not a library's; a worker
  that dies, and a library's warning that reaches the user;
- hangs: more than 20 seconds;
- memory: a resident size above 500 MB while the file is read.

What fails is written to a folder of its own and tried once more by the command in a new process. Number n alone decides
a file (with --seed), so `--only N` repeats it.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.machine import write

SECONDS, MEGABYTES = 20.0, 500
ROWS = 60
# A worker is replaced after so many files, so that one file's memory is not another's.
FILES_PER_WORKER = 500

Files = dict[str, bytes]


def _rows(generator: random.Random) -> list[tuple[Any, ...]]:
    cities = ("Oslo", "São Paulo", "Rome, Italy", 'the "Big" one', "")
    return [
        (
            generator.randrange(2), f"u{generator.randrange(9)}", generator.randrange(12),
            round(generator.gauss(5, 3), 2), generator.choice(cities),
            "^".join(f"t{generator.randrange(5)}" for _ in range(generator.randrange(4))),
            1_600_000_000 + 60 * row,
        )
        for row in range(ROWS)
    ]  # fmt: skip


HEADER = ("click", "user_id", "item_id", "price", "city", "tags", "timestamp")


def _text(generator: random.Random, separator: str, *, quoted: bool) -> bytes:
    def cell(value: Any) -> str:
        text = str(value)
        return (
            '"' + text.replace('"', '""') + '"' if quoted and any(each in text for each in ('"', separator)) else text
        )

    lines = [separator.join(HEADER), *(separator.join(map(cell, row)) for row in _rows(generator))]
    return ("\n".join(lines) + "\n").encode()


def _csv(generator: random.Random) -> Files:
    return {"log.csv": _text(generator, generator.choice(",;|"), quoted=True)}


def _tsv(generator: random.Random) -> Files:
    return {"log.tsv": _text(generator, "\t", quoted=False)}


def _packed(generator: random.Random) -> Files:
    import pyarrow as pa

    text = _text(generator, ",", quoted=True)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("log.csv", text)
    kinds = {
        "log.csv.gz": gzip.compress(text, mtime=0),
        "log.csv.bz2": bz2.compress(text),
        "log.csv.zst": pa.compress(text, "zstd", asbytes=True),
        "log.csv.zip": whole.getvalue(),
    }
    name = generator.choice(sorted(kinds))
    return {name: kinds[name]}


def _parquet(generator: random.Random) -> Files:
    import polars as pl

    frame = pl.DataFrame(_rows(generator), schema=list(HEADER), orient="row").with_columns(
        pl.col("tags").str.split("^"), big=pl.lit(2**63, dtype=pl.UInt64), when=pl.lit("2024-01-01").str.to_date()
    )
    whole = io.BytesIO()
    frame.write_parquet(whole, compression=generator.choice(["uncompressed", "snappy"]))  # type: ignore[arg-type]
    return {"log.parquet": whole.getvalue()}


def _jsonl(generator: random.Random) -> Files:
    lines = [
        json.dumps({**dict(zip(HEADER, row, strict=True)), "history": [{"item": row[2], "age": row[3]}] * (row[2] % 3)})
        for row in _rows(generator)
    ]
    return {"log.jsonl": ("\n".join(lines) + "\n").encode()}


def _criteo(generator: random.Random) -> Files:
    lines = []
    for _ in range(ROWS):
        counts = [generator.choice(["", str(generator.randrange(-1, 900))]) for _ in range(13)]
        codes = [generator.choice(["", f"{generator.randrange(50):08x}"]) for _ in range(26)]
        lines.append("\t".join([str(generator.randrange(2)), *counts, *codes]))
    return {"train.txt": ("\n".join(lines) + "\n").encode()}


def _avazu(generator: random.Random) -> Files:
    from fullrank.data.formats.avazu import COLUMNS

    lines = [",".join(COLUMNS)]
    for row in range(ROWS):
        rest = [f"{generator.randrange(20):x}" for _ in COLUMNS[3:]]
        lines.append(",".join([str(10**18 + row), str(generator.randrange(2)), f"141021{row % 24:02d}", *rest]))
    return {"train.csv": ("\n".join(lines) + "\n").encode()}


def _amazon(generator: random.Random) -> Files:
    reviews = [
        json.dumps({"reviewerID": f"U{row % 5}", "asin": f"B{row % 8:03d}", "unixReviewTime": 1382400000 + 86400 * row})
        for row in range(ROWS)
    ]
    about = [repr({"asin": f"B{place:03d}", "categories": [["Toys", f"c{place % 2}"]]}) for place in range(8)]
    return {"reviews_Toys_5.json": "\n".join(reviews).encode(), "meta_Toys.json": "\n".join(about).encode()}


def _sequences(generator: random.Random) -> Files:
    lines = [" ".join(str(generator.randrange(1, 20)) for _ in range(8)) for _ in range(20)]
    about = {str(item): [generator.randrange(9) for _ in range(3)] for item in range(1, 20)}
    return {"Toys.txt": "\n".join(lines).encode(), "Toys_item2attributes.json": json.dumps(about).encode()}


def _sessions(generator: random.Random) -> Files:
    times = [f"2014-04-07T{10 + n // 60:02d}:{n % 60:02d}:09.277Z" for n in range(ROWS)]
    lines = [f"{n // 4},{time},{generator.randrange(20)},0" for n, time in enumerate(times)]
    return {"yoochoose-clicks.dat": "\n".join(lines).encode() + b"\n"}


def _views(generator: random.Random) -> Files:
    lines = [f"{n // 4};NA;{generator.randrange(20)};{n * 977};2016-05-09" for n in range(ROWS)]
    items = [f"{item};{item % 5}" for item in range(20)]
    return {
        "train-item-views.csv": "\n".join(["sessionId;userId;itemId;timeframe;eventdate", *lines]).encode() + b"\n",
        "product-categories.csv": "\n".join(["itemId;categoryId", *items]).encode() + b"\n",
    }


def _item_lists(generator: random.Random) -> Files:
    lists = [" ".join(str(generator.randrange(20)) for _ in range(generator.randrange(9))) for _ in range(ROWS)]
    return {"sessions.txt": "\n".join(lists).encode() + b"\n"}


def _taobao(generator: random.Random) -> Files:
    from fullrank.data.formats.taobao_ad import PROFILE

    ads = [f"{place},{place % 3},{place},{place},NULL,{place}.5" for place in range(9)]
    users = [",".join([str(place), *(str(generator.randrange(4)) for _ in PROFILE)]) for place in range(7)]
    shown = [f"{row % 7},{1494000000 + row * 9000},{row % 9},430548_1007,0,{row % 2}" for row in range(ROWS)]
    done = [f"{row % 7},{1494000000 + row * 8000},pv,{row % 3},{row % 4}" for row in range(ROWS)]
    files = {
        "ad_feature.csv": ["adgroup_id,cate_id,campaign_id,customer,brand,price", *ads],
        "user_profile.csv": [",".join(["userid", *PROFILE]), *users],
        "raw_sample.csv": ["user,time_stamp,adgroup_id,pid,nonclk,clk", *shown],
        "behavior_log.csv": ["user,time_stamp,btag,cate,brand", *done],
    }
    return {name: ("\n".join(lines) + "\n").encode() for name, lines in files.items()}


def _kuaivideo(generator: random.Random) -> Files:
    lines = ["timestamp,user_id,item_id,is_click,is_like,is_follow,pos_items,neg_items"]
    lines += [f"{row},{row % 5},{row % 9},{row % 2},0,0,{row % 9}^{row % 4},{row % 7}" for row in range(ROWS)]
    return {"train.csv": "\n".join(lines).encode(), "test.csv": "\n".join(lines[:20]).encode()}


def _ipinyou(generator: random.Random) -> Files:
    from fullrank.data.formats.ipinyou import COLUMNS

    lines = []
    for row in range(ROWS):
        values = [str(generator.randrange(9)) for _ in COLUMNS]
        values[COLUMNS.index("bid_id")] = f"b{row}"
        values[COLUMNS.index("time")] = f"201306060001{row % 60:02d}000"
        lines.append("\t".join(values))
    return {"imp.20130606.txt": "\n".join(lines).encode(), "clk.20130606.txt": "\n".join(lines[::9]).encode()}


def _libfm(generator: random.Random) -> Files:
    width = generator.choice([lambda: 4, lambda: generator.randrange(1, 6)])
    lines = [
        f"{generator.choice([-1, 1])} " + " ".join(f"{generator.randrange(99)}:1" for _ in range(width()))
        for _ in range(ROWS)
    ]
    return {"log.libfm": ("\n".join(lines) + "\n").encode()}


def _letor(generator: random.Random) -> Files:
    lines = [
        f"{row % 3} qid:{row // 7} " + " ".join(f"{place}:{generator.random():.3f}" for place in range(1, 6)) + " # doc"
        for row in range(ROWS)
    ]
    return {"train.txt": ("\n".join(lines) + "\n").encode()}


def _movielens(generator: random.Random) -> Files:
    rows = [(row % 6 + 1, row % 9 + 1, generator.randrange(1, 6), 1000 + row) for row in range(ROWS)]
    if generator.random() < 0.5:
        ratings = ["userId,movieId,rating,timestamp", *(f"{u},{i},{r}.0,{t}" for u, i, r, t in rows)]
        movies = ["movieId,title,genres", *(f'{place},"A, the ({1990 + place})",War|Drama' for place in range(1, 10))]
        return {"ratings.csv": "\n".join(ratings).encode(), "movies.csv": "\n".join(movies).encode()}
    return {
        "ratings.dat": "\n".join(f"{u}::{i}::{r}::{t}" for u, i, r, t in rows).encode(),
        "movies.dat": "\n".join(f"{place}::Caf\xe9 ({1990 + place})::War" for place in range(1, 10)).encode("latin-1"),
        "users.dat": "\n".join(f"{place}::F::25::3::12345" for place in range(1, 7)).encode(),
    }


def _recbole(generator: random.Random) -> Files:
    inter = ["user_id:token\titem_id:token\titem_id_list:token_seq\trating:float\ttimestamp:float"]
    inter += [f"u{row % 5}\t{row % 9}\t{row % 4} {row % 3}\t{row % 2}\t{1.6e9 + row}" for row in range(ROWS)]
    items = ["item_id:token\tgenre:token_seq\tyear:float", *(f"{place}\ta b\t{1990 + place}" for place in range(9))]
    return {"ml.inter": "\n".join(inter).encode(), "ml.item": "\n".join(items).encode()}


def _mind(generator: random.Random) -> Files:
    behaviors = [
        f"{row}\tU{row % 5}\t11/{row % 28 + 1}/2019 9:05:58 AM\tN1 N{row % 4}\tN{row % 9}-1 N{row % 7}-0"
        for row in range(ROWS)
    ]
    news = [f"N{place}\tnews\tworld\tA title\tabout\thttp\t[]\t[]" for place in range(9)]
    return {"behaviors.tsv": "\n".join(behaviors).encode(), "news.tsv": "\n".join(news).encode()}


# What writes a good log, its format, and whether the log is the folder or the one file in it.
SEEDS: dict[str, tuple[Callable[[random.Random], Files], str, bool]] = {
    "csv": (_csv, "csv", False),
    "tsv": (_tsv, "csv", False),
    "packed": (_packed, "csv", False),
    "parts": (_csv, "csv", True),
    "parquet": (_parquet, "parquet", False),
    "jsonl": (_jsonl, "jsonl", False),
    "criteo": (_criteo, "criteo", False),
    "avazu": (_avazu, "avazu", False),
    "amazon": (_amazon, "amazon", True),
    "sequences": (_sequences, "amazon", True),
    "yoochoose": (_sessions, "sessions", False),
    "diginetica": (_views, "sessions", True),
    "item lists": (_item_lists, "sessions", False),
    "taobao-ad": (_taobao, "taobao-ad", True),
    "kuaivideo": (_kuaivideo, "kuaivideo", True),
    "ipinyou": (_ipinyou, "ipinyou", True),
    "libfm": (_libfm, "libfm", False),
    "letor": (_letor, "letor", False),
    "movielens": (_movielens, "movielens", True),
    "recbole": (_recbole, "recbole", True),
    "mind": (_mind, "mind", True),
}
_NUMBERS = (
    b"1e39", b"-1e308", b"1e400", b"nan", b"inf", b"-0", b"9" * 37, b"18446744073709551615", b"-9223372036854775809",
    b"0x10", b"1_000", b"1,5", b"1.5e", b"\xd9\xa1", b"99999999999999", b"1e-320", b"true", b"NULL", b"\\N",
)  # fmt: skip
_PIECES = (
    b",", b"\t", b";", b"|", b"::", b" ", b"\x01", b'"', b"'", b"\r", b"\n", b"\r\n", b"\0", b"\x1a", b"\x1f", b"\x0b",
    b"\xe2\x80\xa8", b"\xff", b"\xef\xbb\xbf", b"#", b"{", b"[", b"\\", b"^", b":", b"\\ud800",
)  # fmt: skip


def _mutated(data: bytes, generator: random.Random) -> bytes:
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        data = generator.choice(_MUTATIONS)(data, generator)
    return data[: 1 << 22]


def _flip(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.choice((1, 1, 4, 32))):
        if changed:
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _cut(data: bytes, generator: random.Random) -> bytes:
    return data[: generator.randrange(len(data) + 1)]


def _span(data: bytes, generator: random.Random) -> tuple[int, int]:
    begin = generator.randrange(len(data) + 1)
    return begin, min(begin + generator.choice((1, 2, 8, 64, 512)), len(data))


def _remove(data: bytes, generator: random.Random) -> bytes:
    begin, end = _span(data, generator)
    return data[:begin] + data[end:]


def _repeat(data: bytes, generator: random.Random) -> bytes:
    begin, end = _span(data, generator)
    return data[:end] + data[begin:end] * generator.choice((1, 1, 3, 1000)) + data[end:]


def _insert(data: bytes, generator: random.Random) -> bytes:
    begin, _ = _span(data, generator)
    return data[:begin] + generator.choice(_PIECES) * generator.choice((1, 1, 2, 300)) + data[begin:]


def _exchange(data: bytes, generator: random.Random) -> bytes:
    first, second = generator.sample(_PIECES, 2)
    return data.replace(first, second, generator.choice((1, 3, -1)))


def _number(data: bytes, generator: random.Random) -> bytes:
    lines = data.split(b"\n")
    place = generator.randrange(len(lines))
    separator = generator.choice((b",", b"\t", b" ", b":", b"::", b";"))
    fields = lines[place].split(separator)
    fields[generator.randrange(len(fields))] = generator.choice(_NUMBERS)
    lines[place] = separator.join(fields)
    return b"\n".join(lines)


def _lines(data: bytes, generator: random.Random) -> bytes:
    lines = data.split(b"\n")
    place = generator.randrange(len(lines))
    way = generator.randrange(5)
    if way == 0:
        lines.insert(place, lines[generator.randrange(len(lines))])
    elif way == 1:
        del lines[place]
    elif way == 2:
        lines[place] += lines[generator.randrange(len(lines))]
    elif way == 3:
        generator.shuffle(lines)
    else:
        lines[place] = generator.choice((b"", b" ", b"# comment", b"sep=;", b"x" * 200_000))
    return b"\n".join(lines)


def _encode(data: bytes, generator: random.Random) -> bytes:
    encoding = generator.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp037"))
    return data.decode("utf-8", "replace").encode(encoding, "replace")


_MUTATIONS = (
    _flip,
    _flip,
    _cut,
    _remove,
    _repeat,
    _insert,
    _insert,
    _exchange,
    _number,
    _number,
    _lines,
    _lines,
    _encode,
)


def make(number: int, seed: int, folder: Path, kinds: list[str]) -> tuple[str, Path]:
    """Write file number n; its kind and the path to import."""
    generator = random.Random(seed * 1_000_003 + number)
    kind = kinds[number % len(kinds)]
    write_seed, _, whole = SEEDS[kind]
    files = write_seed(generator)
    name = generator.choice(sorted(files))
    files[name] = _mutated(files[name], generator)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for each, data in files.items():
        (folder / each).write_bytes(data)
    return kind, folder if whole else folder / next(iter(files))


def _bring(kind: str, path: Path, out: Path) -> str:
    """Inspect and import; what is wrong with the way it ended, or nothing."""
    from fullrank.data.formats import open_format
    from fullrank.data.formats.base import Noted
    from fullrank.data.importing import import_dataset
    from fullrank.data.inference import guessed_schema
    from fullrank.data.splits import SplitSpec

    name = SEEDS[kind][1]

    def inspect() -> None:
        source = open_format(name)
        guessed_schema(source, path)
        if isinstance(source, Noted):
            source.notes(path)

    def bring() -> None:
        import_dataset(name, path, out, split=SplitSpec(kind="none"), max_bad=1.0, overwrite=True)

    # Exceptions inside a library's callbacks are raised nowhere and printed.
    printed: list[str] = []
    sys.unraisablehook = lambda what: printed.append(repr(what.exc_value)[:200])
    for step in (inspect, bring):
        try:
            printed.clear()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if type(error) not in (ValueError, FileNotFoundError) or "\n" in str(error):
                import traceback

                place = traceback.extract_tb(error.__traceback__)[-1]
                ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "fullrank" in frame.filename]
                where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else place.filename
                return f"{step.__name__}: {type(error).__name__} at {where}: {str(error)[:200]!r}"
        if printed:
            return f"{step.__name__}: printed: {printed[0]}"
        # That a column tells what happened is for the user to know.
        strange = [each for each in caught if "is left out: " not in str(each.message)]
        if strange:
            return f"{step.__name__}: {strange[0].category.__name__}: {str(strange[0].message)[:200]}"
    return ""


def _peak_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1000
    return 0.0


def _work(pipe: Connection, seed: int, folder: Path, kinds: list[str]) -> None:
    """Take numbers, give (what is wrong, highest MB)."""
    os.environ["RUST_BACKTRACE"] = "0"
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            number = pipe.recv()
            kind, path = make(number, seed, folder / "log", kinds)
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            pipe.send((_bring(kind, path, folder / "out"), _peak_mb()))


class _Worker:
    def __init__(self, seed: int, folder: Path, kinds: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, seed, folder, kinds), daemon=True)
        self.process.start()
        theirs.close()
        self.done = 0

    def file(self, number: int) -> tuple[str, float]:
        """What is wrong with a file, and the memory it took; the worker is of no use after a hang or a death."""
        # The first file waits for the libraries to be imported.
        self.pipe.send(number)
        if not self.pipe.poll(SECONDS + (60 if not self.done else 0)):
            self.process.kill()
            return "hang", 0.0
        try:
            found: tuple[str, float] = self.pipe.recv()
        except EOFError:
            self.process.join()
            return f"the worker died with {self.process.exitcode}", 0.0
        self.done += 1
        return found

    def end(self) -> None:
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()


def _again(kind: str, path: Path, out: Path) -> str:
    """The command in a process of its own: how it ended."""
    command = [sys.executable, "-c", "from fullrank.cli.main import main; main()"]
    words = ["data", "import", SEEDS[kind][1], str(path), str(out), "--split", "none", "--max-bad", "1", "--overwrite"]
    try:
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, errors="replace", timeout=3 * SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "hang"
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    if done.returncode in (0, 2) and len(lines) <= 1:
        return f"exit code {done.returncode}, {len(lines)} line"
    return f"exit code {done.returncode}: {lines[-1][:200] if lines else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--only", type=int, help="one file alone; it is kept")
    parser.add_argument("--format", nargs="+", choices=sorted(SEEDS), help="only these kinds of logs")
    parser.add_argument("--keep", type=Path, help="folder for the files that fail")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/import_fuzz.json")
    arguments = parser.parse_args()
    kinds = arguments.format or list(SEEDS)
    numbers = (
        [arguments.only] if arguments.only is not None else range(arguments.first, arguments.first + arguments.files)
    )
    keep = arguments.keep or Path(tempfile.mkdtemp(prefix="import-fuzz-"))
    counts: Counter[str] = Counter()
    worst = 0.0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        worker: _Worker | None = None
        for number in numbers:
            if worker is None or worker.done >= FILES_PER_WORKER:
                if worker is not None:
                    worker.end()
                worker = _Worker(arguments.seed, Path(scratch), kinds)
            wrong, peak = worker.file(number)
            worst = max(worst, peak)
            if wrong == "hang" or wrong.startswith("the worker"):
                worker = None
            if not wrong and peak > MEGABYTES:
                wrong = f"memory: {peak:.0f} MB"
            counts["files"] += 1
            if wrong:
                counts["hangs" if wrong == "hang" else "memory" if wrong.startswith("memory") else "tracebacks"] += 1
                kind, path = make(number, arguments.seed, keep / str(number), kinds)
                print(f"seed {arguments.seed} file {number} ({kind}): {wrong}\n  {path}", flush=True)
                print(f"  alone: {_again(kind, path, Path(scratch) / 'alone')}", flush=True)
        if worker is not None:
            worker.end()
    seconds = time.perf_counter() - began
    result = {
        "files": counts["files"],
        "kinds": len(kinds),
        "seed": arguments.seed,
        **{name: counts[name] for name in ("tracebacks", "hangs", "memory")},
        "peak_mb": round(worst),
        "seconds": round(seconds),
    }
    print(" ".join(f"{name}={value}" for name, value in result.items()))
    if arguments.write:
        write("import_fuzz", result)
    if counts["tracebacks"] + counts["hangs"] + counts["memory"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
