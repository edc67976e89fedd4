"""A funnel that is kept fresh: its rankers go on learning, its catalogue is up to date, its retriever follows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import polars as pl
import torch
from torch import Tensor

from fullrank.data import atomic
from fullrank.data.building import ShardWriter, write_manifest
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS, Encoders
from fullrank.data.scratch import Scratch
from fullrank.funnel.bundle import load_bundle, save_bundle
from fullrank.funnel.catalogue import ACTIVE, BID, Catalogue, usual_context
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.stages import FINAL
from fullrank.funnel.training import FunnelConfig, config_of
from fullrank.models import Ranker
from fullrank.retrieval import Retriever
from fullrank.retrieval.base import Items
from fullrank.schema import Role, Schema
from fullrank.training.growing import same_settings
from fullrank.training.learner import Fitted, check_training, fresh_ranker, have_grown
from fullrank.training.manifest import read_manifest
from fullrank.training.recipe import Recipe
from fullrank.training.saving import load_ranker

TIME = KEY_COLUMNS["timestamp"]
# In the catalogue of a stream: when each item was last shown.
SEEN = "__seen"
DAY = 86_400


class FunnelLearner:
    """A funnel: the section `funnel` of a recipe.

    Every ranker learns each window, once. The retriever is fitted anew to the last windows after the first one, the
    second, the fourth, and so on until `stream.retrieval_every` windows lie between; and whenever there are new ids.
    """

    deltas = False

    def __init__(self, config: FunnelConfig, recipe: Recipe, encoders: Encoders, source: str, place: Path) -> None:
        self.config, self.recipe, self.source, self.place = config, recipe, source, place
        self.encoders = encoders
        self.windows = 0
        self.rankers: dict[str, Fitted] = {}
        self.items = self.users = self.context = pl.DataFrame()
        self.retriever: Retriever | None = None
        self.indexed: Tensor | None = None
        self.rows: list[pl.DataFrame] = []

    @property
    def judged(self) -> Ranker:
        return self.rankers[FINAL].model

    @classmethod
    def begin(cls, recipe: Recipe, encoders: Encoders, start: Path | None, source: str, place: Path) -> Self:
        config = config_of(recipe, source)
        learner = cls(config, recipe, encoders, source, place)
        for name, settings in learner._settings().items():
            check_training(settings.training, f"funnel.{name}.training")
            model = fresh_ranker(settings.model, encoders, config.seed)
            learner.rankers[name] = Fitted(model, settings.training, settings.embedding, extra=recipe.data.extra)
        if start is not None:
            learner._take(_opened(start), {})
            if any(
                not same_settings(learner.rankers[name].model, own.model) for name, own in learner._settings().items()
            ):
                raise ValueError(f"{start} has other models than the recipe: they must agree")
            # The first window lets it grow: until then the bundle is published as it is.
        return learner

    def _settings(self) -> dict[str, Any]:
        """Of each ranker, in the order of the stages."""
        return {**{stage.name: stage for stage in self.config.early}, FINAL: self.config.final}

    def _take(self, funnel: Funnel, state: dict[str, Tensor]) -> None:
        """Go on with the parts of a bundle, and what the optimisers knew, if that is known."""
        if list(funnel.early) != list(self._settings())[:-1]:
            raise ValueError(f"the bundle has the early stages {', '.join(funnel.early)}, and the recipe others")
        self.encoders = funnel.encoders
        self.items, self.context, self.retriever = funnel.items.frame, funnel.context, funnel.retriever
        self.users = pl.DataFrame() if funnel.users is None else funnel.users.frame
        self.indexed = funnel.items.keys_I[funnel.items.active_I]
        # The retriever of a bundle to start from is as good as a new one: its next fit is a whole period away.
        self.windows = int(state["windows"]) if state else self.recipe.stream.retrieval_every
        for name, model in {**funnel.early, FINAL: funnel.final}.items():
            own = {key.removeprefix(f"{name}|"): value for key, value in state.items() if key.startswith(f"{name}|")}
            if own:
                self.rankers[name].load(model, own)
            else:
                settings = self._settings()[name]
                self.rankers[name] = Fitted(
                    model, settings.training, settings.embedding, extra=self.recipe.data.extra, is_new=False
                )

    def grow(self, encoders: Encoders) -> bool:
        if not have_grown(self.encoders, encoders):
            return False
        self.encoders = encoders
        for fitted in self.rankers.values():
            fitted.grow(encoders.schema)
        self.retriever = None  # its tables are those of the ids that it knew
        return True

    def learn(self, rows: pl.DataFrame, seed: int) -> int:
        aside = [fitted.learn(rows, seed) for fitted in self.rankers.values()]
        self.rows.append(rows)
        return max(aside)

    def end_window(self, begin: int) -> None:
        rows, self.rows = pl.concat(self.rows), []
        self._remember(rows, begin)
        schema, self.windows = self.encoders.schema, self.windows + 1
        if self.items.height and SEEN not in self.items.columns:
            self.items = _as_seen(self.items, begin)
        self.items = _with_last(self.items, rows, schema, "item")
        if schema.keys.user_id is not None:
            self.users = _with_last(self.users, rows, schema, "user")
        newest = self.items[SEEN].max()
        active = pl.lit(True)
        if self.config.active_days is not None:
            active = pl.col(SEEN) >= pl.lit(newest) - round(self.config.active_days * DAY)
        self.items = self.items.with_columns(active.alias(ACTIVE))
        every = self.recipe.stream.retrieval_every
        is_due = self.windows % every == 0 or (self.windows < every and not self.windows & (self.windows - 1))
        catalogue = Catalogue.of(self.items, schema)
        if self.retriever is None or is_due:
            self._fit(schema)
            self._index(catalogue, anew=True)
        else:
            self._index(catalogue, anew=False)

    def _remember(self, rows: pl.DataFrame, begin: int) -> None:
        """Keep the rows of the last windows for the retriever."""
        self.place.mkdir(exist_ok=True)
        path = self.place / f"{begin:012d}.parquet"
        partial = path.with_name(f".{path.name}")
        rows.write_parquet(partial)
        atomic.replace(partial, path)
        self.recent = [old for old in sorted(self.place.glob("*.parquet")) if old.name <= path.name]
        # Twice as many as a fit needs: a stream that goes on from an older checkpoint finds its own.
        for old in self.recent[: -2 * self.recipe.stream.retrieval_windows]:
            old.unlink()
        self.recent = self.recent[-self.recipe.stream.retrieval_windows :]

    def _fit(self, schema: Schema) -> None:
        with Scratch() as place:
            dataset = written(place / "recent", self.encoders, [pl.read_parquet(path) for path in self.recent])
            self.context = usual_context(dataset)
            self.retriever = self.config.retrieval.build(schema)
            self.retriever.fit(dataset)

    def _index(self, catalogue: Catalogue, *, anew: bool) -> None:
        """Let the active items, and no other, be found."""
        assert self.retriever is not None
        active_I = catalogue.active_I
        keys = catalogue.keys_I[active_I]
        if anew or self.indexed is None:
            self.retriever.index(Items(keys, catalogue.rows.take(active_I)))
        else:
            gone = self.indexed[~torch.isin(self.indexed, keys)]
            is_new = ~torch.isin(keys, self.indexed)
            if gone.numel():
                self.retriever.remove(gone)
            if bool(is_new.any()):
                self.retriever.add(Items(keys[is_new], catalogue.rows.take(active_I[is_new])))
        self.indexed = keys

    def state(self) -> dict[str, Tensor]:
        tensors = {f"{name}|{key}": value for name, own in self.rankers.items() for key, value in own.state().items()}
        return {**tensors, "windows": torch.tensor(self.windows)}

    def load(self, bundle: Path, state: dict[str, Tensor]) -> None:
        self.rows = []
        self._take(_opened(bundle), state)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        assert self.retriever is not None
        schema = self.encoders.schema
        funnel = Funnel(
            encoders=self.encoders,
            items=Catalogue.of(self.items, schema),
            users=Catalogue.of(self.users, schema) if self.users.height else None,
            context=self.context,
            retriever=self.retriever,
            early={name: fitted.model for name, fitted in self.rankers.items() if name != FINAL},
            final=self.judged,
            value=self.config.value,
            sizes=self.config.stage_sizes,
            slate=self.config.slate,
            deadlines=self.config.deadlines,
        )
        save_bundle(funnel, path, about=about, overwrite=True)

    def opened(self, bundle: Path) -> Ranker:
        stage = read_manifest(bundle).stages[-1]
        return load_ranker(bundle, stage, Schema.read(bundle / "schema.json"), bundle / f"{FINAL}.safetensors")


def _opened(bundle: Path) -> Funnel:
    funnel = load_bundle(bundle)
    if not isinstance(funnel, Funnel):
        raise ValueError(f"{bundle} is a single ranker, and the recipe is of a funnel")
    return funnel


def written(
    place: Path, encoders: Encoders, frames: Sequence[pl.DataFrame], split: Literal["train", "test"] = "train"
) -> Dataset:
    """A dataset of rows that are encoded already."""
    place.mkdir(parents=True)
    writer = ShardWriter(place, split)
    for frame in frames:
        writer.add(frame)
    writer.close()
    write_manifest(place, encoders, {split: writer}, {}, {"source": "a stream"})
    return Dataset.open(place)


def _with_last(known: pl.DataFrame, rows: pl.DataFrame, schema: Schema, role: Role) -> pl.DataFrame:
    """The catalogue of items or users with what was last seen of them; for items also bid and time."""
    key = KEY_COLUMNS[f"{role}_id"]
    chosen = schema.select({role})
    columns = [*chosen.numeric_columns, *chosen.embedded(), *chosen.event_number_keys]
    market = [BID] if role == "item" and schema.keys.bid is not None else []
    seen = [pl.col(TIME).last().alias(SEEN)] if role == "item" else []
    last = (
        rows.filter(pl.col(key).is_not_null())
        .sort(TIME, maintain_order=True)
        .group_by(key, maintain_order=True)
        .agg(pl.col([*columns, *market]).last(), *seen)
    )
    if not known.height:
        return last.sort(key)
    both = pl.concat([known.select(last.columns), last], how="vertical_relaxed")
    return both.unique(key, keep="last", maintain_order=True).sort(key)


def _as_seen(items: pl.DataFrame, time: int) -> pl.DataFrame:
    """The items of a bundle that no stream made, which does not say when they were shown: the active ones now."""
    active = pl.col(ACTIVE) if ACTIVE in items.columns else pl.lit(True)
    return items.with_columns(pl.when(active).then(pl.lit(time, pl.Int64)).otherwise(pl.lit(0, pl.Int64)).alias(SEEN))
