"""A funnel that is kept fresh: its rankers go on learning, its catalogue is up to date, its retriever follows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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
from fullrank.funnel.catalogue import ACTIVE, BID, SEEN, Catalogue, has_own_histories, usual_context
from fullrank.funnel.distillation import DistillConfig, Distilled, chosen_rows, lists_for, with_lists
from fullrank.funnel.funnel import Funnel
from fullrank.funnel.stages import FINAL, StageSizes
from fullrank.funnel.training import FunnelConfig, config_of
from fullrank.models import Ranker
from fullrank.retrieval import Retriever
from fullrank.retrieval.base import Items
from fullrank.schema import Role, Schema
from fullrank.training.deltas import state_of
from fullrank.training.growing import same_settings
from fullrank.training.learner import Fitted, batches_of, check_training, fresh_ranker, have_grown, with_known_ids
from fullrank.training.manifest import read_manifest
from fullrank.training.recipe import Recipe
from fullrank.training.saving import load_ranker

TIME = KEY_COLUMNS["timestamp"]
DAY = 86_400


class FunnelLearner:
    """A funnel: the section `funnel` of a recipe.

    Every ranker learns each window, once. The retriever is fitted anew to the last windows after the first one, the
    second, the fourth, and so on until `stream.retrieval_every` windows lie between; and whenever there are new ids. An
    early stage with `distill` learns after the final one, from what that says of candidates; as retrieval finds them at
    that time or, where it is not fitted yet, when the window ends.
    """

    def __init__(self, config: FunnelConfig, recipe: Recipe, encoders: Encoders, source: str, place: Path) -> None:
        self.config, self.recipe, self.source, self.place = config, recipe, source, place
        self.encoders = encoders
        self.windows = 0
        self.rankers: dict[str, Fitted] = {}
        # Where the last window began, and rows that stages with `distill` have still to learn.
        self.begun = -1
        self.untaught: list[tuple[pl.DataFrame, int]] = []
        self.teacher: Funnel | None = None
        self.items = self.users = self.context = pl.DataFrame()
        self.until: int | None = None
        self.retriever: Retriever | None = None
        self.indexed: Tensor | None = None
        self.rows: list[pl.DataFrame] = []

    @property
    def judged(self) -> Ranker:
        return self.rankers[FINAL].model

    @property
    def is_whole(self) -> bool:
        return self.retriever is not None or bool(self._recent())

    def _models(self) -> dict[str, Ranker]:
        """The ranker of each stage."""
        models = {name: fitted.model for name, fitted in self.rankers.items()}
        return {name: model.student if isinstance(model, Distilled) else model for name, model in models.items()}

    def _learning(self, name: str, ranker: Ranker) -> Ranker:
        """What learns for a ranker to get better."""
        distill = self._distilled().get(name)
        return ranker if distill is None else Distilled.around(ranker, distill, self.config.value)

    def _distilled(self) -> dict[str, DistillConfig]:
        """How early stages learn from the final one; those that do, the last one first."""
        return {stage.name: stage.distill for stage in reversed(self.config.early) if stage.distill is not None}

    @classmethod
    def begin(cls, recipe: Recipe, encoders: Encoders, start: Path | None, source: str, place: Path) -> Self:
        config = config_of(recipe, source)
        learner = cls(config, recipe, encoders, source, place)
        for name, settings in learner._settings().items():
            check_training(settings.training, f"funnel.{name}.training")
            if start is None:
                model = learner._learning(name, fresh_ranker(settings.model, encoders, config.seed))
                learner.rankers[name] = Fitted(model, settings.training, settings.embedding, extra=recipe.data.extra)
        if start is not None:
            learner._take(_opened(start), {})
            models = learner._models()
            if any(not same_settings(models[name], own.model) for name, own in learner._settings().items()):
                raise ValueError(f"{start} has other models than the recipe: they must agree")
            have_grown(learner.encoders, encoders)  # It is published as it is: the first window brings its ids.
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
        self.until = funnel.until
        self.indexed = funnel.items.keys_I[funnel.items.active_I]
        # The retriever of a bundle to start from is as good as a new one: its next fit is a whole period away.
        self.windows = int(state["windows"]) if state else self.recipe.stream.retrieval_every
        self.begun, self.teacher = int(state["begun"]) if state else -1, None
        if SEEN not in self.items.columns:
            # Of a funnel that was trained elsewhere: what may be retrieved is as if seen when the stream begins.
            unseen = pl.when(ACTIVE).then(None).otherwise(0) if ACTIVE in self.items.columns else pl.lit(None)
            self.items = self.items.with_columns(unseen.cast(pl.Int64).alias(SEEN))
        if SEEN not in self.users.columns and self.users.width and has_own_histories(self.encoders.schema):
            self.users = self.users.with_columns(pl.lit(None, pl.Int64).alias(SEEN))
        for path in self._remembered(self.begun)[-1:]:
            self._see(pl.read_parquet(path))  # The bundle has no ids that came within its window.
        for name, model in funnel.rankers.items():
            own = {key.removeprefix(f"{name}|"): value for key, value in state.items() if key.startswith(f"{name}|")}
            learning = self._learning(name, model)
            if own:
                self.rankers[name].load(learning, own)
            else:
                settings = self._settings()[name]
                self.rankers[name] = Fitted(
                    learning, settings.training, settings.embedding, extra=self.recipe.data.extra, is_new=False
                )

    def grow(self, encoders: Encoders) -> bool:
        if not have_grown(self.encoders, encoders):
            return False
        self.encoders = encoders
        for fitted in self.rankers.values():
            fitted.grow(encoders.schema)
        self.retriever = self.teacher = None  # its tables are those of the ids that it knew
        return True

    def learn(self, rows: pl.DataFrame, seed: int) -> int:
        distilled = self._distilled()
        aside = [fitted.learn(rows, seed) for name, fitted in self.rankers.items() if name not in distilled]
        self.rows.append(rows)
        if distilled:
            self.untaught.append((rows, seed))
            self._distill()
        return max(aside)

    def _distill(self) -> None:
        """Let early stages learn from the final one what they have still to learn, if there is retrieval."""
        if self.retriever is None:
            return
        for rows, seed in self.untaught:
            if self.teacher is None:
                sizes = StageSizes(retrieve=self.config.sizes.retrieve)
                self.teacher = self._funnel(users=None, early={}, sizes=sizes)
            for name, distill in self._distilled().items():
                fitted, generator = self.rankers[name], torch.Generator().manual_seed(seed)
                # No more lists than the batches take.
                size = fitted.training.batch_size
                count = min(distill.requests, -(-rows.height // size) * distill.lists_per_batch)
                chosen = rows[chosen_rows(rows.height, count, generator).tolist()]
                (users,) = batches_of(chosen, self.encoders.schema, chosen.height)
                lists = lists_for(self.teacher, users, distill, generator)
                fitted.learn(rows, seed, partial(with_lists, lists=lists, count=distill.lists_per_batch, seed=seed))
        self.untaught = []

    def end_window(self, begin: int) -> None:
        rows, self.rows = pl.concat(self.rows), []
        self._remember(rows, begin)
        self.windows, self.begun, self.teacher = self.windows + 1, begin, None
        self._see(rows)
        every = self.recipe.stream.retrieval_every
        is_due = self.windows % every == 0 or (self.windows < every and not self.windows & (self.windows - 1))
        if self.retriever is None or is_due:
            self._fit()
        else:
            self._index(anew=False)
        self._distill()

    def _see(self, rows: pl.DataFrame) -> None:
        """Know of items and users what rows said last, and which items may be retrieved."""
        schema = self.encoders.schema
        self.until = max(self.until or 0, int(rows.select(pl.col(TIME).max()).item()))
        self.items = _with_last(self.items, rows, schema, "item").with_columns(pl.col(SEEN).fill_null(rows[TIME].min()))
        if schema.keys.user_id is not None:
            self.users = _with_last(self.users, rows, schema, "user")
        active = pl.lit(True)
        if self.config.active_days is not None:
            active = pl.col(SEEN) >= pl.col(SEEN).max() - round(self.config.active_days * DAY)
        self.items = self.items.with_columns(active.alias(ACTIVE))

    def _catalogue(self, known: pl.DataFrame) -> Catalogue:
        """Of items or users; those that came within the window may have ids that the rankers' tables do not."""
        schema = self.encoders.schema
        return Catalogue.of(with_known_ids(known, schema), schema)

    def _remember(self, rows: pl.DataFrame, begin: int) -> None:
        """Keep the rows of the last windows for the retriever."""
        self.place.mkdir(exist_ok=True)
        path = self.place / f"{begin:012d}.parquet"
        hidden = path.with_name(f".{path.name}")
        rows.write_parquet(hidden)
        atomic.replace(hidden, path)
        # Twice as many as a fit needs: a stream that goes on from an older checkpoint finds its own.
        for old in self._remembered(begin)[: -2 * self.recipe.stream.retrieval_windows]:
            old.unlink()

    def _remembered(self, begin: int) -> list[Path]:
        """The rows of windows up to the one that began at this second."""
        return [path for path in sorted(self.place.glob("[0-9]*.parquet")) if int(path.stem) <= begin]

    def _recent(self) -> list[Path]:
        """What retrieval is fitted to."""
        return self._remembered(self.begun)[-self.recipe.stream.retrieval_windows :]

    def _fit(self) -> None:
        """Fit retrieval anew."""
        schema = self.encoders.schema
        with Scratch() as place:
            rows = [with_known_ids(pl.read_parquet(path), schema) for path in self._recent()]
            dataset = written(place / "recent", self.encoders, rows)
            self.context = usual_context(dataset)
            self.retriever = self.config.retriever(schema)
            self.retriever.fit(dataset)
        self._index(anew=True)

    def _index(self, *, anew: bool) -> None:
        """Let the active items, and no other, be found."""
        assert self.retriever is not None
        catalogue = self._catalogue(self.items)
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
        return {**tensors, "windows": torch.tensor(self.windows), "begun": torch.tensor(self.begun)}

    def weights(self) -> dict[str, Tensor]:
        return state_of(self._models())

    def load(self, bundle: Path, state: dict[str, Tensor]) -> None:
        self.rows, self.untaught = [], []
        self._take(_opened(bundle), state)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        if self.retriever is None:  # because ids have just come, and deltas need a funnel that has them
            self._fit()
        models = self._models()
        early = {name: models[name] for name in models if name != FINAL}
        users = self._catalogue(self.users) if self.users.height else None
        settings = {"sizes": self.config.stage_sizes, "slate": self.config.slate, "deadlines": self.config.deadlines}
        funnel = self._funnel(users=users, early=early, **settings)
        save_bundle(funnel, path, about=about, overwrite=True)

    def _funnel(self, **parts: Any) -> Funnel:
        """A funnel of what is known, and of other parts."""
        assert self.retriever is not None
        return Funnel(
            encoders=self.encoders,
            items=self._catalogue(self.items),
            context=self.context,
            retriever=self.retriever,
            final=self.judged,
            value=self.config.value,
            until=self.until,
            **parts,
        )

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
    """The catalogue of items or users with what was last seen of them, and when; for items also the bid."""
    key = KEY_COLUMNS[f"{role}_id"]
    chosen = schema.select({role})
    columns = [*chosen.numeric_columns, *chosen.embedded(), *chosen.event_number_keys]
    market = [BID] if role == "item" and schema.keys.bid is not None else []
    seen = [pl.col(TIME).last().alias(SEEN)] if role == "item" or has_own_histories(schema) else []
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
