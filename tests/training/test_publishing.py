"""A publish that is killed at any of its calls leaves the pointer at something whole, and is done again to the same."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from streams import KillAt, Killed, files
from tables import SCHEMA, frame
from torch import Tensor

from fullrank.data.encoders import Encoders
from fullrank.embeddings import EmbeddingOptimizer
from fullrank.models import RankerSpec
from fullrank.training import TrainerConfig
from fullrank.training.learner import Fitted, RankerLearner
from fullrank.training.publisher import Publisher, State
from fullrank.training.publishing import clear_leftovers, open_current, read_pointer


class Publishing:
    """A stream's directory that has published a bundle and a delta, and what is published next."""

    def __init__(self, directory: Path) -> None:
        torch.manual_seed(0)
        spec = RankerSpec.of({"name": "deepfm", "embedding_dim": 4, "embedding_init": 0.5, "hidden": [8]})
        fitted = Fitted(
            spec.build(SCHEMA), TrainerConfig(batch_size=50, learning_rate=0.05), EmbeddingOptimizer(kind="adagrad")
        )
        self.learner = RankerLearner(fitted, Encoders.without_fitting(SCHEMA), "recipe")
        self.publisher = Publisher(directory, State(), "recipe", with_deltas=True)
        self._learn(1)
        self.publisher.publish(self.learner, "a", 1, "window a", {})
        self.publisher.point()
        self._learn(2)
        self.publisher.delta(self.learner, 2)
        self._learn(3)

    def _learn(self, seed: int) -> None:
        self.learner.learn(frame(100, seed), seed)

    def next(self, what: str) -> None:
        if what == "delta":
            self.publisher.delta(self.learner, 3)
        else:
            self.publisher.publish(self.learner, "b", 3, "window b", {})
            self.publisher.point()
            self.publisher.prune(1)


def served(directory: Path) -> dict[str, Tensor]:
    return open_current(directory)[0].state_dict()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("what", ["delta", "bundle"])
def test_killed_at_every_call(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, out = Publishing(tmp_path / "begun"), tmp_path / "out"
    before = served(tmp_path / "begun")

    def there() -> Publishing:
        """The same, in `out`."""
        copied = copy.deepcopy(begun)
        copied.publisher.directory = out
        return copied

    def anew() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "begun", out)

    anew()
    there().next(what)
    after, whole = served(out), files(out)
    assert not same(before, after)
    at, seen, ended = 0, set(), False
    while not ended:
        at += 1
        anew()
        with monkeypatch.context() as patched:
            KillAt(patched, at)
            try:
                there().next(what)
                ended = True
            except Killed:
                pass
        now = served(out)
        assert same(now, before) or same(now, after)
        seen.add(same(now, after))
        clear_leftovers(out)
        there().next(what)
        assert files(out) == whole
    assert at > 10 and seen == {False, True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": 0}, "number"),
        ({"bundle": "../elsewhere"}, "lies outside the stream"),
        ({"colour": "red"}, "colour"),
        ({"base": "f" * 64}, None),
    ],
)
def test_a_pointer_that_is_wrong_is_refused(change: dict[str, object], message: str | None, tmp_path: Path) -> None:
    Publishing(tmp_path / "out")
    path = tmp_path / "out" / "current.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if message is None:
        with pytest.raises(ValueError, match="another bundle than the one that the pointer means"):
            open_current(tmp_path / "out")
    else:
        with pytest.raises(ValueError, match=message) as refused:
            read_pointer(tmp_path / "out")
        assert "\n" not in str(refused.value)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_pointer(tmp_path / "out")
