"""Facts about a whole run of a funnel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fullrank.data.dataset import Dataset
from fullrank.funnel import Request
from fullrank.training import run as runs


def test_a_run_that_was_cut_off_between_stages_is_continued(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"batch_size": 256}
    funnel = {
        "retrieval": {"epochs": 1},
        "early": {"training": training, "distill": {"requests": 50, "candidates": 16}},
        "final": {"model": {"name": "dcn_v2", "hidden": [8], "embedding_dim": 4}, "training": training},
        "sizes": {"retrieve": 50, "keep": 20},
    }
    recipe = {"data": {"dataset": dataset.path}, "funnel": funnel}
    whole = runs.run(recipe, tmp_path / "whole")
    fit_ranker = runs.fit_ranker
    fitted: list[tuple[str, bool]] = []

    def cut_off(model: Any, *arguments: Any, **options: Any) -> Any:
        if fitted:
            raise KeyboardInterrupt
        fitted.append((model.name, options["resume"]))
        return fit_ranker(model, *arguments, **options)

    monkeypatch.setattr("fullrank.funnel.training.fit_ranker", cut_off)
    with pytest.raises(KeyboardInterrupt):
        runs.run(recipe, tmp_path / "run")
    monkeypatch.undo()
    assert fitted == [("dcn_v2", False)]  # the final stage, which the early one learns from
    with pytest.raises(ValueError, match="holds an earlier run: pass --resume"):
        runs.run(recipe, tmp_path / "run")
    resumed = runs.run(recipe, tmp_path / "run", resume=True)
    asked = [Request(3), Request("stranger")]
    assert resumed.content.recommend(asked, 10) == whole.content.recommend(asked, 10)
    for split in (*resumed.metrics.values(), *whole.metrics.values()):
        for part in (*split["cascade"]["stages"].values(), split["cascade"]["total"]):
            del part["milliseconds"]
    assert resumed.metrics == whole.metrics
    again = runs.run(recipe, tmp_path / "run", overwrite=True)
    assert again.content.recommend(asked, 10) == whole.content.recommend(asked, 10)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"retrieval": {"output": 8}}, 'funnel.retrieval.output: unknown key; did you mean "output_dim"?'),
        ({"early": {"model": {"hiden": [8]}}}, 'funnel.early.0.model.hiden: unknown key; did you mean "hidden"?'),
        ({"early": [{"kept": 8}]}, 'funnel.early.0.kept: unknown key; did you mean "keep"?'),
        ({"final": {"model": {"hiden": [8]}}}, "funnel.final.model.name: expected one of lr, fm"),
        ({"sizes": {"keep": "few"}}, "funnel.sizes.keep: expected an integer >= 1, or a list of them, got 'few'"),
    ],
)
def test_what_is_wrong_in_a_section_is_one_line_with_its_place(
    dataset: Dataset, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        runs.run({"data": {"dataset": dataset.path}, "funnel": section}, source="r.yaml")
    assert str(caught.value).startswith(f"r.yaml: {message}")
    assert "\n" not in str(caught.value)
