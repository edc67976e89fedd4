"""The loader against the frames that were written, and against itself under other threads, windows and restarts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fullrank.batch import Batch
from fullrank.data.dataset import Dataset, write_dataset
from fullrank.data.loader import Loader, batch_from_frame
from fullrank.schema import (
    Categorical,
    EventId,
    EventNumber,
    Keys,
    Label,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
)

ROWS = 1000


def _schema() -> Schema:
    return Schema(
        features=(
            Numeric(name="row"),
            Numeric(name="price"),
            Categorical(name="user", encoding="identity", num_embeddings=50),
            Categorical(name="item", encoding="identity", num_embeddings=2000),
            MultiCategorical(name="genres", encoding="identity", num_embeddings=30),
            Sequence(
                name="history",
                fields=(
                    EventId(name="item", encoding="identity", num_embeddings=2000),
                    EventNumber(name="age"),
                ),
            ),
        ),
        labels=(Label(name="click"), Label(name="buy")),
        keys=Keys(user_id="user_key", timestamp="time", weight="importance"),
    )


def _frame(rows: int = ROWS) -> pl.DataFrame:
    random = np.random.default_rng(3)
    lengths = random.integers(0, 6, rows)
    return pl.DataFrame(
        {
            "row": np.arange(rows, dtype=np.float32),
            "price": random.normal(size=rows).astype(np.float32),
            "user": random.integers(0, 50, rows).astype(np.int32),
            "item": (np.arange(rows) * 2).astype(np.int32),
            "genres": [random.integers(0, 30, n).tolist() for n in random.integers(0, 4, rows)],
            "history.item": [random.integers(0, 2000, n).tolist() for n in lengths],
            "history.age": [random.random(n).tolist() for n in lengths],
            "click": (random.random(rows) < 0.3).astype(np.float32),
            "buy": pl.Series([None if r % 7 == 0 else float(r % 2) for r in range(rows)]).fill_null(float("nan")),
            "__user_id": random.integers(0, 50, rows).astype(np.int64),
            "__timestamp": np.arange(rows, dtype=np.int64) + 1_700_000_000,
            "__weight": random.random(rows).astype(np.float32),
        },
        schema_overrides={
            "genres": pl.List(pl.Int32),
            "history.item": pl.List(pl.Int32),
            "history.age": pl.List(pl.Float32),
            "buy": pl.Float32,
        },
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """1,000 rows in shards of at most 300 rows and row groups of 64."""
    path = tmp_path_factory.mktemp("loader") / "data"
    dataset = write_dataset(path, _schema(), {"train": [_frame()]}, encoded=True)
    frame = _frame()
    import json

    manifest = json.loads((path / "dataset.json").read_text())
    names = []
    for part, begin in enumerate(range(0, ROWS, 300)):
        name = f"train/part-{part:05d}.parquet"
        frame.slice(begin, 300).write_parquet(path / name, row_group_size=64)
        names.append(name)
    manifest["shards"]["train"] = names
    (path / "dataset.json").write_text(json.dumps(manifest))
    return Dataset.open(dataset.path)


def _rows(batches: Iterable[Batch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.numeric_BN[:, 0]]


def _assert_equal(left: Batch, right: Batch) -> None:
    for name in vars(left):
        one, other = getattr(left, name), getattr(right, name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype, name
            assert torch.equal(one.nan_to_num(-7), other.nan_to_num(-7)), name
        else:
            assert one == other, name


# Bytes of about 60 rows, so a window is one row group, and of 600: a window is three or four.
SMALL, LARGER = 6_000, 60_000


@pytest.mark.parametrize("memory_limit", [1 << 30, LARGER, SMALL])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_batch_holds_the_rows_of_the_table_that_its_row_numbers_name(
    dataset: Dataset, shuffle: bool, memory_limit: int
) -> None:
    frame = _frame()
    for batch in Loader(dataset, "train", 96, shuffle=shuffle, memory_limit=memory_limit):
        rows = batch.numeric_BN[:, 0].int().tolist()
        picked = frame[rows]
        assert batch.numeric_BN[:, 1].tolist() == picked["price"].to_list()
        assert batch.ids_BF.tolist() == picked.select("user", "item").cast(pl.Int64).to_numpy().tolist()
        assert batch.labels_BT.nan_to_num(-1).tolist() == picked.select("click", "buy").fill_nan(-1).to_numpy().tolist()
        assert batch.weights_B is not None and batch.weights_B.tolist() == picked["__weight"].to_list()
        assert batch.timestamp_B is not None and batch.timestamp_B.tolist() == picked["__timestamp"].to_list()
        assert batch.user_B is not None and batch.user_B.tolist() == picked["__user_id"].to_list()
        for key in ("genres", "history.item"):
            values, lengths_B = batch.jagged(key)
            assert [part.tolist() for part in values.split(lengths_B.tolist())] == picked[key].to_list()
        values, lengths_B = batch.events("history.age")
        assert [part.tolist() for part in values.split(lengths_B.tolist())] == picked["history.age"].to_list()


@pytest.mark.parametrize("memory_limit", [1 << 30, LARGER, SMALL])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(dataset: Dataset, memory_limit: int) -> None:
    loader = Loader(dataset, "train", 96, shuffle=True, seed=1, memory_limit=memory_limit)
    first, second = _rows(loader), _rows(loader)
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second
    assert _rows(Loader(dataset, "train", 96, shuffle=True, seed=2, memory_limit=memory_limit)) != first


def test_a_window_of_row_groups_moves_rows_across_the_groups(dataset: Dataset) -> None:
    loader = Loader(dataset, "train", 50, shuffle=True, memory_limit=LARGER)
    assert not loader.in_memory
    assert len({row // 64 for row in _rows([next(iter(loader))])}) > 1


def test_without_shuffling_rows_come_in_stored_order(dataset: Dataset) -> None:
    for memory_limit in (1 << 30, SMALL):
        assert _rows(Loader(dataset, "train", 96, memory_limit=memory_limit)) == list(range(ROWS))


@pytest.mark.parametrize("memory_limit", [1 << 30, LARGER, SMALL])
def test_order_and_values_do_not_depend_on_the_number_of_threads(dataset: Dataset, memory_limit: int) -> None:
    def batches(workers: int) -> list[Batch]:
        loader = Loader(dataset, "train", 96, shuffle=True, seed=5, workers=workers, memory_limit=memory_limit)
        return [*loader, *loader]

    reference = batches(0)
    for workers in (1, 3):
        for left, right in zip(reference, batches(workers), strict=True):
            _assert_equal(left, right)


@pytest.mark.parametrize("memory_limit", [1 << 30, LARGER, SMALL])
@pytest.mark.parametrize("done", [0, 4, 11])
def test_a_restored_loader_goes_on_with_the_same_batches(dataset: Dataset, memory_limit: int, done: int) -> None:
    def loader() -> Loader:
        return Loader(dataset, "train", 96, shuffle=True, seed=5, memory_limit=memory_limit)

    whole = loader()
    list(whole)
    iterator = iter(whole)
    for _ in range(done):
        next(iterator)
    state = whole.state()
    rest = list(iterator)
    resumed = loader()
    resumed.restore(state)
    for left, right in zip(rest, list(resumed), strict=True):
        _assert_equal(left, right)
    assert resumed.state() == whole.state()
    assert _rows(resumed) == _rows(whole)


def test_an_abandoned_epoch_is_repeated_not_continued(dataset: Dataset) -> None:
    loader = Loader(dataset, "train", 96, shuffle=True)
    first = _rows([next(iter(loader))])
    assert _rows(loader)[:96] == first


def test_a_state_of_another_loader_is_refused(dataset: Dataset) -> None:
    loader = Loader(dataset, "train", 96, shuffle=True, seed=5)
    with pytest.raises(ValueError, match="batch_size 32, this loader has 96"):
        loader.restore(Loader(dataset, "train", 32, shuffle=True, seed=5).state())


def test_drop_last_leaves_out_the_short_batch(dataset: Dataset) -> None:
    sizes = [len(batch) for batch in Loader(dataset, "train", 96)]
    assert sizes == [96] * 10 + [40]
    loader = Loader(dataset, "train", 96, drop_last=True)
    assert len(loader) == 10
    assert [len(batch) for batch in loader] == [96] * 10


def test_part_of_a_schema_reads_part_of_the_columns(dataset: Dataset) -> None:
    part = dataset.schema.model_copy(update={"features": dataset.schema.features[:2], "keys": Keys()})
    batch = next(iter(Loader(dataset, "train", 10, schema=part)))
    assert batch.ids_BF.shape == (10, 0) and batch.jagged_keys == () and batch.user_B is None


def test_a_frame_gives_the_batch_that_the_loader_gives(dataset: Dataset) -> None:
    _assert_equal(batch_from_frame(_frame(), dataset.schema), next(iter(Loader(dataset, "train", ROWS))))


def test_a_request_without_labels_and_keys_is_a_batch() -> None:
    schema = _schema()
    frame = _frame(3).drop("click", "buy", "__user_id", "__timestamp", "__weight")
    batch = batch_from_frame(frame, schema)
    assert bool(batch.labels_BT.isnan().all()) and batch.weights_B is None and batch.user_B is None
    assert len(batch_from_frame(frame.head(0), schema)) == 0


def test_users_named_by_text_keep_their_grouping() -> None:
    frame = _frame(50)
    users = frame["__user_id"].cast(pl.String)
    batch = batch_from_frame(frame.with_columns(users.alias("__user_id")), _schema())
    assert batch.user_B is not None
    keys: dict[str, set[int]] = {}
    for name, key in zip(users, batch.user_B.tolist(), strict=True):
        keys.setdefault(name, set()).add(key)
    assert all(len(found) == 1 for found in keys.values())
    assert len(set.union(*keys.values())) == len(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.lit(99, pl.Int32).alias("user"), 'column "user" has id 99, expected 0 to 49'),
        (pl.lit(-1, pl.Int32).alias("user"), 'column "user" has id -1, expected 0 to 49'),
        (pl.lit([31], pl.List(pl.Int32)).alias("genres"), 'column "genres" has id 31'),
        (pl.lit(float("nan"), pl.Float32).alias("price"), 'column "price" has NaN or infinity'),
        (pl.lit(2.0, pl.Float32).alias("click"), 'label "click" has values outside'),
        (pl.lit(-1.0, pl.Float32).alias("__weight"), 'column "__weight"'),
        (pl.lit(None, pl.Int32).alias("item"), 'column "item" has nulls'),
        (pl.lit("x").alias("item"), 'column "item" is .*, expected int32'),
        (pl.lit(1, pl.Int32).alias("genres"), 'column "genres" is int32, expected lists of int32'),
        (pl.lit([], pl.List(pl.Float32)).alias("history.age"), "lists of unequal length"),
    ],
)
def test_impossible_values_are_refused_by_name(change: pl.Expr, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_from_frame(_frame(20).with_columns(change), _schema())


def test_an_impossible_value_in_a_shard_reaches_the_caller_through_the_threads(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", _schema(), {"train": [_frame(200)]}, encoded=True)
    shard = dataset.shards("train")[0]
    pl.read_parquet(shard).with_columns(pl.lit(77, pl.Int32).alias("user")).write_parquet(shard)
    with pytest.raises(ValueError, match=f'{shard}: column "user" has id 77'):
        list(Loader(Dataset.open(dataset.path), "train", 64))


def test_a_missing_column_or_split_is_named(dataset: Dataset) -> None:
    wider = dataset.schema.model_copy(update={"features": (*dataset.schema.features, Numeric(name="hour"))})
    with pytest.raises(ValueError, match='column "hour" is missing'):
        Loader(dataset, "train", 10, schema=wider)
    with pytest.raises(ValueError, match='no split "dev"'):
        Loader(dataset, "dev", 10)
    with pytest.raises(ValueError, match='column "price" is missing'):
        batch_from_frame(_frame(5).drop("price"), _schema())


def _with_further(path: Path, change: pl.Expr | None = None) -> Dataset:
    """Two shards of 150 rows with columns beside those of the schema."""
    further = _frame(300).with_columns(
        pl.Series("propensity", np.arange(300) / 300),
        pl.Series("clicks_before", np.arange(300), dtype=pl.Int32),
        pl.Series("vector", np.arange(900, dtype=np.float32).reshape(300, 3)),
    )
    if change is not None:
        further = further.with_columns(change)
    dataset = write_dataset(path, _schema(), {"train": [further.head(150), further.tail(150)]}, encoded=True)
    return Dataset.open(dataset.path)


@pytest.mark.parametrize("memory_limit", [1 << 30, SMALL])
def test_further_columns_go_with_their_rows(tmp_path: Path, memory_limit: int) -> None:
    loader = Loader(
        _with_further(tmp_path / "data"),
        "train",
        64,
        shuffle=True,
        memory_limit=memory_limit,
        extra=("propensity", "vector", "clicks_before", "click"),
    )
    batches = list(loader)
    assert sorted(_rows(batches)) == list(range(300))
    for batch in batches:
        row_B = batch.numeric_BN[:, 0]
        assert batch.extra["clicks_before"].dtype == torch.int64
        assert torch.equal(batch.extra["clicks_before"], row_B.long())
        assert torch.allclose(batch.extra["propensity"], row_B / 300)
        assert batch.extra["propensity"].dtype == torch.float32
        assert torch.equal(batch.extra["vector"], 3 * row_B[:, None] + torch.arange(3))
        assert torch.equal(batch.extra["click"], batch.labels_BT[:, 0])


@pytest.mark.parametrize(
    ("change", "extra", "message"),
    [
        (
            None,
            "teacher",
            'column "teacher" is missing; further columns that were kept: propensity, clicks_before',
        ),
        (pl.lit("a").alias("vector"), "vector", 'column "vector" is .*string.*, expected numbers, or lists of them'),
        (pl.lit(None, pl.Int64).alias("vector"), "vector", 'column "vector" has nulls'),
        (
            pl.int_ranges(pl.int_range(pl.len()) % 3).alias("vector"),
            "vector",
            'column "vector" has lists of unequal length',
        ),
    ],
)
def test_a_further_column_that_cannot_be_had_is_one_line(
    tmp_path: Path, change: pl.Expr | None, extra: str, message: str
) -> None:
    dataset = _with_further(tmp_path / "data", change)
    with pytest.raises(ValueError, match=message) as caught:
        list(Loader(dataset, "train", 64, extra=(extra,)))
    assert "\n" not in str(caught.value)
