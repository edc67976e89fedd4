"""Facts about a teacher's and its students' way through a log, and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from typer.testing import CliRunner

from fullrank.cli import main as command
from fullrank.data.dataset import Dataset
from fullrank.data.planted import planted_dataset
from fullrank.training import load_model
from fullrank.training.learner import batches_of
from fullrank.training.recipe import parse_recipe
from fullrank.training.stream import Window, stream
from fullrank.transfer import run
from fullrank.transfer.config import TransferConfig, read_transfer
from fullrank.transfer.embedding_log import EmbeddingLog
from fullrank.transfer.lookup import SECOND
from fullrank.transfer.scoring import TeacherScorer
from fullrank.transfer.teacher_labels import TeacherLabelLog

DAY = 86_400
RANKER = {"name": "dcn_v2", "hidden": [16, 8], "num_cross_layers": 1, "embedding_dim": 4, "embedding_init": 0.01}
TRAINING = {"batch_size": 64, "learning_rate": 0.005}
PRIVATE = [f"elsewhere_{k}" for k in range(4)]


def section(**changes: Any) -> dict[str, Any]:
    history = {"pooling": "mean", "length": 10}
    teacher = {"model": RANKER, "training": TRAINING, "warm_up": 2, "refresh": 2, "staleness": [1, 3], "delay": 3600}
    base = {
        "private": PRIVATE,
        "teacher": teacher,
        "embeddings": {"layers": ["parallel.layers.1"], "dim": 6, "prefix_dims": [3]},
        "student": {"model": RANKER, "training": TRAINING},
        "students": {
            "vm": {"without": ["history"]},
            "kd": {"without": ["history"], "distillation": {"mode": "kd"}},
            "late": {"without": ["history"], "distillation": {"mode": "kd"}, "staleness": 3},
            "loopfm": {"without": ["history"], "history": history},
            "both": {"history": history, "distillation": {"mode": "aux_head+adapter"}},
        },
        "gain": {"x": "vm", "xh": "kd", "xs": "loopfm", "xhs": "both"},
    }
    return {**base, **changes}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    place = tmp_path_factory.mktemp("log") / "d"
    return planted_dataset(place, "cross-domain", 3000, seed=7, users=60, ads=20, days=6)


def parsed(log: Dataset, **changes: Any) -> Any:
    recipe = parse_recipe({"data": {"dataset": str(log.path)}, "transfer": section(**changes), "threads": 1})
    return recipe, read_transfer(recipe, "recipe")


@pytest.fixture(scope="module")
def done(log: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "transfer"
    recipe, config = parsed(log)
    scored = run.score(recipe, config, out, "recipe")
    run.train(recipe, config, out, "recipe")
    return out, scored, run.report(recipe, config, out, "recipe")


@pytest.fixture(scope="module")
def events(log: Dataset) -> pl.DataFrame:
    return pl.concat([log.scan(split).collect() for split in log.splits]).sort("__timestamp")


def test_every_event_after_the_warm_up_is_scored_once_by_who_has_not_seen_it(
    log: Dataset, done: Any, events: pl.DataFrame
) -> None:
    out, scored, _ = done
    begin = events["__timestamp"].min() // DAY * DAY
    after = {late: events.filter(pl.col("__timestamp") >= begin + (1 + late) * DAY) for late in (1, 3)}
    assert scored["labelled"] == {str(late): rows.height for late, rows in after.items()}
    assert scored["inferences"] == sum(scored["labelled"].values()) and scored["embeddings"] == after[1].height
    cutoffs = [about["fm_train_cutoff"] // SECOND for about in scored["versions"].values()]
    assert cutoffs == [begin + 2 * DAY, begin + 4 * DAY]
    labels = TeacherLabelLog(out / "labels" / "1")
    name, about = next(iter(scored["versions"].items()))
    model = load_model(out / "snapshots" / name / "bundle")
    rows = after[1].head(about["events"])
    with torch.inference_mode():
        said = torch.cat([model(batch).logits_BT for batch in batches_of(rows, model.schema, 100)]).sigmoid()
    assert np.allclose(labels.lookup(rows["__request_id"].to_numpy()), said.numpy(), atol=1e-6)
    # Once more asks nobody.
    recipe, config = parsed(log)
    assert run.score(recipe, config, out, "recipe")["inferences"] == 0
    assert labels.n_inferences == after[1].height


def test_students_get_what_was_there(log: Dataset, done: Any, events: pl.DataFrame) -> None:
    out, _, _ = done
    _, config = parsed(log)
    begin = events["__timestamp"].min() // DAY * DAY + 3 * DAY
    rows = events.filter(pl.col("__timestamp").is_between(begin, begin + DAY - 1))
    both = run.TransferColumns(config, "both", log, out)
    got = both.rows(Window(begin, begin + DAY), rows)
    late = got["transfer_teacher"].arr.get(0).is_nan()
    assert (late == (got["__timestamp"] > begin + DAY - 3600)).all() and late.any() and not late.all()
    ages = got["transfer_age"].to_numpy()
    assert np.nanmin(ages) > 3600, "what is not available is not there"
    codes = EmbeddingLog(out / "embeddings")
    assert list(codes.versions) == [next(iter(codes.versions))], "one space for good"
    who = rows["__user_id"].to_numpy()
    counted = [
        min(10, events.filter((pl.col("__user_id") == user) & (pl.col("__timestamp") >= begin - DAY)
                              & (pl.col("__timestamp") + 3600 <= time)).height)
        for user, time in zip(who, rows["__timestamp"], strict=True)
    ]  # fmt: skip
    assert (~np.isnan(ages)).sum(1).tolist() == counted
    assert both.rows(Window(begin - 2 * DAY, begin - DAY), rows).is_empty()


def test_a_killed_call_goes_on_to_the_same_end(log: Dataset, done: Any, tmp_path: Path) -> None:
    out, scored, _ = done
    recipe, config = parsed(log)
    calls = 0

    class Killed(Exception): ...

    class Dying(TeacherScorer):
        def rows(self, window: Window, rows: pl.DataFrame) -> pl.DataFrame:
            nonlocal calls
            calls += 1
            got = super().rows(window, rows)
            if calls == 7:
                raise Killed
            return got

    place = tmp_path / "out"
    place.mkdir()
    with pytest.raises(Killed):
        scorer = Dying(config, log, place / "teacher", place)
        stream(config.recipe_of_teacher(recipe), place / "teacher", hooks=[scorer])
    again = run.score(recipe, config, place, "recipe")
    assert 0 < again["inferences"] < scored["inferences"] and again["versions"] == scored["versions"]
    for late in ("1", "3"):
        ids = np.arange(3000)
        one, other = (TeacherLabelLog(where / "labels" / late).lookup(ids) for where in (out, place))
        assert np.array_equal(one, other, equal_nan=True)
    one, other = (
        EmbeddingLog(where / "embeddings").lookup(np.arange(60), np.full(60, 2**60), 99, fm_version=name)
        for where, name in ((out, next(iter(scored["versions"]))), (place, next(iter(scored["versions"]))))
    )
    assert np.array_equal(one.codes, other.codes) and np.array_equal(one.event_ids, other.event_ids)


def test_the_report_is_of_the_same_rows_and_its_terms_add_up(done: Any, events: pl.DataFrame) -> None:
    out, _, found = done
    part = found["labels"]["click"]
    begin = events["__timestamp"].min() // DAY * DAY
    assert part["rows"] == events.filter(pl.col("__timestamp") >= begin + 3 * DAY).height
    gain = {term: value["nats"].value for term, value in part["gain"].items()}
    assert gain["total"] == pytest.approx(gain["temporal"] + gain["cross"] - gain["residual"], abs=1e-12)
    models = part["models"]
    assert models["kd"]["ne_minus_baseline"].value == pytest.approx(models["kd"]["ne"].value - models["vm"]["ne"].value)
    assert models["late"]["staleness"] == 3 and found["coverage"]["1"] == 1
    written = json.loads((out / "report.json").read_text())
    assert written["labels"]["click"]["models"]["vm"]["ne"]["value"] == models["vm"]["ne"].value


def test_students_are_served_without_what_training_needed(done: Any) -> None:
    out, _, _ = done
    served = load_model(out / "served" / "both")
    assert served.config.distillation is None and served.config.history.dim == 6
    assert set(served.config.without) == set(PRIVATE)


def test_the_command_line_goes_the_same_way(log: Dataset, done: Any, tmp_path: Path) -> None:
    out, _, found = done
    shutil.copytree(out, tmp_path / "out")
    values = {"data": {"dataset": str(log.path)}, "transfer": section(), "threads": 1}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    arguments = [str(recipe), "--out", str(tmp_path / "out")]
    cli = CliRunner()
    for name in ("score", "train", "report"):
        done_ = cli.invoke(command.app, ["transfer", name, *arguments, "--json"])
        assert done_.exit_code == 0, done_.output
    assert json.loads(done_.stdout)["labels"]["click"]["rows"] == found["labels"]["click"]["rows"]
    assert (tmp_path / "out" / "staleness.svg").read_text().startswith("<svg")
    shown = cli.invoke(command.app, ["transfer", "report", *arguments]).stdout
    assert "transfer ratio" in shown and "temporal" in shown
    store = [str(tmp_path / "out" / "embeddings"), str(tmp_path / "store")]
    kept = json.loads(cli.invoke(command.app, ["transfer", "store", *store, "--json"]).stdout)
    assert kept["events"] == len(EmbeddingLog(out / "embeddings"))
    failed = cli.invoke(command.app, ["transfer", "store", *store, "--version", "v9"])
    assert "name one of them by --version" in str(failed.exception)
    for overrides, message in [
        (["transfer.teacher.delay=5"], "holds what another recipe left"),
        (["transfer.students.vm.staleness=2"], "students.vm.staleness is 2"),
        (["transfer.baseline=nobody"], 'no student "nobody"'),
        (["transfer.techer=1"], 'did you mean "teacher"'),
    ]:
        failed = cli.invoke(command.app, ["transfer", "report", *arguments, "--set", *overrides])
        assert isinstance(failed.exception, ValueError) and message in str(failed.exception)


@pytest.mark.parametrize("page", ["recipes/*-transfer.yaml", "docs/papers/exfm.md", "docs/papers/loopfm.md"])
def test_recipes_and_those_of_pages_are_right(page: str) -> None:
    root = Path(__file__).parents[2]
    files = sorted(root.glob(page))
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".md":
            text = text.split("```yaml")[1].partition("\n")[2].partition("```")[0]
        recipe = parse_recipe(yaml.safe_load(text))
        config = read_transfer(recipe, str(file))
        assert {config.recipe_of(name, recipe).section for name in config.students} == {"model"}


def test_what_cannot_be_done_is_said_before_it_is_begun(log: Dataset, tmp_path: Path) -> None:
    recipe, config = parsed(log)
    with pytest.raises(ValueError, match="run `fullrank transfer score` first"):
        run.train(recipe, config, tmp_path / "none", "recipe")
    recipe, config = parsed(log, embeddings={"layers": ["nothing"]}, gain=None, students={"vm": {}})
    with pytest.raises(ValueError, match='dcn_v2 has no layer "nothing"'):
        run.score(recipe, config, tmp_path / "a", "recipe")
    assert not (tmp_path / "a" / "teacher").exists()
    recipe, config = parsed(log, teacher={**section()["teacher"], "warm_up": 50}, gain=None)
    with pytest.raises(ValueError, match="the log ends before the teacher is asked"):
        run.score(recipe, config, tmp_path / "b", "recipe")
    other = planted_dataset(tmp_path / "timed", "timed", 200)
    recipe, config = parsed(other, private=[], gain=None)
    with pytest.raises(ValueError, match="the schema names no request_id"):
        run.score(recipe, config, tmp_path / "c", "recipe")
    with pytest.raises(ValueError, match="there is no section embeddings"):
        TransferConfig.model_validate(section(embeddings=None))
    with pytest.raises(ValueError, match="run `fullrank transfer score`"):
        from fullrank.training.run import run as run_recipe

        run_recipe(parsed(log)[0])
