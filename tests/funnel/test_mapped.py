"""Facts about a bundle whose large arrays are mapped from files that other processes map too."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.data.importing import import_dataset
from fullrank.funnel import Funnel, Scorer, load_bundle, save_bundle
from fullrank.funnel.deltas import with_deltas
from fullrank.funnel.item_changes import ChangedItems, ItemState
from fullrank.funnel.mapped import write_arrays
from fullrank.funnel.recent_events import Event
from fullrank.funnel.requests import Request
from fullrank.models import MODELS
from fullrank.schema import Categorical, Label, Schema
from fullrank.training.deltas import position_of, state_of, write_delta

ROWS, WIDTH = 200_000, 64
MIB = 2**20
# Prints the anonymous memory that opening and asking has added, in MiB; mapped or not.
MEMORY = """
import sys
from pathlib import Path
import torch
from fullrank.funnel import load_bundle
from fullrank.models import MODELS
from fullrank.training.memory import return_freed_memory

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024

MODELS["fm"], torch.zeros(1, device="meta").mul(1.0)
before = anonymous()
scorer = load_bundle(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
scorer.score([{"C1": str(row)} for row in range(0, 200_000, 200)])
return_freed_memory()
print(anonymous() - before)
"""


@pytest.fixture(scope="module")
def bundle(funnel: Funnel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mapped")
    save_bundle(funnel, place / "bundle")
    write_arrays(funnel, place / "arrays")
    return place


def opened(bundle: Path) -> Funnel:
    funnel = load_bundle(bundle / "bundle", bundle / "arrays")
    assert isinstance(funnel, Funnel)
    return funnel


def hashes(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_mapped_bundle_answers_as_the_bundle(funnel: Funnel, bundle: Path) -> None:
    mapped = opened(bundle)
    assert funnel.users is not None
    users = funnel.users.ids
    event = Event(funnel.items.ids[3], 2_000_000_000, {"click": 1.0})
    requests = [
        Request(),
        Request("nobody", {"hour": "7"}),
        *map(Request, users[:20]),
        *(Request(user, events=[event]) for user in users[20:40]),
    ]
    for alone, other in zip(funnel.recommend(requests, 10), mapped.recommend(requests, 10), strict=True):
        assert [item.item_id for item in alone.items] == [item.item_id for item in other.items]
        assert [item.predictions for item in alone.items] == [item.predictions for item in other.items]
    names = [*funnel.items.ids[:5], "unknown"]
    assert funnel.score(requests[-1], names) == mapped.score(requests[-1], names)


def test_items_change_as_those_of_the_bundle_and_leave_the_files_as_they_are(funnel: Funnel, bundle: Path) -> None:
    before = hashes(bundle / "arrays")
    mapped = opened(bundle)
    best = mapped.recommend([Request()], 1)[0].items[0].item_id
    states = {
        "1000": ItemState(features={"category": "1"}, bid=1e6),
        str(best): ItemState(removed=True),
    }
    changed = [ChangedItems(each).prepare(states, 0.0).apply() for each in (mapped, load_bundle(bundle / "bundle"))]
    found, expected = ([item.item_id for item in each.recommend([Request()], 50)[0].items] for each in changed)
    assert found == expected and best not in found
    assert changed[0].items.row(1000) is not None and mapped.items.row(1000) is None
    assert mapped.recommend([Request()], 1)[0].items[0].item_id == best
    assert hashes(bundle / "arrays") == before


def test_what_one_writes_to_its_weights_no_other_sees(bundle: Path) -> None:
    before, one, other = hashes(bundle / "arrays"), opened(bundle), opened(bundle)
    answer = other.score(Request(), other.items.ids[:3])
    with torch.no_grad():
        for parameter in one.final.parameters():
            parameter.add_(1.0)
    assert one.score(Request(), one.items.ids[:3]) != answer
    assert other.score(Request(), other.items.ids[:3]) == answer == opened(bundle).score(Request(), other.items.ids[:3])
    assert hashes(bundle / "arrays") == before


def test_deltas_change_it_as_the_bundle_and_leave_the_files_as_they_are(bundle: Path, tmp_path: Path) -> None:
    plain, one, other = load_bundle(bundle / "bundle"), opened(bundle), opened(bundle)
    assert isinstance(plain, Funnel)
    position, files = position_of(bundle / "bundle"), hashes(bundle / "arrays")
    before = {name: tensor.clone() for name, tensor in state_of(plain.rankers).items()}
    after = {name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    write_delta(tmp_path / "delta", before, after, position, schema=plain.schema, until=1)
    requests = [Request(), *map(Request, plain.users.ids[:10] if plain.users is not None else [])]
    expected, _ = with_deltas(plain, [tmp_path / "delta"], position)
    unchanged = plain.recommend(requests, 10)
    for content, in_place in ((one, False), (other, True)):
        newer, _ = with_deltas(content, [tmp_path / "delta"], position, in_place=in_place)
        assert isinstance(newer, Funnel) and isinstance(expected, Funnel)
        weights = (state_of(each.rankers).values() for each in (newer, expected))
        assert all(map(torch.equal, *weights))
        assert torch.equal(newer.prepared["early"][1].whole(), expected.prepared["early"][1].whole())
        # Where weights lie in memory decides on their last bits.
        found, wanted = (each.recommend(requests, 10) for each in (newer, expected))
        for own, full in zip(found, wanted, strict=True):
            values = [item.value for item in full.items]
            assert [item.value for item in own.items] == pytest.approx(values, rel=1e-4, abs=1e-6)
        assert wanted != unchanged
    assert opened(bundle).recommend(requests, 10) == one.recommend(requests, 10)
    assert hashes(bundle / "arrays") == files


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_takes_no_memory_of_its_own_for_tables_and_vocabularies(tmp_path: Path) -> None:
    names = np.arange(ROWS).astype(str)
    pl.DataFrame({"label": np.arange(ROWS) % 2, "C1": names}).write_csv(tmp_path / "log.csv")
    schema = Schema(features=(Categorical(name="C1"),), labels=(Label(name="label"),))
    dataset = import_dataset("csv", tmp_path / "log.csv", tmp_path / "data", schema=schema)
    scorer = Scorer(dataset.encoders, MODELS["fm"].from_config(dataset.schema, {"embedding_dim": WIDTH}))
    save_bundle(scorer, tmp_path / "bundle")
    write_arrays(scorer, tmp_path / "arrays")

    def added(*places: str) -> float:
        command = [sys.executable, "-c", MEMORY, *(str(tmp_path / place) for place in places)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return float(ran.stdout)

    table = len(dataset.encoders.vocabularies["C1"]) * WIDTH * 4 / MIB
    assert table > 35
    assert added("bundle") > table
    assert added("bundle", "arrays") < table / 4
