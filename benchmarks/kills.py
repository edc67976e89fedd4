"""Commands killed at random moments and on full disks: what they leave, and whether the next command heals it.

    python -m benchmarks.kills [--kills 100] [--seed 0] [--sizes 12] [--only import ...] [--keep DIR]

Kills. `data import`, `train` of one model and of a funnel, and `evaluate` get SIGKILL, at moments spread over the whole
command; every third one falls while files take their final names. Import and training run into a free name, over an
earlier result (--overwrite), and from the state that an earlier kill left (--resume). What is counted:

- broken: after the kill something under a final name is neither the old nor the new thing, whole;
- mixed: the model is of one run, the metrics beside it of the other, until the next command;
- failed: the next command, with --resume or --overwrite in turn, does not succeed;
- different: it does not end with the bits of the uninterrupted run;
- stray: files in the output's directory or in TMPDIR that the uninterrupted run does not leave.

Full disks. The same commands write to a tmpfs of too few bytes, from 5 % to 98 % of what the command needs. They have
to end with exit code 2 and one line on stderr, with the earlier result untouched; given room, the next command has to
succeed, as after a kill. That needs the right to mount, in a mount namespace of its own; without it this part is left
out.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import glob
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import table, write

COMMAND = [sys.executable, "-c", "from fullrank.cli.main import main; main()"]
CLONE_NEWNS = 0x20000
# What a command says on a full disk: where, and that.
LINE = re.compile(r"fullrank: home/out\S*: No space left on device\n")
ROOMY = 256 << 20
# One kill in so many waits for the publication of the result.
LATE = 3
COUNTED = ("kills", "publishing", "broken", "mixed", "failed", "different", "stray")


@dataclass(frozen=True)
class Case:
    """A command, where it begins, and where its result is.

    Attributes:
        name: for `--only` and the table.
        kind: `import`, `model`, `funnel` or `evaluate`.
        arguments: of the command, run in the scratch directory; the output is `home/out`.
        begins: the state in `states/` that `home` has before.
        heals: what to add to the arguments for the next command, in turn.
    """

    name: str
    kind: str
    arguments: tuple[str, ...]
    begins: str
    heals: tuple[str, ...]
    flags: tuple[str, ...] = ()


IMPORT = ("data", "import", "csv", "log.csv", "home/out")
TRAIN = ("--resume", "--overwrite")
CASES = [
    Case("import", "import", IMPORT, "empty", ("--overwrite",)),
    Case("import --overwrite", "import", IMPORT, "import-old", ("--overwrite",), ("--overwrite",)),
    *(
        Case(f"train {kind}{' ' + flag if flag else ''}", kind, ("train", f"{kind}.yaml", "--out", "home/out"),
             begins.format(kind), TRAIN, (flag,) if flag else ())
        for kind in ("model", "funnel")
        for flag, begins in (("", "empty"), ("--overwrite", "{}-old"), ("--resume", "{}-cut"))
    ),
    *(
        Case(f"evaluate {kind}", "evaluate", ("evaluate", f"home/out/{thing}", "sim", "--requests", "20", "--json"),
             f"{kind}-new", ("",))
        for kind, thing in (("model", "model"), ("funnel", "bundle"))
    ),
]  # fmt: skip
THING = {"import": ".", "model": "model", "funnel": "bundle"}
# What `evaluate` writes beside the bundle.
PAGE = "out/report-sim-test.html"
# While one of these exists the result is being published.
PUBLISHING = {
    "import": ("home/.out.partial-*/dataset.json",),
    "model": ("home/out/.model.partial-*", "home/out/.next/.model.partial-*"),
    "funnel": ("home/out/.bundle.partial-*", "home/out/.next/.bundle.partial-*"),
}


class Bench:
    """The scratch directory: logs, recipes, the states to begin from, and what every command should end with."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.home, self.tmp = scratch, scratch / "home", scratch / "tmp"
        self.states = scratch / "states"
        for folder in (self.home, self.tmp, self.states / "empty"):
            folder.mkdir(parents=True)
        # PyTorch keeps a cache of its own in TMPDIR, for all that come after.
        own = {"TMPDIR": str(self.tmp), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "torch"), "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **own}
        self.seconds: dict[str, float] = {}
        self.publication: dict[str, float] = {}
        self.said: dict[str, str] = {}

    def start(self, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *arguments], cwd=self.scratch, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str) -> str:
        process = self.start(arguments)
        out, error = process.communicate()
        if process.returncode:
            raise RuntimeError(f"fullrank {' '.join(arguments)}: exit code {process.returncode}: {error}")
        return out

    def begin(self, state: str) -> None:
        """Put the home into a state."""
        for entry in self.home.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for entry in self.tmp.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.copytree(self.states / state, self.home, dirs_exist_ok=True, symlinks=True)

    def prepare(self) -> None:
        """Make the logs, and what a complete, an older and a half-finished command leave."""
        for name, rows in (("log", 3000), ("older", 2000)):
            generator = random.Random(name)
            lines = ["click,user_id,item_id,price,city,timestamp"]
            for row in range(rows):
                user, item, price = generator.randrange(99), generator.randrange(60), generator.gauss(5, 2)
                lines.append(f"{generator.randrange(2)},u{user},{item},{price:.2f},c{user % 7},{1_600_000_000 + row}")
            (self.scratch / f"{name}.csv").write_text("\n".join(lines) + "\n")
        small = {"name": "dcn_v2", "hidden": [16], "embedding_dim": 4}
        training = {"epochs": 2, "batch_size": 256, "checkpoint_every": 3, "learning_rate": 0.01}
        common: dict[str, Any] = {"data": {"dataset": "sim"}, "threads": 1}
        funnel = {
            "retrieval": {"epochs": 1},
            "early": {"training": {**training, "epochs": 1}},
            "final": {"model": small, "training": training},
        }
        for name, recipe in (("model", {"model": small, "training": training}), ("funnel", {"funnel": funnel})):
            (self.scratch / f"{name}.yaml").write_text(yaml.safe_dump({**common, **recipe}))
        self.run("data", "simulate", "sim", "--impressions", "3000")
        seeds = {"model": "training.seed=9", "funnel": "funnel.final.training.seed=9"}
        for kind in ("import", "model", "funnel"):
            old = (*IMPORT[:3], "older.csv", IMPORT[4]) if kind == "import" else ("--set", seeds[kind])
            arguments = IMPORT if kind == "import" else ("train", f"{kind}.yaml", "--out", "home/out")
            for age, command in (("new", arguments), ("old", old if kind == "import" else (*arguments, *old))):
                self.begin("empty")
                self.run(*command)
                shutil.copytree(self.home, self.states / f"{kind}-{age}")
            if kind != "import":
                out = self.home / "out"
                self.begin(f"{kind}-new")
                shutil.rmtree(out / THING[kind])
                (out / "metrics.json").unlink()
                places = sorted(out.glob("**/checkpoints"))
                shutil.rmtree(max(places[-1].iterdir()))
                shutil.copytree(self.home, self.states / f"{kind}-cut")

    def measure(self, case: Case) -> None:
        """How long the command takes, and how long it publishes, without a kill."""
        self.begin(case.begins)
        process = self.start((*case.arguments, *case.flags))
        began = time.perf_counter()
        first = last = 0.0
        while process.poll() is None:
            if self.publishing(case):
                first, last = first or time.perf_counter(), time.perf_counter()
            elif first and (self.home / "out" / ".lock").exists():
                last = time.perf_counter()
            time.sleep(0.0005)
        self.seconds[case.name] = time.perf_counter() - began
        self.publication[case.name] = last - first
        out, error = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{case.name}: {error}")
        self.said[case.name] = out
        faults = self.healed(case, 0, out)
        if faults:
            raise RuntimeError(f"{case.name}: two uninterrupted runs differ: {faults}")

    def publishing(self, case: Case) -> bool:
        return any(glob.glob(str(self.scratch / pattern)) for pattern in PUBLISHING.get(case.kind, ()))

    # What is looked at

    def reference(self, case: Case, age: str) -> Path:
        return self.states / f"{case.kind}-{age}" / "out"

    def broken(self, case: Case) -> Iterator[tuple[str, str]]:
        """After a kill: what is not whole under its final name, and what does not belong together."""
        out = self.home / "out"
        for page in (out / "report.html", self.home / PAGE):
            if page.exists() and not page.read_text().endswith("</html>\n"):
                yield "broken", f"{page.name} is cut off"
        if case.kind == "evaluate":
            thing = case.arguments[1].removeprefix("home/")
            if digest(self.home / thing) != digest(self.states / case.begins / thing):
                yield "broken", "evaluate changed the bundle"
            return
        for entry in self.home.iterdir():
            if entry != out and not entry.name.startswith("."):
                yield "broken", f"{entry.name} beside the output"
        ages: dict[str, str] = {}
        thing = out / THING[case.kind]
        if thing.exists() and (case.kind != "import" or out.exists()):
            for age in ("old", "new"):
                if (self.states / f"{case.kind}-{age}").exists() and digest(thing) == digest(
                    self.reference(case, age) / THING[case.kind]
                ):
                    ages["thing"] = age
            if "thing" not in ages:
                yield "broken", f"{thing.name} is neither old nor new"
            fault = opens(case.kind, thing)
            if fault:
                yield "broken", fault
        if case.kind == "import":
            return
        for name in ("recipe.json", "metrics.json"):
            if (out / name).exists():
                try:
                    json.loads((out / name).read_text())
                except ValueError as error:
                    yield "broken", f"{name}: {error}"
        if (out / "metrics.json").exists():
            found = numbers(out)
            for age in ("old", "new"):
                if found == numbers(self.reference(case, age)):
                    ages["metrics"] = age
            if "metrics" not in ages:
                yield "broken", "metrics.json is neither old nor new"
        for step in out.glob("**/checkpoints/step-*"):
            fault = opens("checkpoint", step)
            if fault and ".next" not in step.parts:
                yield "broken", fault
        if len(set(ages.values())) > 1:
            yield "mixed", f"{ages}"

    def healed(self, case: Case, code: int, said: str) -> list[tuple[str, str]]:
        """After the next command: what is not as after an uninterrupted run."""
        faults = []
        age = self.states / (case.begins if case.kind == "evaluate" else f"{case.kind}-new")
        if code:
            faults.append(("failed", said.strip()[-300:]))
        elif case.kind == "evaluate":
            if said != self.said[case.name]:
                faults.append(("different", "other metrics"))
        else:
            place = Path("out") / THING[case.kind]
            if not (self.home / place).exists() or digest(self.home / place) != digest(age / place):
                faults.append(("different", f"{place} has other bits"))
            elif case.kind != "import" and numbers(self.home / "out") != numbers(age / "out"):
                faults.append(("different", "metrics.json has other numbers"))
        kept = listing(age) | ({PAGE} if case.kind == "evaluate" else set())
        faults += [("stray", name) for name in sorted(listing(self.home) - kept)]
        faults += [("different", f"{name} is missing") for name in sorted(kept - listing(self.home)) if not code]
        return faults + [("stray", f"TMPDIR/{name}") for name in sorted(listing(self.tmp))]

    # What is done

    def kill(self, case: Case, moment: float, late: float | None) -> bool | None:
        """Kill the command; whether it was publishing then, None if it had ended.

        Args:
            moment: seconds from its start.
            late: seconds from the beginning of its publication instead.
        """
        process = self.start((*case.arguments, *case.flags))
        began = time.perf_counter()
        if late is not None:
            while process.poll() is None and not self.publishing(case):
                time.sleep(0.0002)
            began, moment = time.perf_counter(), late
        left = began + moment - time.perf_counter()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(left, 0.0))
            if late is None:  # the machine is faster than when it was measured
                self.seconds[case.name] = min(self.seconds[case.name], time.perf_counter() - began)
        hit = process.poll() is None
        process.kill()
        process.communicate()
        return (late is not None or self.publishing(case)) if hit else None

    def heal(self, case: Case, flag: str) -> list[tuple[str, str]]:
        if "--overwrite" in case.flags and not (self.home / "out" / ".next").exists():
            thing = THING[case.kind]
            if digest(self.home / "out" / thing) == digest(self.reference(case, "old") / thing):
                flag = "--overwrite"  # the new run had not begun: there is nothing of it to resume
        process = self.start((*case.arguments, *([flag] if flag else [])))
        out, error = process.communicate()
        return self.healed(case, process.returncode, out if not process.returncode else error)


