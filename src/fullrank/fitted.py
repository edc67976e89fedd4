"""The front door: a table in, an object out that predicts, recommends, reports and saves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from fullrank.compression.quantization import Method
from fullrank.data.dataset import Dataset
from fullrank.data.frames import polars_frame
from fullrank.data.loader import batch_from_frame
from fullrank.embeddings import EmbeddingCollection, EmbeddingOptimizer
from fullrank.embeddings.admitted import AdmittedTable
from fullrank.embeddings.packed import Bits
from fullrank.funnel.bundle import load_bundle, save_bundle
from fullrank.funnel.evaluation import evaluate_funnel
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.pruning import prune_content
from fullrank.funnel.quantizing import quantize_content
from fullrank.funnel.report import facts_of, write_report
from fullrank.funnel.requests import Request
from fullrank.funnel.scorer import ROWS_AT_ONCE, Scorer
from fullrank.funnel.training import FunnelConfig, train_funnel
from fullrank.models import Ranker, RankerSpec
from fullrank.schema import FIRST_VOCABULARY_ID, RAW_IDS, Schema
from fullrank.training.config import TrainerConfig
from fullrank.training.evaluation import evaluate
from fullrank.training.result import TrainingResult, learning_curves
from fullrank.training.run import ONLY_STAGE, Progress, train_ranker

FUNNEL = "funnel"


class Fitted:
    """A trained ranker, or a funnel whose final stage is one, with the encoders of its training data.

    Attributes:
        ranker: the model, or the final stage's.
        funnel: None for a single ranker.
        dataset: what it was trained on; None for one that was loaded.
        schema: what its columns mean.
    """

    def __init__(
        self,
        content: Scorer | Funnel,
        dataset: Dataset | None = None,
        results: Mapping[str, TrainingResult] | None = None,
    ) -> None:
        self.funnel = content if isinstance(content, Funnel) else None
        self._content = content
        self._scorer = content.scorer if isinstance(content, Funnel) else content
        self.ranker: Ranker = self._scorer.model
        self.schema: Schema = self._scorer.schema
        self.dataset = dataset
        self._training = None if results is None else learning_curves(results)

    def __repr__(self) -> str:
        labels = ", ".join(label.name for label in self.schema.labels)
        kind = self.ranker.name if self.funnel is None else f"funnel, final stage {self.ranker.name}"
        return f"<Fitted {kind}: {labels}; {self.ranker.num_parameters().total:,} parameters>"

    @torch.inference_mode()
    def predict(self, data: object) -> npt.NDArray[np.float32]:
        """Probabilities of binary labels, values of others, by the ranker (a funnel's final stage).

        Args:
            data: a table of pandas, polars or Arrow with the feature columns of the log that was trained on; a feature
                that it lacks is missing in every row, other columns are left aside. Histories and counters that were
                derived from the log have to be there.

        Returns:
            Shape (rows,) for one label, (rows, labels) for several.

        Raises:
            ValueError: if a value has the wrong type; names row and column.
        """
        frame = polars_frame(data)
        features = [name for name in frame.columns if name in self._scorer.columns]
        if not features:
            raise ValueError(f"the table has none of the columns {', '.join(self._scorer.columns)}")
        self._check_derived(frame)
        encoded = self._scorer.encoders.transform(frame.select(features), allow_missing=True)
        batch = batch_from_frame(encoded, self.schema)
        pieces = [self.ranker(batch[i : i + ROWS_AT_ONCE]).logits_BT for i in range(0, len(batch), ROWS_AT_ONCE)]
        logits = torch.cat(pieces) if pieces else torch.zeros(0, len(self.schema.labels))
        values: npt.NDArray[np.float32] = self._scorer.predictions(logits).numpy()
        return values[:, 0] if values.shape[1] == 1 else values

    def evaluate(self, data: object = None, split: str = "test") -> dict[str, Any]:
        """Metrics: NE, AUC, calibration and the like.

        Args:
            data: a table with features and labels, of a later day for example; or a dataset with the same encoders,
                or these extended. Default: the dataset of training.
            split: of a dataset.

        Returns:
            By label, for a ranker and for any table; for a funnel on a dataset what `evaluate_funnel` gives.

        Raises:
            ValueError: if there is nothing to evaluate on, or a label's column is missing.
        """
        if data is None or isinstance(data, Dataset):
            dataset = data if isinstance(data, Dataset) else self._own_dataset("evaluate")
            report = evaluate_funnel(self._content, dataset, split)
            return report if self.funnel is not None else dict(report["stages"]["final"])
        frame = polars_frame(data)
        for label in self.schema.labels:
            if label.name not in frame.columns:
                raise ValueError(f'the table has no column "{label.name}", which is a label')
        self._check_derived(frame)
        batch = batch_from_frame(self._scorer.encoders.transform(frame, allow_missing=True), self.schema)
        return evaluate(self.ranker, [batch[i : i + ROWS_AT_ONCE] for i in range(0, len(batch), ROWS_AT_ONCE)])

    def recommend(self, users: Any, k: int = 10) -> pl.DataFrame:
        """The best k items for each user, best first; users that training never saw are served.

        Args:
            users: one user id, or several, or `Request`s that say more of user and context.

        Returns:
            Columns `user_id`, `rank` from 1, `item_id`, `value`, and one prediction for each label.

        Raises:
            ValueError: if this is a single ranker, which has no items to choose from.
        """
        if self.funnel is None:
            raise ValueError('a single ranker has no items to recommend: fit with model="funnel"')
        several = isinstance(users, Sequence) and not isinstance(users, str)
        requests = [user if isinstance(user, Request) else Request(user) for user in (users if several else [users])]
        rows = [
            {"user_id": request.user_id, "rank": rank, "item_id": item.item_id, "value": item.value, **item.predictions}
            for request, found in zip(requests, self.funnel.recommend(requests, k), strict=True)
            for rank, item in enumerate(found.items, 1)
        ]
        columns = ("user_id", "rank", "item_id", "value", *(label.name for label in self.schema.labels))
        return pl.DataFrame({name: [row[name] for row in rows] for name in columns}, strict=False)

    def embeddings(self) -> dict[str, pl.DataFrame]:
        """The vectors of each embedding table: columns `value`, as in the log, and `vector`.

        A hashed table has its buckets as values, one of raw ids the numbers of those that have a row (62 bits of the
        hash where they were texts); of raw ids that share rows there is nothing to list. Of several tables of one name,
        such as the weights of a linear term and vectors, the widest is given.
        """
        widest: dict[str, EmbeddingCollection] = {}
        for module in self.ranker.modules():
            if isinstance(module, EmbeddingCollection):
                for table, width in module.table_widths().items():
                    if table not in widest or width > widest[table].table_widths()[table]:
                        widest[table] = module
        found = {}
        for table, collection in widest.items():
            vocabulary = self._scorer.encoders.vocabularies.get(table)
            kind, rows = collection.kinds.get(table), self.schema.tables()[table]
            if rows >= RAW_IDS:
                if not isinstance(kind, AdmittedTable):
                    continue
                ids = kind.live_ids()
                values = pl.Series(ids.numpy() - FIRST_VOCABULARY_ID)
            else:
                ids = torch.arange(FIRST_VOCABULARY_ID if vocabulary is not None else 0, rows)
                values = vocabulary.values if vocabulary is not None else pl.Series(ids.numpy())
            vectors = collection.vectors(table, ids).numpy()
            dtype = pl.Array(pl.Float32, vectors.shape[1])
            found[table] = pl.DataFrame([values.alias("value"), pl.Series("vector", vectors, dtype=dtype)])
        return found

    def report(self, path: Path | str, split: str = "test") -> Path:
        """Write an HTML page: the metrics on a split of the dataset of training, and how it learnt; the path."""
        dataset = self._own_dataset("report")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        name = self.ranker.name if self.funnel is None else FUNNEL
        title = f"{name} on {dataset.path.resolve().name}, {split}"
        measured = evaluate_funnel(self._content, dataset, split)
        write_report(path, title, measured, facts_of(self._content, dataset), self._training)
        return path

    def save(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write a bundle, which `fullrank.load` opens and `fullrank serve` serves; the path.

        Raises:
            ValueError: if it exists and `overwrite` is not set.
        """
        save_bundle(self._content, Path(path), overwrite=overwrite)
        return Path(path)

    def quantize(self, bits: Bits = 4, method: Method = "greedy", **settings: Any) -> Fitted:
        """The same with its tables as codes of a few bits, for serving; this one stays as it is.

        Args:
            settings: further ones of `fullrank.compression.quantize_ranker`, such as `tables` or `max_error`.

        Raises:
            ValueError: as there, or if nothing would become smaller.
        """
        content, _ = quantize_content(self._content, bits=bits, method=method, **settings)
        return Fitted(content, self.dataset)

    def prune(self, **settings: Any) -> Fitted:
        """The same without the rows of some ids, for serving; this one stays as it is.

        Args:
            settings: of `fullrank.compression.prune_ranker`: `min_count`, or `share` and `by`; `tables`.

        Raises:
            ValueError: as there.
        """
        content, _ = prune_content(self._content, **settings)
        return Fitted(content, self.dataset)

    def _check_derived(self, frame: pl.DataFrame) -> None:
        """A table of rows has no past of its own: what the import derived has to be in it."""
        names = [counter.name for counter in self.schema.counters]
        names += [sequence.column(field) for sequence in self.schema.histories for field in sequence.fields]
        for name in names:
            if name not in frame.columns:
                raise ValueError(
                    f'the table has no column "{name}", which the import derived from the rows before: add it (empty '
                    "where nothing came before), or import these rows together with the log"
                )

    def _own_dataset(self, what: str) -> Dataset:
        if self.dataset is None:
            raise ValueError(f"{what}: this was loaded from a bundle, which has no data: pass a table or a dataset")
        return self.dataset


def fit(
    data: object,
    label: str | Collection[str] = (),
    model: str | Mapping[str, Any] | RankerSpec | FunnelConfig = "dcn_v2",
    *,
    schema: Schema | None = None,
    user_id: str | None = None,
    item_id: str | None = None,
    timestamp: str | None = None,
    training: TrainerConfig | Mapping[str, Any] | None = None,
    embedding: EmbeddingOptimizer | Mapping[str, Any] | None = None,
    directory: Path | str | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Train on a table, a log's file or a dataset.

    Args:
        data: what `Dataset.from_frame` takes, or a `Dataset`.
        label: columns to predict, one or several; not for a dataset, whose labels are made.
        model: the name of a ranker (`fullrank models` lists them), `{name: ..., **fields of its Config}` or a
            `RankerSpec`; or "funnel" or a `FunnelConfig` for retrieval, early and final stage.
        schema: what the columns mean; default guessed.
        user_id, item_id, timestamp: columns with these keys, if the schema is guessed; a funnel needs the first two.
        training: how to fit, of a single ranker; default three epochs at most, the best by validation.
        embedding: how tables learn, of a single ranker.
        directory: for checkpoints.
        progress: told the stage, the step, the number of steps (0 if unknown) and the loss.

    Raises:
        ValueError: if the data or the settings are wrong; names what and where.
    """
    if isinstance(data, Dataset):
        if label or schema or user_id or item_id or timestamp:
            raise ValueError("a dataset has its labels, keys and schema: make another one with Dataset.from_frame")
        dataset = data
    else:
        dataset = Dataset.from_frame(data, schema, label=label, user_id=user_id, item_id=item_id, timestamp=timestamp)
    place = None if directory is None else Path(directory)
    if isinstance(model, FunnelConfig) or model == FUNNEL:
        if training is not None or embedding is not None:
            raise ValueError("the stages of a funnel have their own training: pass a FunnelConfig as model")
        config = model if isinstance(model, FunnelConfig) else FunnelConfig()
        funnel, results = train_funnel(dataset, config, run_directory=place, progress=progress)
        return Fitted(funnel, dataset, results)

    def tell(step: int, steps: int, loss: float) -> None:
        if progress is not None:
            progress("training", step, steps, loss)

    settings = training if isinstance(training, TrainerConfig) else TrainerConfig(**_defaults(dataset, training or {}))
    tables = embedding if isinstance(embedding, EmbeddingOptimizer) else EmbeddingOptimizer(**(embedding or {}))
    spec = RankerSpec.of(model)
    ranker, result = train_ranker(spec, dataset, settings, tables, directory=place, progress=tell)
    return Fitted(Scorer(dataset.encoders, ranker), dataset, {ONLY_STAGE: result})


def load(path: Path | str) -> Fitted:
    """Open a bundle of a ranker or a funnel. Runs no code from its files.

    Raises:
        ValueError: if it is none, is damaged, or needs a ranker or retriever that is not registered here.
    """
    return Fitted(load_bundle(Path(path)))


def _defaults(dataset: Dataset, given: Mapping[str, Any]) -> dict[str, Any]:
    """Training settings with what suits a first try: batches small enough for some hundred steps an epoch."""
    rows = dataset.rows("train")
    batch_size = max(64, min(4096, 1 << max(0, (rows // 200).bit_length() - 1)))
    return {"epochs": 3, "batch_size": batch_size, "patience": 1, **given}
