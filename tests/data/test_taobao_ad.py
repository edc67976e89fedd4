"""Taobao's advertising log: its original files joined as a plain loop joins them, and the leaderboard's CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from fullrank.data.formats import by_user, open_format, taobao_ad
from fullrank.data.formats.taobao_ad import PROFILE, TEST_FROM, VALID_FROM
from fullrank.data.importing import import_dataset
from fullrank.data.splits import SplitSpec
from fullrank.schema import Schema

FIRST = TEST_FROM - 7 * 86_400


def tables(seed: int = 0, rows: int = 1500, events: int = 4000) -> dict[str, pl.DataFrame]:
    rng = np.random.default_rng(seed)
    sample = pl.DataFrame(
        {
            "user": rng.integers(1, 60, rows),
            "time_stamp": rng.integers(FIRST, TEST_FROM + 86_400, rows) // 100 * 100,
            "adgroup_id": rng.integers(1, 40, rows),
            "pid": rng.choice(["430548_1007", "430539_1007"], rows),
            "nonclk": 0,
            "clk": rng.integers(0, 2, rows),
        }
    )
    ads = pl.DataFrame(
        {
            "adgroup_id": range(1, 38),  # three ads have no features
            "cate_id": rng.integers(1, 9, 37),
            "campaign_id": rng.integers(1, 20, 37),
            "customer": rng.integers(1, 20, 37),
            "brand": ["NULL" if place % 5 == 0 else str(100 + place % 7) for place in range(37)],
            "price": rng.random(37).round(2) * 1000,
        }
    )
    profile = {name: rng.integers(0, 4, 50) for name in PROFILE}
    users = pl.DataFrame({"userid": range(1, 51), **profile}).rename({PROFILE[-1]: PROFILE[-1] + " "})
    behavior = pl.DataFrame(
        {
            "user": rng.integers(1, 70, events),
            "time_stamp": rng.integers(FIRST - 10 * 86_400, TEST_FROM + 86_400, events) // 100 * 100,
            "btag": rng.choice(["pv", "cart", "fav", "buy"], events),
            "cate": rng.integers(1, 12, events),
            "brand": rng.integers(100, 110, events),
        }
    )
    return {"raw_sample": sample, "ad_feature": ads, "user_profile": users, "behavior_log": behavior}


def original(path: Path, frames: dict[str, pl.DataFrame]) -> Path:
    path.mkdir()
    for name, frame in frames.items():
        frame.write_csv(path / f"{name}.csv")
    return path


def raw(path: Path, schema: Schema | None = None) -> pl.DataFrame:
    source = open_format("taobao-ad")
    schema = schema or source.default_schema(path)
    return pl.concat([chunk.frame for chunk in source.chunks(path, schema) if chunk.frame.height])


def by_loop(frames: dict[str, pl.DataFrame]) -> dict[int, dict[str, Any]]:
    """What each impression, by its line, is joined with."""
    ads = {row["adgroup_id"]: row for row in frames["ad_feature"].rows(named=True)}
    users = {row["userid"]: row for row in frames["user_profile"].rows(named=True)}
    events = sorted(
        enumerate(frames["behavior_log"].rows(named=True)), key=lambda pair: (pair[1]["time_stamp"], pair[0])
    )
    expected = {}
    for line, shown in enumerate(frames["raw_sample"].rows(named=True), start=2):
        earlier = [
            event for _, event in events if event["user"] == shown["user"] and event["time_stamp"] < shown["time_stamp"]
        ][-50:]
        ad, user = ads.get(shown["adgroup_id"], {}), users.get(shown["user"], {})
        expected[line] = {
            "userid": str(shown["user"]),
            "clk": str(shown["clk"]),
            "campaign_id": None if not ad else str(ad["campaign_id"]),
            "brand": None if not ad or ad["brand"] == "NULL" else ad["brand"],
            "new_user_class_level": None if not user else str(user["new_user_class_level "]),
            "behavior.cate": [event["cate"] for event in earlier],
            "behavior.brand": [event["brand"] for event in earlier],
            "behavior.btag": [event["btag"] for event in earlier],
        }
    return expected


def test_impressions_with_their_ads_users_and_earlier_behavior(tmp_path: Path) -> None:
    frames = tables()
    frame = raw(original(tmp_path / "log", frames))
    expected = by_loop(frames)
    assert sorted(frame["__line"].to_list()) == sorted(expected)
    assert max(len(row["behavior.cate"]) for row in expected.values()) == 50
    for row in frame.rows(named=True):
        wanted = expected[row["__line"]]
        assert {name: row[name] for name in wanted} == wanted
    assert set(frame["btag"]) == {"pv"}


def test_neither_files_nor_groups_change_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = original(tmp_path / "log", tables())
    expected = raw(path)
    monkeypatch.setattr(taobao_ad, "groups_for", lambda files: 5)
    monkeypatch.setattr(by_user, "PENDING_BYTES", 10_000)
    monkeypatch.setattr(taobao_ad, "CHUNK_ROWS", 70)
    found = raw(path)
    assert not found.equals(expected)
    assert found.sort("__line").equals(expected.sort("__line"))


def test_the_eighth_day_tests_and_the_end_of_the_others_validates(tmp_path: Path) -> None:
    dataset = import_dataset("taobao-ad", original(tmp_path / "log", tables()), tmp_path / "out")
    times = {split: dataset.scan(split).collect()["__timestamp"] for split in dataset.splits}
    assert times["train"].max() < VALID_FROM <= times["valid"].min()  # type: ignore[operator]
    assert times["valid"].max() < TEST_FROM <= times["test"].min()  # type: ignore[operator]
    assert sum(map(len, times.values())) == 1500
    assert (TEST_FROM - VALID_FROM) * 10 == TEST_FROM - FIRST
    tables_ = dataset.schema.tables()
    assert {"cate_id", "brand", "btag", "userid"} <= set(tables_) and "behavior" not in tables_


def test_without_a_behavior_log_there_is_no_sequence(tmp_path: Path) -> None:
    frames = tables()
    path = original(tmp_path / "log", {name: frame for name, frame in frames.items() if name != "behavior_log"})
    dataset = import_dataset("taobao-ad", path, tmp_path / "out")
    assert not dataset.schema.sequences
    frame = raw(path / "raw_sample.csv")
    assert frame["__line"].to_list() == list(range(2, 1502))
    assert frame["price"].null_count() == frames["raw_sample"].filter(pl.col("adgroup_id") > 37).height


def test_bad_rows_of_each_file_are_named(tmp_path: Path) -> None:
    path = original(tmp_path / "log", tables())
    for name, line, text in (
        ("raw_sample", 7, "3,noon,5,430548_1007,0,1"),
        ("raw_sample", 9, "3,1494604800,5,430548_1007,0,2"),
        ("behavior_log", 11, "3,1494604800,pv,x,5"),
        ("behavior_log", 12, "3,1494604800,pv"),
        ("ad_feature", 3, "5,5"),
    ):
        lines = (path / f"{name}.csv").read_text().splitlines()
        lines[line - 1] = text
        (path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    dataset = import_dataset("taobao-ad", path, tmp_path / "out", max_bad=0.01)
    found = pl.read_csv(dataset.path / "rejected.tsv", separator="\t", infer_schema=False)
    assert set(found.rows()) == {
        ("3", "(ad_feature.csv)", "2 fields, expected 6", "5,5"),
        ("7", "time_stamp", "not an integer", "noon"),
        ("9", "clk", "label is not 0 or 1", "2"),
        ("11", "cate (behavior_log.csv)", "not an integer", "x"),
        ("12", "(behavior_log.csv)", "3 fields, expected 5", "3,1494604800,pv"),
    }


INCOMPLETE = [("ad_feature.csv", "ad_feature.csv is missing"), ("raw_sample.csv", "without train.csv")]


@pytest.mark.parametrize(("missing", "message"), INCOMPLETE)
def test_an_incomplete_release_is_refused(tmp_path: Path, missing: str, message: str) -> None:
    path = original(tmp_path / "log", tables(rows=20, events=20))
    (path / missing).unlink()
    with pytest.raises(ValueError, match=message):
        import_dataset("taobao-ad", path, tmp_path / "out")


HEADER = (
    "clk,btag_his,cate_his,brand_his,userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,"
    "shopping_level,occupation,new_user_class_level,adgroup_id,cate_id,campaign_id,customer,brand,price,pid,btag\n"
)


def leaderboard(path: Path) -> Path:
    path.mkdir()
    for part, rows in (("train", 200), ("test", 50)):
        lines = [
            f"{n % 2},1^4,{n % 3}^7,20^{n % 5},{n},0,2,2,5,0,3,0,0,{n % 9},7,8,9,20,0.5,1,1\n" for n in range(rows)
        ]
        (path / f"{part}.csv").write_text(HEADER + "".join(lines))
    return path


def test_the_leaderboards_files_with_the_end_of_train_for_validation(tmp_path: Path) -> None:
    dataset = import_dataset("taobao-ad", leaderboard(tmp_path / "log"), tmp_path / "out")
    users = {split: dataset.scan(split).collect()["__user_id"].to_list() for split in dataset.splits}
    assert users["train"] + users["valid"] == list(range(200))
    assert len(users["valid"]) == 20 and len(users["test"]) == 50
    names = [None, None, *dataset.encoders.vocabularies["cate_id"].values.to_list()]
    row = dataset.scan("train").collect().row(4, named=True)
    assert [names[id_] for id_ in row["behavior.cate"]] == ["1", "7"] and names[row["cate_id"]] == "7"
    assert dataset.validation == "last 10% of the train file"
    bars = import_dataset("taobao-ad", tmp_path / "log", tmp_path / "bars", split=SplitSpec(protocol="bars"))
    assert {split: bars.rows(split) for split in bars.splits} == {"train": 200, "valid": 50, "test": 50}
