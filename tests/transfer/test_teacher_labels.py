"""Facts about a teacher's labels: what is missing or late is unknown, never 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fullrank.transfer.embedding_log import LeakageError
from fullrank.transfer.teacher_labels import TeacherLabelLog


@pytest.fixture
def log(tmp_path: Path) -> TeacherLabelLog:
    log = TeacherLabelLog(tmp_path, ["click", "hide"])
    log.append([7, 3], [[0.5, 0.1], [0.25, 0.0]], "v1", 0, [100, 200])
    log.append([5], [[1.0, 0.75]], "v2", 50, [300], event_times=[60])
    return log


def test_labels_are_found_by_event_and_task(log: TeacherLabelLog) -> None:
    found = log.lookup([3, 4, 5, 7])
    assert np.array_equal(found, np.float32([[0.25, 0], [np.nan] * 2, [1, 0.75], [0.5, 0.1]]), equal_nan=True)
    assert np.array_equal(TeacherLabelLog(log.path).lookup([7, 5], ["hide"]), np.float32([[0.1], [0.75]]))
    assert log.versions() == {"v1": {"fm_train_cutoff": 0, "events": 2}, "v2": {"fm_train_cutoff": 50, "events": 1}}


def test_a_label_that_comes_later_is_not_there_yet(log: TeacherLabelLog) -> None:
    assert np.isnan(log.lookup([7, 3, 5], as_of=200)[:, 0]).tolist() == [False, False, True]
    assert np.isnan(log.lookup([7, 3], as_of=[99, 200])[:, 0]).tolist() == [True, False]
    assert log.coverage([7, 3, 4, 5]) == 0.75 and log.coverage([7, 3, 4, 5], as_of=150) == 0.25
    assert np.isnan(log.coverage([]))


def test_what_was_said_first_stays(log: TeacherLabelLog) -> None:
    before = log.lookup([7])
    log.append([7], [[0.9, 0.9]], "v2", 50, [150])
    assert np.array_equal(log.lookup([7]), before)
    assert log.known([7, 8, 5]).tolist() == [True, False, True] and log.n_inferences == 4


def test_a_file_that_was_not_listed_does_not_count(log: TeacherLabelLog) -> None:
    """A kill between the file and the pointer leaves what was there."""
    pointer = (log.path / "current.json").read_text()
    log.append([9], [[0.9, 0.9]], "v2", 50, [150])
    (log.path / "current.json").write_text(pointer)
    again = TeacherLabelLog(log.path)
    assert not again.known([9])[0]
    again.append([9], [[0.1, 0.2]], "v2", 50, [150])
    assert again.lookup([9]).tolist() == np.float32([[0.1, 0.2]]).tolist()


def test_bad_labels_are_refused_whole(log: TeacherLabelLog, tmp_path: Path) -> None:
    for bad in (float("nan"), -0.1, 1.1):
        with pytest.raises(ValueError, match=r"2 predictions of the teacher are NaN or outside \[0, 1\]"):
            log.append([1, 2], [[bad, 0.1], [0.1, bad]], "v1", 0, [1, 1])
    with pytest.raises(LeakageError, match="1 events happened before the training cut-off 10"):
        log.append([1, 2], np.zeros((2, 2)), "v3", 10, [20, 20], event_times=[9, 10])
    with pytest.raises(ValueError, match=r"predictions have shape \(2, 1\)"):
        log.append([1, 2], np.zeros((2, 1)), "v1", 0, [1, 1])
    with pytest.raises(KeyError, match='no task "buy"; it has click, hide'):
        log.lookup([1], ["buy"])
    with pytest.raises(KeyError, match='no task "buy"'):
        TeacherLabelLog(log.path, ["click", "buy"])
    assert log.n_inferences == 3
    with pytest.raises(ValueError, match="expected at least one task"):
        TeacherLabelLog(tmp_path / "none")
    (log.path / "current.json").write_text("{}")
    with pytest.raises(ValueError, match="no list of a teacher's labels"):
        TeacherLabelLog(log.path)
