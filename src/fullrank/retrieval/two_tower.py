"""Two towers trained with in-batch sampled softmax, and the popularity of items beside them."""

# Shapes: B rows of a batch, I items (of the batch, of the catalogue), P positive rows of the log, D width of vectors.

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar, Self

import polars as pl
import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor
from torch.nn import functional as F

from fullrank.batch import Batch, RowGather
from fullrank.data.dataset import Dataset
from fullrank.data.encoders import KEY_COLUMNS
from fullrank.data.loader import batch_from_frame, partial_batch
from fullrank.embeddings import AnyTable, TableConfig, Tables
from fullrank.layers.mlp import MLP
from fullrank.layers.towers import Towers
from fullrank.retrieval.base import Items, Progress, item_keys
from fullrank.retrieval.recent_clicks import RecentClicks, best_clicks
from fullrank.retrieval.vector_retriever import VectorRetriever
from fullrank.retrieval.vectors.snapshot import TYPICAL
from fullrank.schema import Schema

# Rows of a tower's forward pass when all items are encoded.
ROWS_AT_ONCE = 8192

# Share of the clicks, the latest, by which the weight of popularity is chosen; at most so many of them, among so many
# items; and how few clicks are too few to choose by.
HELD_OUT, MOST_ROWS, MOST_ITEMS, FEWEST_CLICKS = 0.1, 2000, 20_000, 100


