"""The committed recipes build the models of the public leaderboard: counted on tables of its vocabularies' sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fullrank.data.formats import open_format
from fullrank.data.formats.published import PUBLISHED
from fullrank.schema import Schema
from fullrank.training.recipe import Recipe, read_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "bars"

# Rows of each table, from the logs of the leaderboard's runs: distinct values of the training part that are frequent
# enough, one row for padding or missing values, and one for unknown ones.
CATEGORIES_X1 = (
    1462, 560, 413424, 248543, 307, 23, 12192, 635, 5, 54712, 5350, 409749, 3182, 29, 12500, 365811, 12, 4934, 2096, 6,
    397981, 20, 17, 88608, 98, 64073,
)  # fmt: skip
COUNTS_X4 = (44, 99, 122, 41, 220, 112, 80, 69, 92, 6, 27, 37, 72)
CATEGORIES_X4 = (
    1446, 554, 157339, 117822, 306, 18, 11882, 630, 5, 39530, 5131, 156656, 3176, 28, 11043, 148913, 12, 4560, 2003, 5,
    154564, 18, 17, 53031, 82, 40955,
)  # fmt: skip
AVAZU_X1 = (
    9, 9, 3480, 4271, 26, 4864, 305, 33, 228186, 1048285, 6515, 6, 6, 1940, 10, 11, 349, 6, 61, 171, 52, 26,
)  # fmt: skip


def _numbered(letter: str, sizes: tuple[int, ...]) -> dict[str, int]:
    return {f"{letter}{place}": size for place, size in enumerate(sizes, start=1)}


SIZES: dict[str, dict[str, int]] = {
    "MovielensLatest_x1": {"user_id": 16977, "item_id": 23606, "tag_id": 49659},
    "Frappe_x1": {
        "user": 956, "item": 4084, "daytime": 9, "weekday": 9, "isweekend": 4, "homework": 5, "cost": 4, "weather": 11,
        "country": 82, "city": 235,
    },
    "Criteo_x1": _numbered("C", CATEGORIES_X1),
    "Criteo_x4": _numbered("I", COUNTS_X4) | _numbered("C", CATEGORIES_X4),
    "Avazu_x1": _numbered("feat_", AVAZU_X1),
    "Avazu_x4": {
        "hour_of_day": 26, "weekday": 9, "is_weekend": 4, "C1": 9, "banner_pos": 9, "site_id": 4051,
        "site_domain": 5461, "site_category": 27, "app_id": 6545, "app_domain": 400, "app_category": 33,
        "device_id": 820509, "device_ip": 2903322, "device_model": 7259, "device_type": 7, "device_conn_type": 6,
        "C14": 2556, "C15": 10, "C16": 11, "C17": 434, "C18": 6, "C19": 70, "C20": 173, "C21": 62,
    },
    "AmazonElectronics_x1": {"item_id": 63003, "category_id": 803},
    "TaobaoAd_x1": {
        "userid": 403958, "cms_segid": 99, "cms_group_id": 15, "final_gender_code": 4, "age_level": 9,
        "pvalue_level": 6, "shopping_level": 5, "occupation": 4, "new_user_class_level": 7, "adgroup_id": 246851,
        "cate_id": 11330, "campaign_id": 191771, "customer": 132136, "brand": 308870, "pid": 4, "btag": 6,
    },
    "KuaiVideo_x1": {"user_id": 10002, "item_id": 632406},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Leaderboard row.

    Attributes:
        parameters: in the log of its run.
        spare_rows: of each table, in that run: older runs had one row for missing and unknown values together.
        fewer: parameters that the model here lacks for a stated reason, negative if it has more.
    """

    benchmark: str
    parameters: int
    spare_rows: int = 1
    fewer: int = 0