def digest(path: Path) -> str:
    """Of names and contents below a directory."""
    whole = hashlib.sha256()
    for name in sorted(listing(path)):
        whole.update(f"{name}\0".encode())
        if (path / name).is_file():
            whole.update(hashlib.sha256((path / name).read_bytes()).digest())
    return whole.hexdigest()


def listing(path: Path) -> set[str]:
    return {entry.relative_to(path).as_posix() for entry in path.rglob("*")}


def numbers(run: Path) -> Any:
    """The metrics of a run, without its times and places."""
    content = json.loads((run / "metrics.json").read_text())
    return {name: content.get(name) for name in ("valid", "test", "tasks")}


def opens(kind: str, path: Path) -> str:
    """What is wrong with a dataset, a bundle or a checkpoint; nothing if it opens."""
    from fullrank.data.dataset import Dataset
    from fullrank.funnel.bundle import load_bundle
    from fullrank.training import checkpoint

    try:
        if kind == "import":
            dataset = Dataset.open(path)
            for split in dataset.splits:
                dataset.scan(split).collect()
        elif kind == "checkpoint":
            checkpoint.read(path)
        else:
            load_bundle(path)
    except Exception as error:
        return f"{path.name}: {error!r}"
    return ""


def kills(bench: Bench, cases: list[Case], total: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    for number, case in enumerate(cases):
        count = total // len(cases) + (number < total % len(cases))
        generator = random.Random(f"{seed} {case.name}")
        bench.measure(case)
        seconds = bench.seconds[case.name]
        found: Counter[str] = Counter()
        faults = []
        for nth, flag in zip(range(count), itertools.cycle(case.heals), strict=False):
            hit = None
            while hit is None:
                bench.begin(case.begins)
                late = None
                if nth % LATE == LATE - 1 and bench.publication[case.name]:
                    late = generator.random() * bench.publication[case.name] * 1.2
                moment = (nth + generator.random()) / count * bench.seconds[case.name]
                hit = bench.kill(case, moment, late)
            found["kills"] += 1
            found["publishing"] += hit
            seen = [*bench.broken(case), *bench.heal(case, flag)]
            found.update({what for what, _ in seen})
            for what, text in seen:
                when = f"{moment:.3f} s" if late is None else f"publication + {1000 * late:.0f} ms"
                faults.append(f"{case.name} #{nth}, {when}, then {flag}: {what}: {text}")
                print(faults[-1], flush=True)
        counted = {name: found[name] for name in COUNTED}
        rows.append({"command": case.name, **counted, "seconds": round(seconds, 2), "faults": faults})
        table(rows[-1:], ["command", *COUNTED, "seconds"])
    return rows


def keep_mounts_private() -> str:
    """Let what is mounted from now on be seen by this process and its children alone; why not, if that is denied.

    Threads that exist by then keep the old view.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(CLONE_NEWNS):
        return f"no mount namespace of its own: {os.strerror(ctypes.get_errno())}"
    return tried(["mount", "--make-rprivate", "/"])


def tried(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip() or "denied" if done.returncode else ""


def mount(bench: Bench, size: int, *options: str) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(bench.home)]


def used(path: Path) -> int:
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def full(bench: Bench, cases: list[Case], sizes: int) -> list[dict[str, Any]]:
    """Each command on a disk with too little room, more in each turn."""

    def resize(size: int) -> None:
        subprocess.run(mount(bench, size, "remount"), check=True)

    rows = []
    for case in cases:
        resize(ROOMY)
        bench.begin(case.begins)
        before = most = used(bench.home)
        process = bench.start((*case.arguments, *case.flags))
        while process.poll() is None:
            most = max(most, used(bench.home))
            time.sleep(0.0005)
        process.communicate()
        bench.said[case.name] = ""
        found: Counter[str] = Counter()
        faults = []
        for nth, flag in zip(range(sizes), itertools.cycle(case.heals), strict=False):
            share = 0.05 + 0.93 * nth / max(sizes - 1, 1)
            resize(ROOMY)
            bench.begin(case.begins)
            resize(max(used(bench.home) + int(share * (most - before)), 4096))
            process = bench.start((*case.arguments, *case.flags))
            _, error = process.communicate()
            seen = []
            found["disks"] += 1
            if process.returncode == 0:
                found["had room"] += 1
            else:
                lines = error.strip().splitlines()
                if process.returncode != 2 or len(lines) != 1 or not LINE.match(error):
                    seen.append(("unclear", f"exit code {process.returncode}: {error.strip()[-300:]}"))
                seen += list(bench.broken(case))
                if case.begins != "empty" and any(
                    digest(path) != digest(bench.home / path.relative_to(bench.states / case.begins))
                    for path in (bench.states / case.begins / "out").iterdir()
                    if path.is_dir()
                ):
                    seen.append(("broken", "the earlier result was touched"))
            left = sorted(name for name in listing(bench.home) - listing(bench.states / case.begins))
            hidden = [name for name in left if ".partial" in name or ".lock" in name]
            if process.returncode and hidden:
                seen.append(("stray", f"left at once: {hidden[:3]}"))
            resize(ROOMY)
            seen += bench.heal(case, flag)
            found.update({what for what, _ in seen})
            for what, text in seen:
                faults.append(f"{case.name}, {share:.0%} of {most - before:,} bytes, then {flag}: {what}: {text}")
                print(faults[-1], flush=True)
        counted = {name: found[name] for name in ("disks", "had room", "unclear", *COUNTED[2:])}
        rows.append({"command": case.name, **counted, "bytes": most - before, "faults": faults})
        table(rows[-1:], ["command", *counted, "bytes"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", type=int, default=12, help="full disks per command; 0 leaves them out")
    parser.add_argument("--only", nargs="+", help="the commands whose names begin so; nothing is written then")
    parser.add_argument("--keep", type=Path, help="a new directory to work in, which is kept")
    options = parser.parse_args()
    cases = [case for case in CASES if not options.only or case.name.startswith(tuple(options.only))]
    scratch = Path(tempfile.mkdtemp(prefix="kills-")) if options.keep is None else options.keep.absolute()
    reason = keep_mounts_private() if options.sizes else "left out by --sizes 0"
    began = time.perf_counter()
    try:
        bench = Bench(scratch)
        bench.prepare()
        killed = kills(bench, cases, options.kills, options.seed) if options.kills else []
        middle = time.perf_counter()
        filled: list[dict[str, Any]] = []
        reason = reason or tried(mount(bench, ROOMY))
        if reason:
            print(f"full disks are left out: {reason}")
        else:
            try:
                filled = full(bench, [case for case in cases if case.begins.endswith(("empty", "old"))], options.sizes)
            finally:
                subprocess.run(["umount", str(bench.home)], check=False)
        print()
        table(killed, ["command", *COUNTED, "seconds"])
        table(filled, ["command", "disks", "had room", "unclear", *COUNTED[2:], "bytes"])
        end = time.perf_counter()
        if not options.only:
            write(
                "kills",
                {
                    "seed": options.seed,
                    "seconds": {"kills": round(middle - began), "disks": round(end - middle)},
                    "kills": killed,
                    "disks": filled or reason,
                },
            )
    finally:
        if options.keep is None:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