def sampled_softmax_loss(
    user_BD: Tensor,
    item_BD: Tensor,
    item_keys_B: Tensor,
    frequency_B: Tensor | None = None,
    *,
    temperature: float = 1.0,
    item_bias_B: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each row's own item among the distinct items of the batch, corrected for how they came there.

    With s_ij = u_i·v_j / temperature + bias_j the logits are s_ij - log Q_j, Q_j = 1 - (1 - q_j)^B being the
    probability that item j of frequency q_j is in a batch of B rows. Scores then converge to log P(j|i); without the
    correction, frequent items serve too often as negatives and scores converge to log P(j|i) - log P(j).

    Deviation: the paper takes the items of all rows and log q_j. Rows that share an item are then false negatives of
    one another, and masking them biases the estimate where items repeat in a batch. Distinct items need no mask; for
    B q_j much below 1 the two agree up to a constant, for B q_j much above 1 this becomes the full softmax.

    Args:
        item_keys_B: int64, equal for equal items.
        frequency_B: q of each row's item, its share among the rows that batches are drawn from; no correction when
            omitted.

    Source: Yi et al., Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations, RecSys 2019.
    """
    rows = user_BD.shape[0]
    keys_I, own_B = torch.unique(item_keys_B, return_inverse=True)
    row_I = own_B.new_empty(keys_I.numel()).scatter_(0, own_B, torch.arange(rows, device=own_B.device))
    logits_BI = user_BD @ item_BD.index_select(0, row_I).T / temperature
    if item_bias_B is not None:
        logits_BI = logits_BI + item_bias_B[row_I]
    if frequency_B is not None:
        in_batch_I = -torch.expm1(rows * torch.log1p(-frequency_B[row_I].double().clamp(1e-12, 1 - 1e-12)))
        logits_BI = logits_BI - in_batch_I.log().to(logits_BI.dtype)
    return F.cross_entropy(logits_BI, own_B)


class TwoTower(VectorRetriever):
    """Score = u·v / temperature + b + p, with u from the user's and context's features, v and b from the item's.

    Trains on the rows whose first binary label is 1. Vectors have unit length, so that no item can win by its norm
    alone. p is the item's popularity, w log(1 + clicks): towers know little of items that are rarely or never in a
    batch, and after few steps little of any. w, and whether older clicks count less, is what ranks the last tenth of
    the clicks (of a log without times, a random one) best after training on the others; then all are trained on. To
    the index an item is (v / temperature, b + p) and a user (u, 1): search remains an inner product.
    """

    class Config(VectorRetriever.Config):
        """Hyper-parameters.

        Attributes:
            embedding_dim: width of every table that the schema does not size itself.
            embedding_init: standard deviation that tables start with.
            tables: how tables are stored that are not plain, by name, as in `model.tables` of a ranker.
            hidden: widths of either tower's MLP.
            output_dim: width of the vectors of users and items.
            temperature: divides inner products in the softmax of training.
            log_q: correct for the frequency of items as in-batch negatives.
            batch_size: positive rows of a step; each row's item is a negative of the others.
            epochs: passes over the positive rows.
            learning_rate: of Adam.
            popularity: add the popularity of items to their scores; takes another training, on nine tenths of the rows.
            seed: of initial weights and of the order of the rows.
        """

        embedding_dim: int = Field(default=16, ge=1)
        embedding_init: float = Field(default=0.05, gt=0)
        tables: dict[str, AnyTable] = Field(default_factory=dict)
        hidden: tuple[PositiveInt, ...] = (64,)
        output_dim: int = Field(default=32, ge=1)
        temperature: float = Field(default=0.1, gt=0)
        log_q: bool = True
        batch_size: int = Field(default=1024, ge=2)
        epochs: int = Field(default=5, ge=1)
        learning_rate: float = Field(default=5e-3, gt=0)
        popularity: bool = True
        seed: int = 0

        @field_validator("tables")
        @classmethod
        def _are_complete(cls, tables: dict[str, TableConfig]) -> dict[str, TableConfig]:
            for name, table in tables.items():
                if getattr(table, "codes", None) is not None:
                    raise ValueError(f'table "{name}": a retriever reads no codes, so it cannot be of {table.kind}')
            return tables

    name = "two_tower"
    config: Config
    added_later: ClassVar = frozenset({"clicks.keys", "clicks.scores"})

    def __init__(self, schema: Schema, config: Config | None = None) -> None:
        super().__init__(schema, config)
        own = self.config
        for table in own.tables:
            if table not in (known := schema.tables()):
                raise ValueError(f'tables: there is no table "{table}"; the schema has {", ".join(known) or "none"}')
        with torch.random.fork_rng():
            torch.manual_seed(own.seed)
            self.towers = Towers(
                schema,
                Tables(embedding_dim=own.embedding_dim, init_std=own.embedding_init, kinds=own.tables),
                # The last output of the item tower is its bias; the user tower's is not used.
                lambda width: MLP(width, own.hidden, own.output_dim + 1),
            )
        self.towers.eval()
        self.clicks = RecentClicks.none()

    @property
    def width(self) -> int:
        return self.config.output_dim + 1

    def fit(self, log: Dataset, *, progress: Progress | None = None) -> Self:
        """Learn from the training part of a log.

        Args:
            progress: told every few steps.

        Raises:
            ValueError: if the log names no item_id, has no binary label or no positive row.
        """
        rows_P, keys_P = positive_rows(log)
        if log.schema.keys.timestamp is None:
            # What stands last may be of users of its own, of whom the others tell nothing.
            order_P = torch.randperm(len(keys_P), generator=torch.Generator().manual_seed(self.config.seed))
            rows_P, keys_P = RowGather(rows_P).take(order_P), keys_P[order_P]
        earlier = len(keys_P) - int(HELD_OUT * len(keys_P))
        chooses = self.config.popularity and len(keys_P) >= FEWEST_CLICKS
        lengths = [earlier, len(keys_P)] if chooses else [len(keys_P)]
        steps = [self._steps(length) for length in lengths]

        def told(step: int, loss: float) -> None:
            if progress is not None and step % 20 == 0:
                progress(step, sum(steps), loss)

        clicks = RecentClicks.of(keys_P) if self.config.popularity else RecentClicks.none()
        if chooses:
            untrained = copy.deepcopy(self.towers)
            self._train(rows_P[:earlier], keys_P[:earlier], told)
            clicks = self._chosen_clicks(log, rows_P, keys_P, earlier)
            self.towers = untrained
        self._train(rows_P, keys_P, lambda step, loss: told(sum(steps[:-1]) + step, loss))
        self.clicks = clicks
        drawn = torch.randperm(len(keys_P), generator=torch.Generator().manual_seed(self.config.seed))[:TYPICAL]
        self.typical_QD = self.user_vectors(RowGather(rows_P).take(drawn))
        return self

    def _steps(self, rows: int) -> int:
        return self.config.epochs * max(1, rows // self.config.batch_size)

    def _train(self, rows_P: Batch, keys_P: Tensor, told: Callable[[int, float], None]) -> None:
        positives = RowGather(rows_P)
        _, item_P, count_I = torch.unique(keys_P, return_inverse=True, return_counts=True)
        frequency_P = (count_I.double() / len(keys_P))[item_P]
        config = self.config
        optimizer = torch.optim.Adam(self.towers.parameters(), lr=config.learning_rate)
        generator = torch.Generator().manual_seed(config.seed)
        steps = self._steps(len(keys_P))
        # The rate falls to 0 linearly: measured on the simulated log, the last epoch is then the best one.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        step = 0
        self.towers.train()
        for _ in range(config.epochs):
            order = torch.randperm(len(keys_P), generator=generator)
            for begin in range(0, max(1, len(order) - config.batch_size + 1), config.batch_size):
                rows = order[begin : begin + config.batch_size]
                user_BD, item_BD, bias_B = self._vectors(positives.take(rows))
                loss = sampled_softmax_loss(
                    user_BD,
                    item_BD,
                    item_P[rows],
                    frequency_P[rows] if config.log_q else None,
                    temperature=config.temperature,
                    item_bias_B=bias_B,
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.towers.ids.forget_fresh(lambda weight: optimizer.state[weight])
                optimizer.step()
                schedule.step()
                step += 1
                told(step, loss.item())
        self.towers.eval()
        self.towers.ids.check_ids = False

    @torch.inference_mode()
    def _chosen_clicks(self, log: Dataset, rows_P: Batch, keys_P: Tensor, earlier: int) -> RecentClicks:
        """The popularity that ranks the clicks after the first `earlier` best, of all clicks."""
        generator = torch.Generator().manual_seed(self.config.seed)
        later = earlier + torch.randperm(len(keys_P) - earlier, generator=generator)[:MOST_ROWS].sort().values
        catalogue = log.catalogue("item")
        if catalogue.height > MOST_ITEMS:
            places = torch.randperm(catalogue.height, generator=generator)[:MOST_ITEMS].sort().values
            share, catalogue = MOST_ITEMS / catalogue.height, catalogue[places.numpy()]
        else:
            share = 1.0
        held = RowGather(rows_P).take(later)
        return best_clicks(
            keys_P,
            earlier,
            self.user_vectors(held),
            (self.item_vectors(held), keys_P[later]),
            (self.item_vectors(partial_batch(catalogue, log.schema)), item_keys(catalogue[KEY_COLUMNS["item_id"]])),
            share,
        )

    def _vectors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        user, item = self.towers(batch)
        return F.normalize(user[:, :-1], dim=1), F.normalize(item[:, :-1], dim=1), item[:, -1]

    @torch.inference_mode()
    def user_vectors(self, users: Batch) -> Tensor:
        user_BD = F.normalize(self.towers.users(users)[:, :-1], dim=1)
        return torch.cat([user_BD, user_BD.new_ones(user_BD.shape[0], 1)], 1)

    @torch.inference_mode()
    def item_vectors(self, items: Batch) -> Tensor:
        pieces = []
        for begin in range(0, len(items), ROWS_AT_ONCE):
            item = self.towers.items(items[begin : begin + ROWS_AT_ONCE])
            unit = F.normalize(item[:, :-1], dim=1) / self.config.temperature
            pieces.append(torch.cat([unit, item[:, -1:]], 1))
        return torch.cat(pieces) if pieces else torch.zeros(0, self.width)

    @torch.inference_mode()
    def index_vectors(self, items: Items) -> Tensor:
        vectors_ID = self.item_vectors(items.features)
        vectors_ID[:, -1] += self.clicks(items.keys_I)
        return vectors_ID

    def state(self) -> dict[str, Tensor]:
        state = {f"towers.{name}": value.contiguous() for name, value in self.towers.state_dict().items()}
        state |= {"clicks.keys": self.clicks.keys_I, "clicks.scores": self.clicks.scores_I}
        return {**state, **super().state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        towers = {name.removeprefix("towers."): value for name, value in state.items() if name.startswith("towers.")}
        self.towers.load_state_dict(towers)
        if "clicks.keys" in state:
            self.clicks = RecentClicks.restored(state["clicks.keys"], state["clicks.scores"])
        super().restore(state)
        # Ids come from the encoders that the tables were built for; a lookup refuses what is outside in any case.
        self.towers.ids.check_ids = False


def positive_rows(log: Dataset, split: str = "train") -> tuple[Batch, Tensor]:
    """Rows whose first binary label is 1, in order of time where the log has it, and their item keys keys_P.

    They are kept in memory: clicks are a few percent of impressions.

    Raises:
        ValueError: if the log names no item_id, has no binary label or no positive row.
    """
    if log.schema.keys.item_id is None:
        raise ValueError(f"{log.path}: a retriever needs an item_id among the schema's keys")
    label = next((label.name for label in log.schema.labels if label.kind == "binary"), None)
    if label is None:
        raise ValueError(f"{log.path}: a retriever needs a binary label to learn from")
    item = KEY_COLUMNS["item_id"]
    frame = log.scan(split).filter((pl.col(label) == 1) & pl.col(item).is_not_null()).collect()
    if log.schema.keys.timestamp is not None:
        frame = frame.sort(KEY_COLUMNS["timestamp"], maintain_order=True)
    if not frame.height:
        raise ValueError(f'{log.path}: no row of "{split}" has {label} = 1')
    keys_P = item_keys(frame[item])
    return batch_from_frame(frame, log.schema), keys_P