# The run of KuaiVideo attends with item and visual vectors side by side (128 wide) where the id's alone are here (64),
# twice; maps the three visual vectors linearly; and feeds all of them to its output MLP.
_VISUAL = 2 * (4 * 64 * 512) + 3 * 64 * 64 + (64 + 2 * 64) * 1024
ROWS = {
    "movielenslatest_x1-lr": Row("MovielensLatest_x1", 90_240),
    "movielenslatest_x1-fm": Row("MovielensLatest_x1", 992_630),
    "movielenslatest_x1-deepfm": Row("MovielensLatest_x1", 1_328_630),
    "movielenslatest_x1-dcn_v2": Row("MovielensLatest_x1", 1_243_071),
    "movielenslatest_x1-dlrm": Row("MovielensLatest_x1", 1_238_391),
    "movielenslatest_x1-autoint": Row("MovielensLatest_x1", 1_383_799),
    "movielenslatest_x1-finalmlp": Row("MovielensLatest_x1", 1_040_902, spare_rows=2),
    "frappe_x1-lr": Row("Frappe_x1", 5_390),
    "frappe_x1-fm": Row("Frappe_x1", 59_280),
    "frappe_x1-deepfm": Row("Frappe_x1", 423_280),
    "frappe_x1-dcn_v2": Row("Frappe_x1", 458_391),
    "frappe_x1-dlrm": Row("Frappe_x1", 417_891),
    "frappe_x1-autoint": Row("Frappe_x1", 622_180),
    "frappe_x1-finalmlp": Row("Frappe_x1", 253_392, spare_rows=2),
    "criteo_x1-dcn_v2": Row("Criteo_x1", 22_018_021),
    "criteo_x4-dcn_v2": Row("Criteo_x4", 20_382_577, spare_rows=2),
    "avazu_x1-dcn_v2": Row("Avazu_x1", 13_641_311),
    "avazu_x4-dcn_v2": Row("Avazu_x4", 73_385_345),
    "amazonelectronics_x1-din": Row("AmazonElectronics_x1", 5_403_522, spare_rows=2),
    "taobaoad_x1-din": Row("TaobaoAd_x1", 42_263_682, spare_rows=2),
    "kuaivideo_x1-din": Row("KuaiVideo_x1", 43_032_835, spare_rows=2, fewer=_VISUAL),
}


def imported_schema(recipe: Recipe, benchmark: str, tmp_path: Path) -> Schema:
    """What the recipe's format reads from a file with the benchmark's columns."""
    columns = next(published.columns for published in PUBLISHED if published.name == benchmark)
    counts = "0.05" if benchmark == "Criteo_x1" else "5"
    values = [counts if name.startswith("I") else "14102100" if name == "hour" else "1" for name in columns]
    (tmp_path / "train.csv").write_text(f"{','.join(columns)}\n{','.join(values)}\n")
    assert recipe.data.source is not None and recipe.data.source.path.name == benchmark
    return open_format(recipe.data.source.format).default_schema(tmp_path)


def parameters(recipe: Recipe, schema: Schema, sizes: dict[str, int]) -> int:
    assert recipe.model is not None
    with torch.device("meta"):  # the largest model has 73 million parameters
        model = recipe.model.build(schema.with_table_sizes(sizes))
    return model.num_parameters().total


def test_each_recipe_is_checked() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(ROWS)
    assert {row.benchmark for row in ROWS.values()} == {published.name for published in PUBLISHED}


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_builds_the_leaderboards_model(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    schema = imported_schema(recipe, row.benchmark, tmp_path)
    sizes = SIZES[row.benchmark]
    assert {feature.table_name for feature in schema.embedded().values()} == set(sizes)
    theirs = {table: size - 2 + row.spare_rows for table, size in sizes.items()}
    assert parameters(recipe, schema, theirs) == row.parameters - row.fewer
    # What the reader of the recipe is told: the run's count, and the count on tables that an import here makes.
    comment = " ".join(
        line[1:].strip() for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line[:1] == "#"
    )
    told = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:parameters|here)", comment)]
    assert told == [row.parameters, parameters(recipe, schema, sizes)]


@pytest.mark.parametrize("name", ROWS)
def test_the_runs_protocol(name: str) -> None:
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    training, embedding = recipe.training, recipe.embedding
    assert (training.epochs, training.schedule, training.plateau_factor, training.optimizer) == (
        100,
        "plateau",
        0.1,
        "adam",
    )
    assert (embedding.kind, embedding.l2_mode) == ("dense", "exact") and embedding.l2 > 0
    assert recipe.data.source is not None
    published = next(each for each in PUBLISHED if each.name == ROWS[name].benchmark)
    protocol = recipe.data.source.split.protocol if recipe.data.source.split is not None else None
    assert (protocol == "bars") == ("valid" not in published.md5)
