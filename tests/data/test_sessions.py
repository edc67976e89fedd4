"""Sessions of the published layouts, and of lists of items."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from fullrank.data.dataset import Dataset
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec

YOOCHOOSE = """1,2014-04-07T10:51:09.277Z,214536502,0
1,2014-04-07T10:54:09.868Z,214536500,0
2,2014-04-07T13:56:37.614Z,214662742,S
1,2014-04-07T10:54:46.998Z,214536506,0
2,not a time,214662742,0
2,2014-04-07T13:57:19.373Z,214536502,1
"""
DIGINETICA = """sessionId;userId;itemId;timeframe;eventdate
1;NA;81766;526309;2016-05-09
1;NA;31331;1031018;2016-05-09
1;NA;32118;243569;2016-05-09
2;77;31331;75848;2016-05-10
2;77;;173912;2016-05-10
2;77;9655;173912;2016-05-10
"""
CATEGORIES = "itemId;categoryId\n81766;1096\n31331;1096\n32118;36\n"
RETAILROCKET = """timestamp,visitorid,event,itemid,transactionid
1433221332117,257597,view,355908,
1433224214164,257597,view,248676,
1433221999827,111016,view,318965,
1433221955914,111016,addtocart,253185,
"""


def rows(log: Path, out: Path, max_bad: float = 0.0) -> tuple[Dataset, pl.DataFrame]:
    """The rows with label 1: session, item, and the history, by their names."""
    dataset = import_dataset("sessions", log, out, split=SplitSpec(kind="none"), max_bad=max_bad)
    vocabulary = dict(enumerate(dataset.encoders.vocabularies["item_id"].values.to_list(), start=2))
    frame = dataset.scan("train").collect().filter(pl.col("label") == 1)
    name = pl.element().replace_strict(vocabulary, default=None)
    return dataset, frame.select(
        pl.col("__user_id").alias("session"),
        pl.col("__item_id").cast(pl.String).alias("item"),
        pl.col("history.item").list.eval(name).alias("history"),
        *(pl.col(name) for name in ("__timestamp",) if name in frame.columns),
    )


def test_yoochoose(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log/yoochoose-clicks.dat").write_text(YOOCHOOSE)
    (tmp_path / "log/yoochoose-buys.dat").write_text("")
    dataset, found = rows(tmp_path / "log", tmp_path / "out", max_bad=0.5)
    assert dataset.rejected == {"not a time": 1}
    assert found.rows() == [
        (1, "214536500", ["214536502"], 1396868049),
        (1, "214536506", ["214536502", "214536500"], 1396868086),
        (2, "214536502", ["214662742"], 1396879039),
    ]


def test_diginetica_in_order_of_the_time_within_the_session(tmp_path: Path) -> None:
    (tmp_path / "train-item-views.csv").write_text(DIGINETICA)
    (tmp_path / "product-categories.csv").write_text(CATEGORIES)
    dataset, found = rows(tmp_path / "train-item-views.csv", tmp_path / "out", max_bad=0.5)
    assert dataset.rejected == {"missing": 1}
    assert found["item"].to_list() == ["81766", "31331", "9655"]
    assert found["history"].to_list() == [["32118"], ["32118", "81766"], ["31331"]]
    assert "category_id" in {feature.name for feature in dataset.schema.features}


def test_events_with_a_header(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text(RETAILROCKET)
    _, found = rows(tmp_path / "events.csv", tmp_path / "out")
    assert found.rows() == [
        (257597, "248676", ["355908"], 1433224214),
        (111016, "318965", ["253185"], 1433221999),
    ]


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t"])
def test_a_line_of_items_is_a_session(tmp_path: Path, separator: str) -> None:
    lines = [["9", "7", "8"], ["7"], [], ["8", "9"], ["b1", "7.0"]]
    (tmp_path / "log.txt").write_text("\n".join(separator.join(line) for line in lines) + "\n")
    _, found = rows(tmp_path / "log.txt", tmp_path / "out")
    assert found.rows() == [(1, "7", ["9"]), (1, "8", ["9", "7"]), (4, "9", ["8"]), (5, "7", ["b1"])]


def test_what_is_no_log_of_sessions_is_said(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("age,click\n3,1\n")
    with pytest.raises(ValueError, match="expected columns of a session .* its columns are age, click"):
        import_dataset("sessions", tmp_path / "log.csv", tmp_path / "out")
